"""`attn_implementation="reattend:..."`: the numbers of softmax and of a rewritten graph; a no where it cannot be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reattend
from reattend.compiler.refusal import Refused
from reattend.models.hf_attention import counted, refuse_unrouted, unrouted
from reattend.models.hf_masks import NotRouted, Seen
from reattend.models.zoo import zoo

transformers = pytest.importorskip("transformers")
ZOO = zoo()
WIDTH: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=60,
)
SLIDING = [{}, {"kind": "Mistral", "sliding_window": 4}, {"kind": "Gemma2", "sliding_window": 4, "head_dim": 8}]


def llama(name: str = "sdpa", kind: str = "Llama", **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **WIDTH, bos_token_id=1, eos_token_id=None, pad_token_id=0, **settings
    )
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=name).eval()


def ids(length: int = 12) -> Tensor:
    return torch.randint(1, 60, (2, length), generator=torch.Generator().manual_seed(1))


def left_padded(length: int = 12, padding: int = 4) -> dict[str, Tensor]:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :padding] = 0
    return {"input_ids": ids(length), "attention_mask": mask}


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


# --- the same numbers -------------------------------------------------------------------------------------------------

ROUTED = ["llama", "gemma2", "gemma3", "gpt2", "gpt_oss", "bert_padded", "modernbert", "t5", "whisper", "vit", "clip"]


@pytest.mark.parametrize("name", ROUTED)
@torch.no_grad()
def test_softmax_is_what_stood_there(name: str) -> None:
    """Grouped heads, scales, softcaps, sinks, windows of both kinds, position biases, cross-attention, padding."""
    family = ZOO[name]
    model: Any = family.build("sdpa" if "sdpa" in family.spellings else "eager")
    args, kwargs = family.inputs()
    before = model(*args, **kwargs)
    model.set_attn_implementation("reattend:softmax")
    with counted() as calls:
        after = model(*args, **kwargs)
    assert len(calls) == family.sites
    for key, value in before.items():
        if isinstance(value, Tensor):
            close(after[key], value)


@pytest.mark.parametrize(
    ("slug", "knobs"),
    [
        ("window", {"window": 5, "sinks": 1}),
        pytest.param("sigmoid", {"bias": -2.0}, marks=pytest.mark.slow),
        ("linear", {}),
    ],
)
@torch.no_grad()
def test_a_mechanism_is_what_optimize_puts_there(slug: str, knobs: dict[str, Any]) -> None:
    recipe = {"version": 1, "sites": [{"match": "*", "attention": {slug: knobs}}]}
    given = left_padded()
    fast = reattend.optimize(llama(), recipe, given, measure=False)
    model = llama(reattend.attn_implementation(slug, **knobs))
    real = given["attention_mask"].bool()
    close(model(**given).logits[real], fast(**given).logits[real])
    close(model(ids()).logits, fast(ids()).logits)


@pytest.mark.parametrize("settings", SLIDING, ids=["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_generate_gives_the_same_tokens(settings: dict[str, Any], cache: str | None) -> None:
    """Query offsets, caches that keep a window alone, caches of a fixed size, left padding."""
    eager, model = llama("eager", **settings), llama("reattend:softmax", **settings)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    options |= {"cache_implementation": cache} if cache == "static" else {"use_cache": cache is not None}
    assert torch.equal(model.generate(**left_padded(), **options), eager.generate(**left_padded(), **options))


def test_a_window_decodes_as_the_whole_sequence() -> None:
    model = llama(reattend.attn_implementation("window", window=4, sinks=1))
    cached = model.generate(**left_padded(), max_new_tokens=8, do_sample=False)
    assert torch.equal(cached, model.generate(**left_padded(), max_new_tokens=8, do_sample=False, use_cache=False))
    assert not torch.equal(cached, llama("sdpa").generate(**left_padded(), max_new_tokens=8, do_sample=False))


@torch.no_grad()
def test_masks_of_ones_own_and_packed_sequences_are_kept() -> None:
    eager, model = llama("eager"), llama("reattend:softmax")
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]] * 2)
    close(model(ids(), position_ids=positions, use_cache=False).logits,
          eager(ids(), position_ids=positions, use_cache=False).logits)  # fmt: skip
    own = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(2)) > 0.4
    own = (own | torch.eye(12, dtype=torch.bool)).tril()
    as_number = torch.where(own, 0.0, torch.finfo(torch.float32).min)
    for mask in (own, as_number):
        close(model(ids(), attention_mask=mask).logits, eager(ids(), attention_mask=as_number).logits)
    with pytest.raises(Refused, match="linear does not honour mask"):
        llama("reattend:linear")(ids(), attention_mask=own)


def test_it_trains_with_dropout_and_gradient_checkpointing() -> None:
    model = llama("reattend:softmax", attention_dropout=0.5).train()
    model.activation_checkpointing_enable()
    torch.manual_seed(3)
    first = model(ids(), labels=ids()).loss
    first.backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.manual_seed(4)
    assert not torch.equal(model(ids(), labels=ids()).loss, first)


@torch.no_grad()
def test_it_compiles_and_exports() -> None:
    model = llama(reattend.attn_implementation("window", window=5))
    expected = model(ids(), use_cache=False).logits
    compiled = torch.compile(model, backend="aot_eager")
    close(compiled(ids(), use_cache=False).logits, expected)
    exported = torch.export.export(model, (ids(),), {"use_cache": False}, strict=False)
    close(exported.module()(ids(), use_cache=False).logits, expected)


# --- names ------------------------------------------------------------------------------------------------------------


def test_knobs_stand_in_the_name() -> None:
    assert reattend.attn_implementation("window") == "reattend:window"
    name = reattend.attn_implementation("sigmoid", sim="softmax", softmax_scale=1e-3)
    assert name == "reattend:sigmoid?sim=softmax&softmax_scale=0.001"
    assert reattend.attn_implementation(name) == name
    with pytest.raises(Refused, match="did you mean 'window'"):
        reattend.attn_implementation("windw")
    with pytest.raises(Refused, match="its knobs: sinks, window"):
        reattend.attn_implementation("window?sink=3")
    with pytest.raises(ValueError, match=r"reattend:windw.* is not supported"):
        llama("reattend:windw")


@pytest.mark.usefixtures("notebook")
@torch.no_grad()
def test_a_mechanism_defined_later_has_a_name_too_and_can_be_defined_anew() -> None:
    built: Any = None
    for far, expected in ((1, False), (100, True)):

        @reattend.register("near")
        @dataclass(frozen=True)
        class Near(reattend.Mechanism):
            reach: int = far

            def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return reattend.attend(q, k, v, keep=lambda i, j: i - j < self.reach, site=site)

        built = built or llama("reattend:near")
        assert torch.allclose(built(ids()).logits, llama()(ids()).logits, atol=1e-5) is expected


@pytest.mark.slow
@pytest.mark.parametrize("first", ["reattend", "transformers.modeling_utils"])
def test_importing_reattend_does_not_import_transformers_and_any_order_registers(first: str) -> None:
    script = f"""
