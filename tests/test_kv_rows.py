"""Keys and values of few bits: what a cache holds, and that decoding over it says what the whole sequence says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import decided_llama
from torch import Tensor

import reattend
from reattend import Refused
from reattend.compiler.primitives.attend_spec import AttendSpec
from reattend.compiler.primitives.packed_rows import RowSpec, packed_rows, stored, unpacked_rows

transformers = pytest.importorskip("transformers")

IDS = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
SPECS = [RowSpec(*said) for said in [(8, 16), (4, 16), (4, 16, 4), (8, 12, 6), (4, 7), (8, 5), (4, 1)]]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.text)
def test_rows_come_back_within_half_a_level(spec: RowSpec) -> None:
    x = torch.randn(2, 3, 5, spec.dim) * torch.logspace(-3, 3, 5)[:, None]
    rows = packed_rows(x, spec)
    assert rows.dtype == torch.uint8 and rows.shape == (2, 3, 5, spec.bytes)
    assert spec.bytes <= -(-spec.dim * spec.bits // 8) + 1 + 4 * spec.groups
    back = unpacked_rows(rows, spec)
    grouped = x.unflatten(-1, (spec.groups, -1))
    span = grouped.amax(-1) - grouped.amin(-1)
    # half a level, and what rounding scale and zero to float16 adds to it
    most = span / spec.most / 2 * 1.01 + 2**-10 * grouped.abs().amax(-1) + 1e-6
    assert ((back - x).abs().unflatten(-1, (spec.groups, -1)).amax(-1) <= most).all()
    assert torch.equal(stored(x, spec), back)


def optimized(sites: Any, model: Any = None, **more: Any) -> Any:
    recipe = {"version": 1, "sites": [{"match": "*", **sites}], **more}
    return reattend.optimize(model or decided_llama(64), recipe, {"input_ids": IDS}, measure=False)


@pytest.fixture(scope="module")
def four_bits() -> Any:
    """A model whose caches hold 4 bits; the graphs that one test captures serve the next."""
    return optimized({"kv": "int4"})


def in_parts(fast: Any, ids: Tensor, sizes: list[int], cache: Any) -> Tensor:
    with torch.no_grad():
        parts = [fast(part, past_key_values=cache, use_cache=True).logits for part in ids.split(sizes, 1)]
    return torch.cat(parts, 1)


def held(cache: Any) -> int:
    return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))


@pytest.mark.parametrize(("slug", "row"), [("int8", 16 + 4), ("int4", 8 + 4)])
def test_a_cache_holds_bytes_and_decoding_is_prefill(slug: str, row: int, request: pytest.FixtureRequest) -> None:
    fast = request.getfixturevalue("four_bits") if slug == "int4" else optimized({"kv": slug})
    cache = transformers.DynamicCache()
    whole = fast(IDS, use_cache=False).logits.detach()
    torch.testing.assert_close(in_parts(fast, IDS, [4, 1, 3, 1], cache), whole, atol=2e-4, rtol=1e-4)
    assert all(t.dtype == torch.uint8 for layer in cache.layers for t in (layer.keys, layer.values))
    assert held(cache) == 2 * 2 * 2 * 2 * 9 * row  # layers, keys and values, batch, key heads, tokens, bytes
    plain = decided_llama(64)(IDS).logits.detach()
    assert 1e-4 < float((whole - plain).norm() / plain.norm()) < (0.05 if slug == "int8" else 0.5)
    assert torch.equal(fast.generate(IDS, **GREEDY), greedy(fast))


def greedy(fast: Any) -> Tensor:
    """The tokens of full runs."""
    ids = IDS
    with torch.no_grad():
        for _ in range(GREEDY["max_new_tokens"]):
            ids = torch.cat((ids, fast(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    return ids


def test_memory_is_what_was_predicted(four_bits: Any) -> None:
    cache = transformers.DynamicCache()
    in_parts(four_bits, IDS, [9], cache)
    recipe = {"version": 1, "sites": [{"match": "*", "kv": "int4"}]}
    found = reattend.preview(decided_llama(64), recipe, {"input_ids": IDS}, batch=2)
    assert (found.after.kv, found.before.kv) == (held(cache), 2 * 2 * 2 * 2 * 9 * 16 * 4)


def test_a_ring_holds_bytes_too() -> None:
    from reattend.compiler.decode import cache_for

    fast = optimized({"attention": {"window": {"window": 6, "sinks": 2}}, "kv": {"int4": {"kv_group_size": 8}}})
    cache = cache_for(fast)
    whole = fast(IDS, use_cache=False).logits.detach()
    torch.testing.assert_close(in_parts(fast, IDS, [4, 1, 3, 1], cache), whole, atol=2e-4, rtol=1e-4)
    assert held(cache) == 2 * 2 * 2 * 2 * 7 * (8 + 8)
    assert fast.report.rows[0].mechanism.startswith("int4") and "window" in fast.report.rows[0].mechanism


def test_a_kernel_that_reads_bytes_is_handed_bytes() -> None:
    """For a GPU decoding attends what the cache holds; elsewhere its numbers are made first."""
    fast = optimized({"kv": "int4"}, target="triton")
    cache = transformers.DynamicCache()
    whole = fast(IDS, use_cache=False).logits.detach()
    torch.testing.assert_close(in_parts(fast, IDS, [4, 1, 3, 1], cache), whole, atol=2e-4, rtol=1e-4)
    nodes = [n for graph in fast._reattend.graphs.values() for n in graph.graph.graph.nodes]
    texts = [str(n.args[3]) for n in nodes if n.target is torch.ops.reattend.attend.default]
    assert any(AttendSpec.of(text).stored == ((4, 16, 0, "float32"),) * 2 for text in texts)
    assert not any("unpack" in str(n.target) for n in nodes)


def test_layers_that_are_kept_hold_numbers_and_a_returned_cache_goes_on() -> None:
    recipe = {"version": 1, "sites": [{"match": {"layer": "0"}, "kv": "keep"}, {"match": "*", "kv": "int8"}]}
    fast = reattend.optimize(decided_llama(64), recipe, {"input_ids": IDS}, measure=False)
    with torch.no_grad():
        first = fast(IDS[:, :6], use_cache=True)
        assert [layer.keys.dtype for layer in first.past_key_values.layers] == [torch.float32, torch.uint8]
        rest = fast(IDS[:, 6:], past_key_values=first.past_key_values, use_cache=True).logits
        torch.testing.assert_close(rest, fast(IDS, use_cache=False).logits[:, 6:], atol=2e-4, rtol=1e-4)
        cache = first.past_key_values
        cache.reorder_cache(torch.tensor([1, 0]))  # as beams do
        again = fast(IDS[[1, 0]][:, :1], past_key_values=cache, use_cache=True).logits
        whole = fast(torch.cat((IDS, IDS[:, :1]), 1)[[1, 0]], use_cache=False).logits
    torch.testing.assert_close(again, whole[:, -1:], atol=2e-4, rtol=1e-4)


def test_it_comes_back_from_a_folder(tmp_path: Any) -> None:
    fast = optimized({"kv": "int4"})
    tokens = fast.generate(IDS, **GREEDY)
    fast.save_pretrained(tmp_path)
    again = reattend.load(tmp_path)
    assert len(again.signatures) == len(fast.signatures)
    found = again.generate(IDS, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(found.sequences, tokens) and found.past_key_values.layers[0].keys.dtype == torch.uint8
    assert len(again.signatures) == len(fast.signatures), "captured anew, not read"


def test_the_gradient_passes_as_if_nothing_was_stored() -> None:
    k = torch.randn(1, 2, 3, 8, requires_grad=True)
    seen = torch.randn(1, 2, 3, 8)
    stored(k, RowSpec(4, 8)).backward(seen)
    assert k.grad is not None and torch.equal(k.grad, seen)


def test_numbers_that_are_none_stay_so_and_constant_rows_are_kept() -> None:
    x = torch.full((1, 1, 4, 8), 3.0)
    x[0, 0, 1, 2], x[0, 0, 2, 2] = torch.nan, torch.inf
    x[0, 0, 3] = 0
    back = stored(x, RowSpec(4, 8))[0, 0]
    assert torch.equal(back[[0, 3]], x[0, 0, [0, 3]]) and back[1].isnan().all() and not back[2].isfinite().any()


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(Refused, match="kv_group_size 12 does not divide heads of 16.*kv_group_size: 8"):
        optimized({"kv": {"int4": {"kv_group_size": 12}}})
    from small_models import stack

    with pytest.raises(Refused, match="int8 stores the keys of causal self-attention, this site is noncausal-self"):
        reattend.optimize(stack(causal=False), {"version": 1, "sites": [{"match": "*", "kv": "int8"}]},
                          (torch.randn(1, 5, 32),), measure=False)  # fmt: skip
    fast, cache = optimized({"kv": "int8"}), transformers.DynamicCache()
    with torch.no_grad():
        decided_llama(64)(IDS, past_key_values=cache, use_cache=True)
    with pytest.raises(Refused, match=r"past_key_values\.layers\.0\.keys"):
        fast(IDS[:, :1], past_key_values=cache, use_cache=True)
