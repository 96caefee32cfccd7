"""Orthogonal matrices: Hadamard where the size has one, random ones from a seed, ones that leave the mean alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ..refusal import Refused, nearest

KINDS = ("hadamard", "random")


def rotation(size: int, kind: str = "hadamard", *, seed: int = 0, keeps_mean: bool = False) -> Tensor:
    """(size, size) in float64.

    >>> R = rotation(12)
    >>> bool((R @ R.T - torch.eye(12)).abs().max() < 1e-12), len(R.abs().unique())
    (True, 1)
    """
    if kind not in KINDS:
        raise Refused(f"rotation {kind!r}", fits=nearest(kind, KINDS))
    if keeps_mean:
        return _around_ones(size, kind, seed)
    return hadamard(size) / size**0.5 if kind == "hadamard" else _random(size, seed)


def hadamard(size: int) -> Tensor:
    """Rows of 1 and -1, orthogonal: doubled from the smallest one that Paley's construction gives."""
    small = size
    while small % 2 == 0 and not _known(small):
        small //= 2
    if not _known(small):
        raise Refused(f"no Hadamard matrix of {size} is known here", fits='a size 2^k, 2^k * (prime + 1), or "random"')
    found = torch.ones(1, 1, dtype=torch.float64) if small == 1 else _paley(small - 1)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(found) < size:
        found = torch.kron(two, found)
    return found


def _known(size: int) -> bool:
    return size == 1 or (size % 4 == 0 and size & (size - 1) != 0 and _prime(size - 1))


def _prime(n: int) -> bool:
    return n > 2 and all(n % d for d in range(2, int(n**0.5) + 1))


def _paley(q: int) -> Tensor:
    """H = I + S, S skew with Legendre symbols of differences mod the prime q = 3 mod 4 (Paley 1933)."""
    squares = {(x * x) % q for x in range(1, q)}
    symbol = torch.tensor([0.0] + [1.0 if d in squares else -1.0 for d in range(1, q)], dtype=torch.float64)
    numbers = torch.arange(q)
    S = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    S[0, 1:], S[1:, 0] = 1.0, -1.0
    S[1:, 1:] = symbol[(numbers[None] - numbers[:, None]) % q]
    return S + torch.eye(q + 1, dtype=torch.float64)


def _random(size: int, seed: int) -> Tensor:
    drawn = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    Q, R = torch.linalg.qr(drawn)
    return Q * R.diagonal().sign()


def _around_ones(size: int, kind: str, seed: int) -> Tensor:
    """Q diag(1, R) Q with Q the reflection that takes the first axis to the direction of ones."""
    if kind == "hadamard":
        fits = 'kind "random": LayerNorm takes the mean away, and a Hadamard matrix moves it'
        raise Refused("a Hadamard matrix that keeps the mean", fits=fits)
    axis = torch.full((size,), -(size**-0.5), dtype=torch.float64)
    axis[0] += 1
    Q = torch.eye(size, dtype=torch.float64) - 2 * torch.outer(axis, axis) / (axis @ axis)
    inner = torch.eye(size, dtype=torch.float64)
    inner[1:, 1:] = _random(size - 1, seed)
    return Q @ inner @ Q
