"""Position-persistent selection against its card: on a tiny decoder, with and without enough keys to select from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface

import reattend
from reattend import Refused
from reattend.models.zoo import zoo


def llama() -> tuple[Any, dict[str, Any]]:
    family = zoo()["llama"]
    _, kwargs = family.inputs()
    return family.build("sdpa").eval(), kwargs


def selected(model: Any, kwargs: dict[str, Any], **knobs: Any) -> Any:
    recipe = {"version": 1, "passes": [{"tidal": {"sparse_layer_start": 0, "correction_layer": 9, **knobs}}]}
    return reattend.optimize(model, recipe, kwargs, measure=False)


def generated(model: Any) -> torch.Tensor:
    ids = torch.randint(1, 90, (1, 12), generator=torch.Generator().manual_seed(3))
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)


@pytest.mark.slow
def test_with_enough_keys_it_is_full_attention() -> None:
    model, kwargs = llama()
    assert torch.equal(generated(selected(model, kwargs, top_k=64)), generated(model))


def test_prefill_is_full_attention_and_decoding_is_not() -> None:
    model, kwargs = llama()
    fast = selected(model, kwargs, top_k=1)
    torch.testing.assert_close(fast(**kwargs)[0], model(**kwargs)[0], atol=1e-5, rtol=1e-5)
    cache, full_cache = (m(**(kwargs | {"use_cache": True})).past_key_values for m in (fast, model))
    step = {"input_ids": torch.tensor([[5], [7]]), "use_cache": True}
    got = fast(**step, past_key_values=cache).logits
    full = model(**step, past_key_values=full_cache).logits
    assert (got - full).abs().max() > 1e-3


def test_decoding_reads_what_the_selecting_layer_chose() -> None:
    """Written out: the first layer ranks its keys, the newest before all others; the one behind it reads five."""
    chosen: list[torch.Tensor] = []

    def by_hand(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **_: Any) -> Any:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        logits = q @ k.mT * scaling
        if q.shape[2] > 1:
            logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf)
        elif module.layer_idx == 0:
            ranked = logits.index_fill(-1, torch.tensor([logits.shape[-1] - 1]), torch.inf)
            chosen[:] = [ranked.topk(5).indices]
        else:
            kept = torch.full_like(logits, -torch.inf).scatter(-1, chosen[0], 0.0)
            logits = logits + kept
        return (logits.softmax(-1) @ v).transpose(1, 2), None

    model, kwargs = llama()
    fast = selected(model, kwargs, top_k=5)
    AttentionInterface.register("tidal_by_hand", by_hand)
    model.set_attn_implementation("tidal_by_hand")
    caches = [m(**(kwargs | {"use_cache": True})).past_key_values for m in (fast, model)]
    for token in ([[5], [7]], [[1], [2]], [[9], [0]]):
        step = {"input_ids": torch.tensor(token), "use_cache": True}
        got, expected = (m(**step, past_key_values=c).logits for m, c in zip((fast, model), caches, strict=True))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_layers_in_the_wrong_order_are_refused() -> None:
    model, kwargs = llama()
    with pytest.raises(Refused, match="correction_layer"):
        selected(model, kwargs, sparse_layer_start=3, correction_layer=2)
