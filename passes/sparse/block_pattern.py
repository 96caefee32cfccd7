"""Which blocks of keys a block of queries sees, said one by one: (heads or 1, blocks, blocks) of 0 and 1."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.symbols import build, table

log = logging.getLogger(__name__)

Blocks = tuple[tuple[tuple[int, ...], ...], ...]


def checked(pattern: Any, where: str) -> Blocks:
    """A pattern as nested tuples, refused where it is not square or a block does not see itself."""
    held = torch.as_tensor(pattern).bool().int()
    if held.ndim != 3 or held.shape[1] != held.shape[2] or not held.diagonal(dim1=1, dim2=2).all():
        found = f"a pattern of shape {tuple(held.shape)}"
        raise Refused(found, where=where, fits="(heads or 1, blocks, blocks), every own block 1")
    if _comes_back(held):
        log.warning("%s: this pattern comes back to blocks that it had left: a cache has to keep them all", where)
    return tuple(tuple(map(tuple, head)) for head in held.tolist())


def misfit(pattern: Blocks, site: Site, slug: str) -> str | None:
    """Why a pattern does not fit a site."""
    if len(pattern) not in (1, site.heads):
        return f"{slug}: a pattern of {len(pattern)} heads for {site.heads} heads"
    ahead = any(any(row[a + 1 :]) for head in pattern for a, row in enumerate(head))
    return f"{slug}: this pattern looks to the right, this site is causal" if site.causal and ahead else None


def kept(pattern: Blocks, size: int, device: torch.device) -> Callable[..., Any]:
    """The predicate; a block beyond the pattern sees itself alone."""
    held, last = table(torch.tensor(pattern, device=device)), len(pattern[0]) - 1

    def keep(h: Any, i: Any, j: Any) -> Any:
        a, c = i // size, j // size
        place = 0 if len(pattern) == 1 else h
        inside = held[place, build("minimum", a, last), build("minimum", c, last)] == 1
        return (a == c) | ((a <= last) & (c <= last) & inside)

    return keep


def _comes_back(held: torch.Tensor) -> bool:
    """Whether a column, below the diagonal, is 1 again after it was 0."""
    below = held.tril()
    again = (below[:, 1:] > below[:, :-1]) & torch.ones_like(below[0, 1:]).tril(0).bool()
    return bool(again.any())
