"""A decoder with its cache is one graph: prefill, decode and unmodified generate() give the original's tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import reattend
from reattend.compiler.capture import Captured, capture
from reattend.compiler.hosted import host
from reattend.compiler.refusal import Refused
from reattend.compiler.signature import Call

CONFIG = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 60,
    "num_hidden_layers": 1,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def identity(model: nn.Module, call: Call) -> Captured:
    return capture(model, call.args, call.kwargs)


def llama(**more: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**CONFIG | more)).eval()


def call_of(model: Any, batch: int, queries: int, past: int) -> dict[str, Any]:
    cache = hf.DynamicCache(config=model.config)
    for layer in range(len(cache.layers) if past else 0):
        cache.update(torch.randn(batch, 2, past, 8), torch.randn(batch, 2, past, 8), layer)
    return {
        "input_ids": torch.randint(1, 60, (batch, queries)),
        "attention_mask": torch.ones(batch, queries + past, dtype=torch.long),
        "position_ids": torch.arange(past, past + queries).expand(batch, -1),
        "past_key_values": cache,
        "use_cache": True,
    }


def copied(kwargs: dict[str, Any]) -> dict[str, Any]:
    import copy

    return kwargs | {"past_key_values": copy.deepcopy(kwargs["past_key_values"])}


def test_one_graph_serves_prefill_and_decode() -> None:
    model = llama(num_hidden_layers=2)
    fast = host(model, identity)
    with torch.no_grad():
        for batch, queries, past in ((2, 3, 10), (2, 7, 0), (3, 1, 7), (1, 1, 5)):
            given = call_of(model, batch, queries, past)
            expected = model(**copied(given))
            answer = fast(**given)
            torch.testing.assert_close(answer.logits, expected.logits, atol=1e-5, rtol=1e-5)
            assert answer.past_key_values is given["past_key_values"]
            assert answer.past_key_values.get_seq_length() == past + queries
            for one, other in zip(answer.past_key_values.layers, expected.past_key_values.layers):
                torch.testing.assert_close(one.keys, other.keys)
                torch.testing.assert_close(one.values, other.values)
    assert len(fast.signatures) == 1


def test_query_and_past_lengths_are_open() -> None:
    model = llama(num_hidden_layers=2)
    captured = capture(model, kwargs=call_of(model, 2, 3, 10))
    shapes = dict(zip(captured.dims.inputs, captured.dims.shapes))
    batch, queries = shapes["input_ids"]
    assert isinstance(batch, str) and isinstance(queries, str)
    keys = shapes["past_key_values.layers.0.keys"]
    assert keys[0] == batch and isinstance(keys[2], str) and keys[1] == 2 and keys[3] == 8
    assert all(s == keys for n, s in shapes.items() if ".layers." in n)


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "left padding"])
def test_generate_gives_the_same_tokens(padded: bool) -> None:
    model = llama()
    fast = host(model, identity)
    x = torch.randint(1, 60, (2, 6))
    mask = torch.ones_like(x)
    if padded:
        mask[0, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(fast.generate(x, **options), model.generate(x, **options))
    assert len(fast.signatures) == 1


def test_generate_without_a_cache_too() -> None:
    model = llama()
    fast = host(model, identity)
    x = torch.randint(1, 60, (1, 4))
    options = {"max_new_tokens": 4, "do_sample": False, "use_cache": False}
    assert torch.equal(fast.generate(x, **options), model.generate(x, **options))


@pytest.mark.filterwarnings("ignore:.*max_cache_len.*")
@pytest.mark.parametrize("where", ["call", "config"])
def test_a_cache_of_fixed_size_becomes_one_that_grows(where: str, caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    fast = host(model, identity)
    x = torch.randint(1, 60, (2, 5))
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    wanted = model.generate(x, **options)
    if where == "call":
        options["cache_implementation"] = "static"
    else:
        fast.generation_config.cache_implementation = "static"
    assert torch.equal(fast.generate(x, **options), wanted)
    assert "a DynamicCache instead" in caplog.text
    with pytest.raises(Refused, match="a cache layer StaticLayer"):
        fast(x, past_key_values=hf.StaticCache(config=model.config, max_cache_len=16), use_cache=True)


def hybrid() -> Any:
    """A convolution's state in one layer, keys and values in the other."""
    config = hf.Lfm2Config(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["conv", "full_attention"],
        vocab_size=60,
    )
    torch.manual_seed(0)
    return hf.Lfm2ForCausalLM(config).eval()


