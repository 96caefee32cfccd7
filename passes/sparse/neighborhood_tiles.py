"""How many tiles of keys the tiles of queries of a neighborhood must visit: the speed-up that its knobs can give.

Everything is separable: an axis has tiles of queries, of keys, and the tiles that the windows of a tile of queries
cover; pairs of tiles are products over the axes. Full attention visits all pairs; the bound is how many fewer are left.

>>> plan = Plan((Axis(32768, 2048),), (128,), (128,))
>>> round(plan.bound, 2), plan.block_sparse
(15.11, False)
>>> plan.sparser()
Plan(axes=(Axis(size=32768, window=2048, stride=256, dilation=1, causal=False),), queries=(128,), keys=(128,))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

from .neighborhood_axis import Axis

TILES = {1: (128,), 2: (16, 8), 3: (4, 4, 8)}  # of 128 tokens, as the published kernels have them


@dataclass(frozen=True)
class Plan:
    """A neighborhood with the tiles of queries and keys in which it is run; sizes are numbers."""

    axes: tuple[Axis, ...]
    queries: tuple[int, ...]
    keys: tuple[int, ...]

    @property
    def bound(self) -> float:
        """Pairs of tiles of full attention for each pair that is visited."""
        return prod(_dense(*one) / _visited(*one) for one in self._each())

    @property
    def flops(self) -> float:
        """Pairs of tokens of full attention for each pair that is kept."""
        return prod(_size(axis) / axis.window for axis in self.axes)

    @property
    def block_sparse(self) -> bool:
        """Whether no tile that is visited needs a mask: its queries share a window that begins and ends with tiles."""
        return all(_whole(*one) for one in self._each())

    def sparser(self) -> Plan | None:
        """The same windows with the smallest strides that make it block-sparse; None where no stride does."""
        return self._with([next(_strided(*one), None) for one in self._each()])

    def near(self) -> Plan | None:
        """Block-sparse with windows as little wider as must be, up to the axis; None where nothing is."""
        return self._with([next(_widened(*one), None) for one in self._each()])

    def _with(self, found: Sequence[Axis | None]) -> Plan | None:
        axes = tuple(axis for axis in found if axis is not None)
        return replace(self, axes=axes) if len(axes) == len(found) else None

    def _each(self) -> Iterator[tuple[Axis, int, int]]:
        return zip(self.axes, self.queries, self.keys, strict=True)

    def __str__(self) -> str:
        window, stride = _shape(a.window for a in self.axes), _shape(a.stride for a in self.axes)
        sparse = ", block-sparse" if self.block_sparse else ""
        return (
            f"window {window}, stride {stride}, tiles {_shape(self.queries)} on {_shape(self.keys)}: at most "
            f"{self.bound:.2f} x fewer than full attention{sparse} ({self.flops:.2f} x in FLOPs)"
        )


def plan(axes: Sequence[Axis]) -> Plan:
    """A neighborhood in the usual tiles, no larger than its axes."""
    tiles = tuple(min(tile, _size(axis)) for tile, axis in zip(TILES[len(axes)], axes, strict=True))
    return Plan(tuple(axes), tiles, tiles)


def _shape(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes))


def _size(axis: Axis) -> int:
    assert axis.size is not None
    return axis.size


def _dense(axis: Axis, tq: int, tk: int) -> int:
    return -(-_size(axis) // tq) * -(-_size(axis) // tk)


@lru_cache(maxsize=4096)
def _spans(axis: Axis, tq: int) -> tuple[tuple[int, int, bool], ...]:
    """For each tile of queries of each dilation group: the first key, the one behind the last, whether all share it."""
    found = []
    for group in range(axis.dilation):
        length = len(range(group, _size(axis), axis.dilation))
        for first in range(0, length, tq):
            low, end = axis.window_of(first, length)
            low_last, end_last = axis.window_of(min(first + tq, length) - 1, length)
            found.append((max(low, 0), end_last, (low, end) == (low_last, end_last)))
    return tuple(found)


def _visited(axis: Axis, tq: int, tk: int) -> int:
    return sum((end - 1) // tk - low // tk + 1 for low, end, _ in _spans(axis, tq))


def _whole(axis: Axis, tq: int, tk: int) -> bool:
    return all(shared and low % tk == 0 and end % tk == 0 for low, end, shared in _spans(axis, tq))


def _strided(axis: Axis, tq: int, tk: int) -> Iterator[Axis]:
    wider = (replace(axis, stride=s) for s in range(axis.stride, axis.window + 1))
    return (one for one in wider if _whole(one, tq, tk))


def _widened(axis: Axis, tq: int, tk: int) -> Iterator[Axis]:
    for window in range(axis.window, _size(axis) // axis.dilation + 1):
        if window % tk == 0 or window == axis.window:
            yield from _strided(replace(axis, window=window, stride=1), tq, tk)
