"""generate() over rings: the tokens of full re-runs, from caches that hold a window's keys and no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import decided_llama

import reattend
from reattend import Refused
from reattend.compiler.cache_for import held_bytes
from reattend.compiler.decode import cache_for
from reattend.compiler.ring_cache import RingLayer

pytest.importorskip("transformers")

GREEDY = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
IDS = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(IDS)
PADDED[0, :3] = 0
ROW = 2 * 2 * 8 * 4  # bytes of one key: batch, key heads, dim, float32


def windowed(match: Any) -> Any:
    recipe = {"version": 1, "sites": [{"match": match, "attention": {"window": {"window": 6, "sinks": 2}}}]}
    return reattend.optimize(decided_llama(32), recipe, {"input_ids": IDS}, measure=False)


@pytest.fixture(scope="module")
def fast() -> Any:
    return windowed("*")


def tokens(model: Any, **how: Any) -> list[list[int]]:
    return model.generate(IDS, **GREEDY, **how).tolist()  # type: ignore[no-any-return]


def test_a_cache_gives_the_tokens_of_full_runs(fast: Any) -> None:
    again = tokens(fast, use_cache=False)
    assert tokens(fast) == again
    assert tokens(decided_llama(32)) != again, "the window changes nothing: the comparison would show nothing"


def test_a_ring_gives_them_too_and_does_not_grow(fast: Any) -> None:
    cache = cache_for(fast)
    again = tokens(fast, use_cache=False)
    assert tokens(fast, past_key_values=cache) == again
    assert [(layer.back, layer.sinks, layer.held) for layer in cache.layers] == [(5, 2, 7)] * 2
    assert held_bytes(cache) == 2 * 2 * 7 * ROW
    assert cache.get_seq_length() == 9 + 16 - 1  # the last token is not fed back
    spec = [str(n.args[3]) for n in fast.graph.graph.nodes if "reattend.attend" in str(n.target)]
    assert len(spec) == 2 and all('"align":"end"' in text and "positions" not in text for text in spec)


def test_left_padding_is_looked_up_where_a_key_stands(fast: Any) -> None:
    cache = cache_for(fast)
    ringed = tokens(fast, attention_mask=PADDED, past_key_values=cache)
    assert ringed == tokens(fast, attention_mask=PADDED, use_cache=False)
    assert ringed[0] != tokens(fast, use_cache=False)[0]
    assert held_bytes(cache) == 2 * 2 * 7 * ROW


@pytest.mark.slow
def test_positions_are_logical_where_the_model_counts_them_itself(fast: Any) -> None:
    """Chunks after many wraps, without position_ids: RoPE goes on from the number of keys that ever came."""
    ids = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    whole, cache = fast(ids, use_cache=False).logits, cache_for(fast)
    with torch.no_grad():
        parts = [fast(part, past_key_values=cache, use_cache=True).logits for part in ids.split([3, 20, 1, 9, 7], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
    assert cache.get_seq_length() == 40 and [layer.held for layer in cache.layers] == [7, 7]


@pytest.mark.slow
def test_layers_without_a_bound_keep_everything() -> None:
    fast = windowed({"layer": "1"})
    cache = cache_for(fast)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicLayer", "RingLayer"]
    assert tokens(fast, past_key_values=cache) == tokens(fast, use_cache=False)
    assert [layer.keys.shape[2] for layer in cache.layers] == [24, 7]


def test_a_ring_that_drops_what_is_attended_is_refused() -> None:
    fast = windowed("*")
    cache = cache_for(fast)
    cache.layers[0] = RingLayer(back=3, sinks=2)
    with pytest.raises(Refused, match=r"layers\.0.*the ring Reach\(back=3, ahead=0, sinks=2\).*DynamicCache"):
        tokens(fast, past_key_values=cache)


def test_a_model_as_it_came_has_no_rings() -> None:
    with pytest.raises(Refused, match="not optimized"):
        cache_for(decided_llama(32))


def test_a_ring_cannot_go_back(fast: Any) -> None:
    cache = cache_for(fast)
    tokens(fast, past_key_values=cache)
    with pytest.raises(Refused, match="cannot go back"):
        cache.layers[0].crop(-1)