def test_a_state_that_is_no_keys_and_values_is_refused_and_left_as_it_was() -> None:
    model = hybrid()
    fast, x, cache = host(model, identity), torch.randint(1, 60, (2, 5)), hf.DynamicCache(config=model.config)
    with pytest.raises(Refused, match=r"layers.0: a cache layer LinearAttentionLayer.*use_cache=False"):
        fast(x, past_key_values=cache, use_cache=True)
    model(x, past_key_values=cache, use_cache=True)


@pytest.mark.slow
def test_generate_without_a_cache_where_a_state_is_no_keys_and_values(caplog: pytest.LogCaptureFixture) -> None:
    model = hybrid()
    fast, x, options = host(model, identity), torch.randint(1, 60, (2, 5)), {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(fast.generate(x, **options), model.generate(x, **options))
    assert "use_cache=False: graphs take no LinearAttentionLayer" in caplog.text


@pytest.mark.slow
def test_an_encoder_decoder_generates_the_same_tokens() -> None:
    config = hf.T5Config(
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        vocab_size=60,
        decoder_start_token_id=0,
        eos_token_id=None,
    )
    model = hf.T5ForConditionalGeneration(config).eval()
    fast = host(model, identity)
    x = torch.randint(1, 60, (2, 7))
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(fast.generate(x, **options), model.generate(x, **options))
    assert len(fast.signatures) == 2  # before and after the encoder's keys are in the cache


def test_an_empty_cache_of_sliding_windows_keeps_everything() -> None:
    model = hf.MistralForCausalLM(hf.MistralConfig(**CONFIG, sliding_window=4)).eval()
    fast = host(model, identity)
    x = torch.randint(1, 60, (2, 7))
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(fast.generate(x, **options), model.generate(x, **options))
    assert len(fast.signatures) == 1
    forgetful = model(x, use_cache=True).past_key_values
    with pytest.raises(Refused, match=r"sliding window: past_key_values=DynamicCache\(\)"):
        fast(x[:, :1], past_key_values=forgetful)


def test_such_a_model_is_optimized_without_inputs() -> None:
    model, x = hybrid(), torch.randint(1, 60, (2, 5))
    fast = reattend.optimize(model, "exact", measure=False)
    assert len(fast.sites) == 1 and len(fast.signatures) == 1
    with torch.no_grad():
        torch.testing.assert_close(fast(x, use_cache=False).logits, model(x, use_cache=False).logits)


def test_a_model_that_takes_no_cache_generates_without_one() -> None:
    torch.manual_seed(0)
    model = hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(n_embd=32, n_layer=1, n_head=2, vocab_size=60)).eval()
    fast, x = reattend.optimize(model, "exact", measure=False), torch.randint(1, 60, (2, 5))
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fast.generate(x, **options), model.generate(x, **options))


def test_a_config_without_a_longest_length_says_minus_one() -> None:
    config = hf.XLNetConfig(d_model=32, n_layer=1, n_head=2, d_inner=32, vocab_size=60)
    fast = reattend.optimize(hf.XLNetLMHeadModel(config).eval(), "exact", measure=False)
    assert len(fast.sites) == 1


@pytest.mark.parametrize("slug", ["rat", "based"])
def test_what_makes_keys_of_x_says_that_a_cache_has_none_of_it(slug: str) -> None:
    model, x = llama(), torch.randint(3, 60, (1, 7))
    fast = reattend.optimize(model, slug, {"input_ids": x, "use_cache": False}, measure=False)
    cache = model(x, use_cache=True).past_key_values
    with pytest.raises(Refused, match=rf"{slug}: its forward asks for x of every key.*new tokens alone: use_cache"):
        fast(input_ids=x[:, :1], past_key_values=cache, use_cache=True)


@torch.no_grad()
@pytest.mark.parametrize("slug", ["rat", "based"])
def test_the_way_out_of_a_cache_that_is_named_runs_in_generate(slug: str) -> None:
    x = torch.randint(3, 60, (1, 7))
    body = {"match": "*", "attention": slug}
    recipe = {"version": 1, "sites": [body]}
    fast = reattend.optimize(llama(), recipe, {"input_ids": x, "use_cache": False}, measure=False)
    with pytest.raises(Refused, match=r"use_cache=False \(also in generate, there with `drop: \[packed\]`\)"):
        fast.generate(x, max_new_tokens=3, do_sample=False)
    recipe = {"version": 1, "sites": [body | {"drop": ["packed"]}]}
    fast = reattend.optimize(llama(), recipe, {"input_ids": x, "use_cache": False}, measure=False)
    got, expected = fast.generate(x, max_new_tokens=3, do_sample=False, use_cache=False), x
    while expected.shape[1] < got.shape[1]:
        last = fast(input_ids=expected, use_cache=False).logits[:, -1:]
        expected = torch.cat((expected, last.argmax(-1)), 1)
    assert torch.equal(got, expected)
