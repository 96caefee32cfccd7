"""What comparing with the papers' own code asked for, as small examples worked out by their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d
from torch.nn.functional import scaled_dot_product_attention as sdpa

import reattend.passes  # noqa: F401 - fills the registry
from reattend.compiler.functional import attention
from reattend.compiler.layers import module
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused
from reattend.passes.linear.prepbn import fold, replace_norms


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance)


@pytest.mark.parametrize(("kind", "pool"), [("avg", avg_pool2d), ("max", max_pool2d)])
def test_biformer_pools_the_keys_of_the_regions_it_chose(kind: str, pool: object) -> None:
    q, k, v = problem(24)  # a picture of 4 x 6, one region, squares of 2 x 2
    few = [pool(t.mT.flatten(0, 1).unflatten(2, (4, 6)), 2).flatten(2).unflatten(0, t.shape[:2]).mT for t in (k, v)]  # type: ignore[operator]
    o = attention(q, k, v, "biformer", grid=(4, 6), regions=(1, 1), topk=1, kv_pool=kind, kv_pool_ratio=2)
    assert close(o, sdpa(q, *few))


def test_biformer_pools_the_tokens_there_are() -> None:
    """Regions of 2 x 2 on 3 x 2: the second holds two tokens, whose mean is its only key."""
    q, k, v = problem(6)
    few = [torch.stack((t[:, :, :4].mean(2), t[:, :, 4:].mean(2)), 2) for t in (k, v)]
    o = attention(q, k, v, "biformer", grid=(3, 2), region_size=(2, 2), topk=2, kv_pool="avg", kv_pool_ratio=2)
    assert close(o, sdpa(q, *few))
    with pytest.raises(Refused, match="kv_pool_ratio=3 in regions of 2 x 2"):
        attention(q, k, v, "biformer", grid=(3, 2), region_size=(2, 2), topk=2, kv_pool="avg", kv_pool_ratio=3)


def test_the_papers_words_for_knobs_are_known() -> None:
    q, k, v = problem(6)
    assert close(attention(q, k, v, "gpsa", grid=(2, 3), qk_scale=0.2, gating_init=-50.0), sdpa(q, k, v, scale=0.2))
    one = {"norm": "rmsnorm", "eps": 1e-6}
    assert close(
        attention(q, k, v, "qk_norm", softmax_scale=0.3, **one), attention(q, k, v, "qk_norm", scale=0.3, **one)
    )
    kinds = [attention(q, k, v, "kd_gqa", variant="dgqa", kind=kind, at_once=True) for kind in ("ema", "diff")]
    assert close(kinds[0], kinds[1])  # without a past both are shares of the norms


def test_mma_has_spans_of_its_own_in_every_row_of_a_batch() -> None:
    q, k, v = problem(8)
    spans = {"image_start": torch.tensor([1, 0]), "image_end": torch.tensor([3, 2]), "text_end": torch.tensor([5, 7])}
    o = attention(q, k, v, "mma", causal=True, **spans)
    for row in range(2):
        alone = {name: int(of[row]) for name, of in spans.items()}
        assert close(o[row : row + 1], attention(*(t[row : row + 1] for t in (q, k, v)), "mma", causal=True, **alone))
    assert not close(o[:1], attention(q, k, v, "softmax", causal=True)[:1])


def test_a_models_norms_are_replaced_by_norms_that_fold() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 3)).train()
    torch.nn.init.normal_(model[1].weight)
    x = torch.randn(4, 5, 6)
    before = model(x)
    replace_norms(model, total_step=3)
    assert close(model(x), before)  # lam is 1 in the first step
    for _ in range(20):
        model(x)
    model.eval()
    assert not close(model(x), before, 0.1)
    assert close(fold(model[1], model[2])(model[0](x)), model(x))
    with pytest.raises(Refused, match="a poolformer"):
        fold(module("poolformer"), model[2])
