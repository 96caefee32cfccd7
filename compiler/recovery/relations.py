"""MiniLM's losses: how the rows of q, k and v relate to one another, student against teacher, streamed in row blocks.

v1: L = KL(softmax(q kᵀ/√d)) + KL(softmax(v vᵀ/√d)), head by head (arXiv 2002.10957).
v2: the width is split again into A_r heads, relations of q, k and v with themselves (arXiv 2012.15828).
Each KL is a mean over heads and real rows. A block's matrix lives only while it is read, in the backward pass again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..primitives.rows import repeat_heads
from ..refusal import Refused

BLOCK = 128  # query rows of one block


def relation_loss(
    student: Mapping[str, Tensor],  # q, k, v (B, H, N, D), after RoPE and norms
    teacher: Mapping[str, Tensor],
    version: str,
    *,
    causal: bool,
    padding: Tensor | None = None,  # (B, N), true where a row is real
    heads: int = 0,
) -> Tensor:
    """The sum of a version's relation losses at one site.

    >>> q, k, v = torch.randn(3, 1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    >>> same = {"q": q, "k": k, "v": v}
    >>> float(relation_loss(same, same, "v1", causal=True))
    0.0
    """
    ours, theirs = _whole(student), _whole(teacher)
    if version == "v1":
        if ours["q"].shape[1] != theirs["q"].shape[1]:
            found = f"{ours['q'].shape[1]} heads beside the teacher's {theirs['q'].shape[1]}"
            raise Refused(found, where="relations v1", fits="equal heads, or v2, which splits the width again")
        names = [("q", "k"), ("v", "v")]
    else:
        count = heads or theirs["q"].shape[1]
        ours, theirs = _split(ours, count), _split(theirs, count)
        names = [(name, name) for name in "qkv"]
    total = torch.zeros((), device=ours["q"].device)
    for one, other in names:
        total = total + _streamed((ours[one], ours[other]), (theirs[one], theirs[other]), causal, padding)
    return total


def _whole(ports: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: repeat_heads(ports[name], ports["q"]).float() for name in "qkv"}


def _split(ports: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
    """Heads concatenated and split into others of equal width."""
    found = {}
    for name, tensor in ports.items():
        B, H, N, D = tensor.shape
        if H * D % heads:
            raise Refused(f"width {H * D} in {heads} relation heads", where="relations v2", fits="a divisor of it")
        found[name] = tensor.transpose(1, 2).reshape(B, N, heads, H * D // heads).transpose(1, 2)
    return found


def _streamed(
    ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], causal: bool, padding: Tensor | None
) -> Tensor:
    B, H, N, _ = ours[0].shape
    real = torch.ones(B, N, dtype=torch.bool, device=ours[0].device) if padding is None else padding != 0
    total = torch.zeros((), device=ours[0].device)
    for start in range(0, N, BLOCK):
        rows = slice(start, min(start + BLOCK, N))
        total = total + checkpoint(
            _block, ours[0][:, :, rows], ours[1], theirs[0][:, :, rows], theirs[1], real, start, causal,
            use_reentrant=False,
        )  # fmt: skip
    return total / (H * real.sum().clamp(min=1))


def _block(
    rows: Tensor, keys: Tensor, teacher_rows: Tensor, teacher_keys: Tensor, real: Tensor, start: int, causal: bool
) -> Tensor:
    """The sum of KL over real rows of a block, keys that are masked in both left out."""
    n, m = rows.shape[2], keys.shape[2]
    i = torch.arange(start, start + n, device=rows.device)[:, None]
    seen = (torch.arange(m, device=rows.device) <= i) if causal else rows.new_ones(n, m, dtype=torch.bool)
    seen = seen[None, None] & real[:, None, None, :]
    p = _log_weights(teacher_rows, teacher_keys, seen)
    q = _log_weights(rows, keys, seen)
    each = torch.where(seen, p.exp() * (p - q), 0.0).sum(-1)  # (B, H, n)
    return (each * real[:, None, start : start + n]).sum()


def _log_weights(rows: Tensor, keys: Tensor, seen: Tensor) -> Tensor:
    scores = rows @ keys.mT * rows.shape[-1] ** -0.5
    return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).log_softmax(-1)
