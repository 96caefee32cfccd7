"""generate() over states: the tokens of full re-runs, from caches that hold the state of a scan and do not grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import decided_llama
from torch import Tensor

import reattend
from reattend import Refused, cache_for
from reattend.compiler.cache_for import held_bytes
from reattend.compiler.primitives.same_past import digest

pytest.importorskip("transformers")

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
IDS = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(IDS)
PADDED[0, :3] = 0
STATE = 2 * 4 * 8 * 9 * 4 + 2 * 2 * 8  # batch, heads, D, Dv and the normaliser, float32; two whole numbers a sequence


def swapped(*sites: dict[str, Any]) -> Any:
    recipe = {"version": 1, "sites": list(sites)}
    return reattend.optimize(decided_llama(32), recipe, {"input_ids": IDS}, measure=False, max_signatures=16)


@pytest.fixture(scope="module")
def fast() -> Any:
    return swapped({"match": "*", "attention": "linear"})


def tokens(model: Any, **how: Any) -> list[list[int]]:
    return model.generate(IDS, **GREEDY, **how).tolist()  # type: ignore[no-any-return]


@torch.no_grad()
def in_parts(fast: Any, ids: Tensor, sizes: list[int], cache: Any, mask: Tensor | None = None) -> Tensor:
    rows, at = [], 0
    for part in ids.split(sizes, 1):
        at += part.shape[1]
        more = {} if mask is None else {"attention_mask": mask[:, :at]}
        rows.append(fast(part, past_key_values=cache, use_cache=True, **more).logits)
    return torch.cat(rows, 1)


def test_a_state_gives_the_tokens_of_full_runs_and_does_not_grow(fast: Any) -> None:
    cache = cache_for(fast)
    found = tokens(fast, past_key_values=cache, attention_mask=PADDED)
    assert found == tokens(fast, use_cache=False, attention_mask=PADDED)
    assert [type(layer).__name__ for layer in cache.layers] == ["StateLayer"] * 2
    assert held_bytes(cache) == 2 * STATE and cache.get_seq_length() == 9 + 12 - 1
    more = fast.generate(torch.tensor(found), past_key_values=cache, **GREEDY,
                         attention_mask=torch.cat((PADDED, torch.ones(2, 12, dtype=torch.long)), 1))  # fmt: skip
    assert more.shape[1] == 33 and held_bytes(cache) == 2 * STATE


def test_padding_that_the_state_did_not_see_is_refused(fast: Any) -> None:
    cache, other = cache_for(fast), PADDED.clone()
    other[1, 4] = 0
    with torch.no_grad():
        fast(IDS[:, :6], attention_mask=PADDED[:, :6], past_key_values=cache, use_cache=True)
        before = [layer.keys.clone() for layer in cache.layers]
        with pytest.raises(Refused, match=r"layers\.0.*other padding.*DynamicCache"):
            fast(IDS[:, 6:], attention_mask=other, past_key_values=cache, use_cache=True)
    assert all(torch.equal(layer.keys, was) for layer, was in zip(cache.layers, before, strict=True))
    assert cache.get_seq_length() == 6


def test_a_state_cannot_go_back(fast: Any) -> None:
    with pytest.raises(Refused, match="cannot go back"):
        cache_for(fast).layers[0].crop(-1)


def test_a_digest_tells_masks_apart() -> None:
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1]])
    _, found = digest(mask, torch.empty(0, 0))
    assert found[0, 0] == found[1, 0] and found[0, 1] != found[1, 1]


MECHANISMS: dict[str, Any] = {
    "linear": "linear",
    "l2vit": "l2vit",
    "based": {"based": {"feature_dim": 0}},
    "lightning": {"lightning": {"act": "silu_qk"}},
    "minimax": {"lightning": {"act": "silu_qkv", "norm": "layernorm", "slope_rule": "minimax"}},
    "lrpe": {"lightning": {"lrpe": True}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MECHANISMS)
def test_every_mechanism_of_one_scan_has_its_state(name: str) -> None:
    fast = swapped({"match": "*", "attention": MECHANISMS[name]})
    cache = cache_for(fast)
    assert all(type(layer).__name__ == "StateLayer" for layer in cache.layers)
    found = tokens(fast, past_key_values=cache, attention_mask=PADDED)
    assert found == tokens(fast, attention_mask=PADDED) == tokens(fast, attention_mask=PADDED, use_cache=False)
    ids = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    short, long = cache_for(fast), cache_for(fast)
    with torch.no_grad():
        whole = fast(ids, use_cache=False).logits
    parts = in_parts(fast, ids, [3, 20, 1, 9, 7], long)
    in_parts(fast, ids[:, :3], [3], short)
    torch.testing.assert_close(parts, whole, atol=1e-5 * float(whole.abs().max()), rtol=1e-5)
    assert held_bytes(short) == held_bytes(long)


@pytest.mark.slow
def test_windows_states_and_whole_layers_stand_in_one_cache() -> None:
    window = {"window": {"window": 6, "sinks": 2}}
    for second in ("keep", window):
        fast = swapped({"match": {"layer": "0"}, "attention": "linear"}, {"match": {"layer": "1"}, "attention": second})
        cache = cache_for(fast)
        kind = "DynamicLayer" if second == "keep" else "RingLayer"
        assert [type(layer).__name__ for layer in cache.layers] == ["StateLayer", kind]
        found = tokens(fast, past_key_values=cache, attention_mask=PADDED)
        assert found == tokens(fast, use_cache=False, attention_mask=PADDED)


@pytest.mark.slow
def test_beams_reorder_states(fast: Any) -> None:
    found = tokens(fast, past_key_values=cache_for(fast), attention_mask=PADDED, num_beams=3)
    assert found == tokens(fast, use_cache=False, attention_mask=PADDED, num_beams=3)


@pytest.mark.slow
def test_a_model_that_decoded_over_states_is_saved_and_loaded(fast: Any, tmp_path: Path) -> None:
    found = tokens(fast, past_key_values=cache_for(fast), attention_mask=PADDED)
    fast.save_pretrained(tmp_path)
    again = reattend.load(tmp_path)
    assert tokens(again, attention_mask=PADDED) == found


def test_a_loaded_model_keeps_what_the_saved_one_did(tmp_path: Path) -> None:
    fast = swapped({"match": {"layer": 0}, "attention": {"window": {"window": 5, "sinks": 1}}},
                   {"match": "*", "attention": "linear"})  # fmt: skip
    fast.save_pretrained(tmp_path)
    loaded = reattend.load(tmp_path)
    caches = cache_for(fast), cache_for(loaded)
    assert [type(layer).__name__ for layer in caches[1].layers] == ["RingLayer", "StateLayer"]
    assert tokens(fast, past_key_values=caches[0]) == tokens(loaded, past_key_values=caches[1])
    assert held_bytes(caches[0]) == held_bytes(caches[1]) > 0
    again = reattend.load(fast.save_pretrained(tmp_path / "again") or tmp_path / "again")  # of one that has decoded
    assert tokens(again, past_key_values=cache_for(again)) == tokens(fast, use_cache=False)