import sys
import torch
vision = torch.library.Library("torchvision", "DEF")  # operators that another build of torchvision lacks
vision.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
vision.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import {first}
import reattend
assert {first == "reattend"} is ("transformers" not in sys.modules)
import transformers
config = transformers.LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="reattend:window")
print(model.config._attn_implementation, sum(type(f).__module__.startswith("reattend") for f in sys.meta_path))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.split() == ["reattend:window", "0"], done.stderr


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_model_that_computes_with_its_mask_is_refused() -> None:
    family = ZOO["bloom"]
    built: Any = family.build("eager")
    model = type(built)._from_config(built.config, attn_implementation="reattend:softmax")
    args, kwargs = family.inputs()
    with pytest.raises(NotRouted, match="does not route attention"):
        model(*args, **kwargs)


@pytest.mark.parametrize(
    ("name", "beside"), [pytest.param("deberta_v2", 2, marks=pytest.mark.slow), ("siglip", 1), ("llama", 0)]
)
def test_attentions_beside_the_interface_are_counted(name: str, beside: int) -> None:
    family = ZOO[name]
    model: Any = family.build("sdpa" if "sdpa" in family.spellings else "eager")
    model.config._attn_implementation = "reattend:softmax"
    args, kwargs = family.inputs()
    assert len(unrouted(model, *args, **kwargs)) == beside
    if beside:
        with pytest.raises(Refused, match=f"{beside} attentions are not routed"):
            refuse_unrouted(model, *args, **kwargs)


@dataclass(frozen=True)
class Gained(reattend.Mechanism):
    """A learned factor per head."""

    def params(self, site: Any) -> Mapping[str, reattend.Param]:
        return {"gain": reattend.Param((site.heads,), torch.Tensor.fill_)}

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reattend.attend(q, k, v, site=site) * p.gain[:, None, None]


@pytest.mark.usefixtures("notebook")
def test_what_the_interface_does_not_carry_is_refused_by_name() -> None:
    reattend.register("gained")(Gained)
    model = llama()
    for slug, says in {
        "gained": r"gained has tensors of its own \(gain\).*reattend.optimize",
        "moh": "moh is a gate.*'heads': 'moh'",
        "agent": "agent has tensors of its own",
        "tome_like": "tome_like is a model.*passes",
    }.items():
        model.set_attn_implementation(f"reattend:{slug}")
        with pytest.raises(Refused, match=says):
            model(ids())


def test_a_running_sum_goes_on_from_the_kept_keys() -> None:
    model = llama()
    model.set_attn_implementation("reattend:linear")
    how = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids(), **how), model.generate(ids(), use_cache=False, **how))


def test_a_mask_is_no_tensor() -> None:
    mask = Seen(causal=True)
    assert not hasattr(mask, "shape")
    for use in (lambda: torch.ones(2) + mask, lambda: mask[:, :, 0], lambda: mask.dtype):
        with pytest.raises(NotRouted, match="reattend.optimize"):
            use()
