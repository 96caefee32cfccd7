"""`preview`: predicted FLOPs, cache bytes and memory against what torch counts and what a run really holds."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from small_models import decided_llama, stack
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, DynamicCache, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import reattend
from reattend import Refused
from reattend.cli import app
from reattend.compiler.cache_for import held_bytes
from reattend.compiler.decode import cache_for
from reattend.compiler.peak_memory import peak_bytes

WINDOW = {"version": 1, "sites": [{"match": "*", "attention": {"window": {"window": 8, "sinks": 2}}}]}
LINEAR = {"version": 1, "sites": [{"match": "*", "attention": "linear"}]}
LLAMA = LlamaConfig(hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=300)  # fmt: skip


def counted(model: torch.nn.Module, **kwargs: Any) -> int:
    """With attention written out: torch does not count its fused kernel for CPUs."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**kwargs)
    return counter.get_total_flops()


def test_flops_are_those_that_torch_counts() -> None:
    """torch counts products alone; the tolerance is for the last projection, of one row a batch."""
    config = BertConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                        vocab_size=100)  # fmt: skip
    model = BertModel(config).eval()
    ids = torch.zeros(2, 48, dtype=torch.long)
    cost = reattend.preview(model, "exact", {"input_ids": ids}, batch=2).before.cost
    assert cost.products == pytest.approx(counted(model, input_ids=ids), rel=0.005)
    assert cost.products < cost.flops < 1.2 * cost.products  # each element that is written counts as one more


def test_causal_attention_is_counted_without_what_it_masks() -> None:
    torch.manual_seed(0)
    model, n = LlamaForCausalLM(LLAMA).eval(), 64
    ids = torch.zeros(1, n, dtype=torch.long)
    torch_says = counted(model, input_ids=ids, use_cache=False)
    whole = 2 * 4 * n * n * 64  # per layer: QK and PV over all N x N pairs
    kept = (n + 1) / (2 * n)
    predicted = reattend.preview(LLAMA, "exact", tokens=n).before.cost.products
    assert predicted == pytest.approx(torch_says - whole * (1 - kept), rel=0.005)


def test_cache_bytes_are_what_a_cache_really_holds() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LLAMA).eval()
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.zeros(3, 21, dtype=torch.long), past_key_values=cache)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    found = reattend.preview(LLAMA, WINDOW, tokens=21, batch=3, dtype=torch.float32)
    assert found.before.kv == held
    assert found.after.kv == held * (7 + 2) // 21  # the sinks and the latest keys that the next query can reach
    half = reattend.preview(LLAMA, WINDOW, tokens=21, batch=3, dtype=torch.bfloat16)
    assert half.before.kv == held // 2 and half.before.weights == found.before.weights // 2


def test_a_scan_keeps_a_state_that_does_not_grow() -> None:
    short, long = (reattend.preview(LLAMA, LINEAR, tokens=n, dtype=torch.float32) for n in (16, 64))
    assert short.after.kv == long.after.kv == 2 * 4 * 16 * (16 + 1) * 4  # layers, heads, D, Dv and the normaliser
    assert long.before.kv == 4 * short.before.kv


MARKS = 2 * 2 * 8  # by sequences and bytes: two whole numbers of each, which tell a state's past from another
KEPT = [
    pytest.param({"attention": {"window": {"window": 5, "sinks": 2}}}, 0, id="ring"),
    pytest.param({"attention": "linear"}, MARKS, id="state"),
    pytest.param({"kv": "int8"}, 0, id="int8"),
    pytest.param({}, 0, id="rows"),
]


@pytest.mark.parametrize(("wish", "marks"), KEPT)
def test_predicted_bytes_are_those_that_generate_leaves_in_the_cache(wish: dict[str, Any], marks: int) -> None:
    recipe = {"version": 1, "sites": [{"match": "*", **wish}]} if wish else "exact"
    ids = torch.randint(1, 97, (2, 9))
    fast = reattend.optimize(decided_llama(32), recipe, {"input_ids": ids}, measure=False, max_signatures=16)
    after: dict[int, float] = {}  # by the tokens that the cache has seen
    for new in (1, 12):  # the prompt alone, and what generate() went on with
        cache = cache_for(fast)
        fast.generate(ids, past_key_values=cache, max_new_tokens=new, pad_token_id=0, eos_token_id=None)
        after[cache.get_seq_length()] = held_bytes(cache) - len(cache.layers) * marks
    found = reattend.preview(decided_llama(32), recipe, tokens=20, batch=2, dtype=torch.float32)
    assert found.after.kv == after[20]
    shown = [layer.kv for layer in fast.report.view().layers if layer.kv is not None]
    assert len(shown) == 2 and sum(kv.after for kv in shown) == after[9]


def test_an_encoder_has_no_cache() -> None:
    found = reattend.preview(stack(1, causal=False), "exact", torch.randn(2, 9, 32), batch=2)
    assert found.before.kv == found.after.kv == 0 and "KV" not in found.verdict()


def test_peak_memory_is_near_what_a_run_allocates() -> None:
    model, x = stack(2, causal=False), torch.randn(4, 200, 32)
    predicted = reattend.preview(model, "exact", x, batch=4).after.peak
    with torch.no_grad():
        measured = peak_bytes(lambda: model(x))
    assert 0.6 < predicted / measured < 1.6  # fused kernels keep some bytes of their own


def test_the_roofline_moves_with_the_device() -> None:
    slow = {"flops": 1e9, "bandwidth": 1e9, "memory": 1e5}
    found = reattend.preview(LLAMA, WINDOW, tokens=64, device=slow, dtype=torch.float32)
    assert found.before.seconds >= found.before.cost.flops / 1e9 and found.before.seconds >= found.after.seconds
    assert found.before.seconds > 100 * reattend.preview(LLAMA, WINDOW, tokens=64, dtype=torch.float32).before.seconds
    assert "DOES NOT FIT" in found.verdict() and "predicted, not measured" in found.text()
    assert json.loads(json.dumps(found.to_dict()))["before"]["kv"] == found.before.kv


@pytest.mark.parametrize(("device", "says"), [("h10", "h100"), ({"flops": 1e9}, "bandwidth")])
def test_unknown_devices_are_refused(device: Any, says: str) -> None:
    with pytest.raises(Refused, match=says):
        reattend.preview(LLAMA, WINDOW, tokens=8, device=device)


def test_what_is_neither_model_nor_config_is_refused() -> None:
    with pytest.raises(Refused, match="Hugging Face config"):
        reattend.preview({"layers": 3}, WINDOW)


def test_the_command_line_reads_a_config_alone(tmp_path: Any) -> None:
    LLAMA.save_pretrained(tmp_path)  # no weights there
    result = CliRunner().invoke(app, ["preview", f"hf:{tmp_path}", "window", "--tokens", "32", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["tokens"] == 32
    assert "roofline" in CliRunner().invoke(app, ["preview", "nanogpt", "exact", "--device", "a100"]).output
