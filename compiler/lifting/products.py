"""Products of two tensors, in any spelling: batch axes, one free axis of each side, one axis that is contracted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..ports import op_name
from .index_paths import same_size, shape_of


@dataclass(frozen=True)
class Operand:
    """One side of a product: its node, and where its batch, free and contracted axes are."""

    node: fx.Node
    batch: tuple[int, ...]  # axes, in the order of the product's batch; -1 where it has none (broadcast)
    free: int
    contracted: int
    extra: int = -1  # an axis of size 1 that stands for the other side's free axis, in a * b summed


@dataclass(frozen=True)
class Product:
    """out[batch..., left.free, right.free] = sum over contracted of left * right, in some order of out's axes."""

    node: fx.Node
    left: Operand
    right: Operand
    batch: tuple[int, ...]  # axes of the output
    rows: int  # the output's axis of left.free
    columns: int  # the output's axis of right.free
    factor: float = 1.0
    added: fx.Node | None = None  # baddbmm's input
    added_factor: float = 1.0
    inside: tuple[fx.Node, ...] = ()  # nodes between the sides and the product


PRODUCTS = frozenset({"matmul", "bmm", "mm", "baddbmm", "einsum"})


def as_product(node: fx.Node) -> Product | str | None:
    """The product that a node is; why it is not one that attention is made of; None where it is no product at all."""
    name = op_name(node)
    if name == "sum":
        return _multiplied_and_summed(node)
    if name not in PRODUCTS:
        return None
    if name == "einsum":
        return _einsum(node)
    left, right = node.args[1:3] if name == "baddbmm" else node.args[:2]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    ranks = len(shape_of(left)), len(shape_of(right))
    if min(ranks) < 2:
        return "a product with a vector"
    rank = max(ranks)
    sides = [
        Operand(side, tuple(range(r - rank, r - 2)) if r == rank else _aligned(r, rank), free, contracted)
        for side, r, free, contracted in (
            (left, ranks[0], ranks[0] - 2, ranks[0] - 1),
            (right, ranks[1], ranks[1] - 1, ranks[1] - 2),
        )
    ]
    batch = tuple(range(rank - 2))
    if name != "baddbmm":
        return Product(node, sides[0], sides[1], batch, rank - 2, rank - 1)
    beta, alpha = (float(node.kwargs.get(k, 1)) for k in ("beta", "alpha"))  # type: ignore[arg-type]
    added = node.args[0] if beta != 0 else None
    return Product(node, sides[0], sides[1], batch, rank - 2, rank - 1, alpha, added, beta)  # type: ignore[arg-type]


def _aligned(own: int, rank: int) -> tuple[int, ...]:
    """Batch axes of a side with fewer axes: missing ones in front."""
    return tuple(axis - (rank - own) if axis >= rank - own else -1 for axis in range(rank - 2))


def _multiplied_and_summed(node: fx.Node) -> Product | None:
    """(a * b).sum(axis), with each side of size 1 where the other has its free axis."""
    times, axes = node.args[0], node.args[1] if len(node.args) > 1 else None
    if op_name(times) != "mul" or not isinstance(axes, list | tuple) or len(axes) != 1 or node.args[2:3] == (True,):
        return None
    left, right = times.args[:2]  # type: ignore[union-attr]
    whole = shape_of(times)
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    if len(shape_of(left)) != len(whole) or len(shape_of(right)) != len(whole):
        return None
    contracted = int(axes[0]) % len(whole)  # type: ignore[arg-type]
    single = [[same_size(s, 1) for s in shape_of(side)] for side in (left, right)]
    others = [a for a in range(len(whole)) if a != contracted]
    free = [[a for a in others if not own[a] and other[a]] for own, other in (single, single[::-1])]
    if len(free[0]) != 1 or len(free[1]) != 1 or single[0][contracted] or single[1][contracted]:
        return None
    (rows,), (columns,) = free
    batch = tuple(a for a in others if a not in (rows, columns))
    kept = {axis: place for place, axis in enumerate(others)}
    sides = (Operand(left, batch, rows, contracted, columns), Operand(right, batch, columns, contracted, rows))
    places = tuple(kept[a] for a in batch)
    return Product(node, *sides, places, kept[rows], kept[columns], inside=(times,))  # type: ignore[arg-type]


def _einsum(node: fx.Node) -> Product | str:
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if not isinstance(operands, list | tuple) or len(operands) != 2:
        return "an einsum of other than two tensors"
    inputs, arrow, output = equation.partition("->")
    left, right = inputs.split(",")
    ranks = [len(shape_of(o)) for o in operands]
    if "..." in equation:
        left, right, output = _spelled_out(left, right, output, ranks)
    if not arrow:
        output = "".join(sorted(c for c in set(left + right) if (left + right).count(c) == 1))
    if len(set(left)) != len(left) or len(set(right)) != len(right):
        return "an einsum with a repeated index"
    contracted = [c for c in left if c in right and c not in output]
    free = [[c for c in side if c not in other and c in output] for side, other in ((left, right), (right, left))]
    batch = [c for c in output if c in left and c in right]
    if len(contracted) != 1 or any(len(f) != 1 for f in free) or set(left + right) - set(output) - set(contracted):
        grouped = _one_sided_batch(left, right, output, contracted, free)
        if grouped is None:
            return "an einsum that does not contract one axis against two free ones"
        batch, free = grouped
    sides = [
        Operand(o, tuple(side.find(c) for c in batch), side.index(f[0]), side.index(contracted[0]))
        for o, side, f in zip(operands, (left, right), free)
    ]
    places = tuple(output.index(c) for c in batch)
    return Product(node, sides[0], sides[1], places, output.index(free[0][0]), output.index(free[1][0]))


def _one_sided_batch(
    left: str, right: str, output: str, contracted: list[str], free: list[list[str]]
) -> tuple[list[str], list[list[str]]] | None:
    """Grouped queries, bkgnd,bkmd->bkgnm: an axis of one side alone that stands before its free axis is batch."""
    if len(contracted) != 1 or any(len(f) == 0 for f in free):
        return None
    extra = [c for f in free for c in f[:-1]]
    if set(left + right) - set(output) - set(contracted):
        return None
    batch = [c for c in output if (c in left and c in right) or c in extra]
    return batch, [[f[-1]] for f in free]


def _spelled_out(left: str, right: str, output: str, ranks: list[int]) -> tuple[str, str, str]:
    """`...` as capital letters, aligned at the right."""
    counts = [rank - len(side.replace("...", "")) for side, rank in zip((left, right), ranks)]
    letters = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in left + right + output][: max(counts)]
    fill = ["".join(letters[len(letters) - n :]) for n in counts]
    return left.replace("...", fill[0]), right.replace("...", fill[1]), output.replace("...", "".join(letters))
