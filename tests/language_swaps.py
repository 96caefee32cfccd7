"""What the tests of language mechanisms share: rows attended one by one, a tiny llama whose attention is swapped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from hosted_models import ids, llama
from torch import Tensor

import reattend


def row_by_row(q: Tensor, k: Tensor, v: Tensor, seen: Callable[[int, int], Iterable[int]]) -> Tensor:
    """Softmax attention in float64 where row i of head h sees the keys seen(h, i)."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    o = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                keys = list(seen(h, i))
                s = torch.stack([q[b, h, i] @ k[b, h // group, j] for j in keys]) * q.shape[-1] ** -0.5
                o[b, h, i] = sum(w * v[b, h // group, j] for w, j in zip(torch.softmax(s, 0), keys, strict=True))
    return o


def close(got: Tensor, expected: Tensor) -> bool:
    return bool((got.double() - expected.double()).abs().max() <= 1e-5)


def swapped(
    slug: str, *, length: int = 12, other: int = 17, taught: tuple[str, ...] = (), **knobs: Any
) -> tuple[Any, Any]:
    """(llama, the same with every attention swapped): it runs at another length, and its gradients are finite.

    taught: tensors that a loss of their own teaches, so that the output has no gradient for them.
    """
    torch.manual_seed(0)
    model = llama()
    recipe = {"version": 1, "sites": [{"match": "*", "attention": {slug: knobs}}]}
    fast = reattend.optimize(model, recipe, {"input_ids": ids(2, length)}, measure=False)
    assert isinstance(fast, type(model))
    loss = fast(input_ids=ids(2, other)).logits.square().mean()
    loss.backward()
    found = {name: t.grad for name, t in fast.named_parameters() if not name.endswith(taught)}
    assert all(g is not None and torch.isfinite(g).all() for g in found.values())
    return model, fast
