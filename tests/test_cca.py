"""Core context aware attention against its sets written out: pools, windows, ragged ends, padding, grouped heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hosted_models import ids
from language_swaps import close, swapped
from torch import Tensor

import reattend.passes  # noqa: F401 - fills the registry
from reattend.compiler.functional import attention
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused


def written_out(q: Tensor, k: Tensor, v: Tensor, g: int, s: int, pool: str, real: Tensor | None = None) -> Tensor:
    """Row by row, one softmax over what the row sees; a group without a real token is not seen."""
    q, k, v = q.double(), k.double(), v.double()
    o, scale = torch.zeros_like(q), q.shape[-1] ** -0.5
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            K, V = k[b, h * k.shape[1] // q.shape[1]], v[b, h * k.shape[1] // q.shape[1]]
            for i in range(q.shape[2]):
                groups = max(0, (i + 1 - s) // g)
                items: list[tuple[Tensor, Tensor]] = []
                for c in range(groups):
                    t = [t for t in range(c * g, (c + 1) * g) if real is None or real[b, t]]
                    if t and pool == "cca":
                        a = torch.softmax(K[t] @ q[b, h, (c + 1) * g - 1] * scale, 0)
                        items.append((a @ K[t], a @ V[t]))
                    elif t:
                        items.append((K[t].mean(0), V[t].mean(0)) if pool == "mean" else (K[t].amax(0), V[t].amax(0)))
                items += [(K[t], V[t]) for t in range(groups * g, i + 1) if real is None or real[b, t]]
                if items:
                    w = torch.softmax(torch.stack([key @ q[b, h, i] for key, _ in items]) * scale, 0)
                    o[b, h, i] = sum(x * value for x, (_, value) in zip(w, items, strict=True))
    return o


@pytest.mark.parametrize("pool", ["cca", "mean", "max"])
@pytest.mark.parametrize(("g", "s", "n", "kv"), [(2, 3, 9, 4), (3, 1, 11, 2), (4, 4, 7, 4), (5, 2, 13, 1)])
def test_sets(pool: str, g: int, s: int, n: int, kv: int) -> None:
    q, k, v = problem(n, kv_heads=kv)
    got = attention(q, k, v, "cca", causal=True, group_size=g, window_size=s, pool_func=pool)
    assert close(got, written_out(q, k, v, g, s, pool))


@pytest.mark.parametrize("pool", ["cca", "mean", "max"])
def test_padding_is_in_no_pool(pool: str) -> None:
    q, k, v = problem(11)
    real = torch.ones(2, 11, dtype=torch.bool)
    real[0, :3] = False
    real[1, 9:] = False
    got = attention(q, k, v, "cca", causal=True, mask=real, group_size=2, window_size=2, pool_func=pool)
    assert close(got, written_out(q, k, v, 2, 2, pool, real))


def test_in_a_llama() -> None:
    model, fast = swapped("cca", group_size=2, window_size=3)
    x = ids(2, 17)
    full, got = model(input_ids=x).logits, fast(input_ids=x).logits
    assert (got - full).abs().max() > 1e-4
    assert close(got[:, :4], full[:, :4]), "the first window_size + group_size - 1 rows see no group"


@pytest.mark.parametrize(
    ("knobs", "causal", "match"),
    [({}, False, "noncausal-self"), ({"pool_func": "sum"}, True, "one of"), ({"group_size": 0}, True, "at least 1")],
)
def test_refused(knobs: dict[str, Any], causal: bool, match: str) -> None:
    q, k, v = problem()
    with pytest.raises(Refused, match=match):
        attention(q, k, v, "cca", causal=causal, **knobs)
