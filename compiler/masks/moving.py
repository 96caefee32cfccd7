"""Operators that move elements and change none: each says where in its operand the asked-for element stands."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..nodes import args_of
from ..symbols import Expr, build, const
from .arithmetic import choose, truth
from .casts import cast
from .frame import Unreadable
from .index_space import simplify_indices
from .reading import Handler, Index, Reader, aligned, argument, dtype, is_one, operator_name, same_size, shape

ZERO = const(0)


def _dim(node: fx.Node, position: int, rank: int, default: int = 0, keyword: str = "dim") -> int:
    dim = argument(node, position, keyword, default)
    if not isinstance(dim, int):
        raise Unreadable("a dimension that is not a number")
    return dim % rank if rank else 0


def _expand(reader: Reader, node: fx.Node, index: Index) -> Expr:
    return reader.at(node.args[0], aligned(node.args[0], index))


def _unsqueeze(reader: Reader, node: fx.Node, index: Index) -> Expr:
    d = _dim(node, 1, len(index))
    return reader.at(node.args[0], index[:d] + index[d + 1 :])


def _permute(reader: Reader, node: fx.Node, index: Index) -> Expr:
    order = [int(d) % len(index) for d in args_of(node)[1]]
    return reader.at(node.args[0], tuple(index[order.index(d)] for d in range(len(index))))


def _transpose(reader: Reader, node: fx.Node, index: Index) -> Expr:
    rank = len(index)
    if rank < 2:
        return reader.at(node.args[0], index)
    plain = operator_name(node).startswith(("t.", "mT", "numpy_T"))
    a, b = (rank - 2, rank - 1) if plain else (_dim(node, 1, rank, keyword="dim0"), _dim(node, 2, rank, keyword="dim1"))
    order = list(index)
    order[a], order[b] = order[b], order[a]
    return reader.at(node.args[0], tuple(order))


def _slice(reader: Reader, node: fx.Node, index: Index) -> Expr:
    d = _dim(node, 1, len(index))
    start, step = argument(node, 2, "start"), argument(node, 4, "step", 1)
    size = shape(node.args[0])[d]
    first = _position(reader, 0 if start is None else start, size)
    return reader.at(node.args[0], (*index[:d], index[d] * reader.frame.size(step) + first, *index[d + 1 :]))


def _position(reader: Reader, given: Any, size: Any) -> Expr:
    """A Python index as a position: negative ones count from the end, and none lies outside."""
    space = reader.frame.space
    if isinstance(given, int) and given == 0:
        return ZERO
    at = reader.frame.size(given)
    if space.never_negative(at):
        return at
    if space.never_negative(-at - 1):
        at = at + reader.frame.size(size)
        if space.never_negative(at):
            return at
    raise Unreadable("a position whose sign is not known")


def _select(reader: Reader, node: fx.Node, index: Index) -> Expr:
    sizes = shape(node.args[0])
    d = _dim(node, 1, len(sizes))
    at = _position(reader, argument(node, 2, "index"), sizes[d])
    return reader.at(node.args[0], (*index[:d], at, *index[d:]))


def _narrow(reader: Reader, node: fx.Node, index: Index) -> Expr:
    d = _dim(node, 1, len(index))
    first = _position(reader, argument(node, 2, "start"), shape(node.args[0])[d])
    return reader.at(node.args[0], (*index[:d], index[d] + first, *index[d + 1 :]))


def _cat(reader: Reader, node: fx.Node, index: Index) -> Expr:
    d = _dim(node, 1, len(index))
    parts = [p for p in args_of(node)[0] if shape(p) != (0,)]
    start, starts = ZERO, []
    for part in parts:
        starts.append(start)
        start = start + reader.frame.size(shape(part)[d])
    total: Expr | None = None
    following = start
    for part, first in reversed(list(zip(parts, starts, strict=True))):
        own = (*index[:d], ZERO if is_one(shape(part)[d]) else index[d] - first, *index[d + 1 :])
        e = reader.at(part, own)
        total = e if total is None else _if(reader, index[d] < following, e, total)
        following = first
    if total is None:
        raise Unreadable("nothing is joined")
    return total


def _if(reader: Reader, condition: Expr, a: Expr, b: Expr) -> Expr:
    return choose(simplify_indices(condition, reader.frame.space), a, b)


def _stack(reader: Reader, node: fx.Node, index: Index) -> Expr:
    d = _dim(node, 1, len(index))
    parts: Any = node.args[0]
    own = index[:d] + index[d + 1 :]
    total = reader.at(parts[-1], own)
    for k in range(len(parts) - 2, -1, -1):
        total = _if(reader, index[d] <= k, reader.at(parts[k], own), total)
    return total


def _flip(reader: Reader, node: fx.Node, index: Index) -> Expr:
    dims = [int(d) % len(index) for d in args_of(node)[1]]
    sizes = shape(node)
    turned = [reader.frame.size(sizes[d]) - 1 - e if d in dims else e for d, e in enumerate(index)]
    return reader.at(node.args[0], tuple(turned))


def _repeat(reader: Reader, node: fx.Node, index: Index) -> Expr:
    sizes = shape(node.args[0])
    times: Any = node.args[1]
    own, counts = index[len(index) - len(sizes) :], times[len(index) - len(sizes) :]
    return reader.at(node.args[0], tuple(
        ZERO if is_one(s) else e if is_one(c) else build("mod", e, reader.frame.size(s))
        for s, e, c in zip(sizes, own, counts, strict=True)
    ))  # fmt: skip


def _repeat_interleave(reader: Reader, node: fx.Node, index: Index) -> Expr:
    if argument(node, 2, "dim") is None:
        raise Unreadable("repeat_interleave of a flattened tensor")
    d = _dim(node, 2, len(index))
    times = reader.frame.size(node.args[1])
    return reader.at(node.args[0], (*index[:d], build("floordiv", index[d], times), *index[d + 1 :]))


def _view(reader: Reader, node: fx.Node, index: Index) -> Expr:
    """Groups of dimensions with equal products: a group of one is passed on, others are flattened and split again."""
    source, old, new = node.args[0], shape(node.args[0]), shape(node)
    found: list[Expr | None] = [ZERO if is_one(s) else None for s in old]
    left = [d for d, s in enumerate(old) if not is_one(s)]
    right = [d for d, s in enumerate(new) if not is_one(s)]
    while left and right:
        if same_size(old[left[0]], new[right[0]]):
            found[left.pop(0)] = index[right.pop(0)]
            continue
        ins, outs = _group(old, new, left, right)
        flat = ZERO
        for d in outs:
            flat = flat * reader.frame.size(new[d]) + index[d]
        for position, d in enumerate(ins):
            rest = const(1)
            for later in ins[position + 1 :]:
                rest = rest * reader.frame.size(old[later])
            part = build("floordiv", flat, rest)
            found[d] = simplify_indices(part if position == 0 else build("mod", part, reader.frame.size(old[d])))
    if left or right or any(e is None for e in found):
        raise Unreadable("a reshape whose sizes do not line up")
    return reader.at(source, tuple(e for e in found if e is not None))


def _group(old: Any, new: Any, left: list[int], right: list[int]) -> tuple[list[int], list[int]]:
    """The fewest next dimensions of both sides with one product; taken off the lists."""
    ins, outs = [left.pop(0)], [right.pop(0)]
    a, b = old[ins[0]], new[outs[0]]
    while not same_size(a, b):
        if not (isinstance(a, int) and isinstance(b, int)):
            raise Unreadable("a reshape of symbolic sizes")
        if a < b and left:
            ins.append(left.pop(0))
            a = a * old[ins[-1]]
        elif a > b and right:
            outs.append(right.pop(0))
            b = b * new[outs[-1]]
        else:
            raise Unreadable("a reshape whose sizes do not line up")
    return ins, outs


def _squeeze(reader: Reader, node: fx.Node, index: Index) -> Expr:
    sizes = shape(node.args[0])
    dims = argument(node, 1, "dim")
    rank = len(sizes)
    chosen = range(rank) if dims is None else [d % rank for d in ([dims] if isinstance(dims, int) else dims)]
    kept = iter(index)
    return reader.at(node.args[0], tuple(
        ZERO if d in chosen and is_one(size) else next(kept) for d, size in enumerate(sizes)
    ))  # fmt: skip


def _index(reader: Reader, node: fx.Node, index: Index) -> Expr:
    """Advanced indexing: the index tensors broadcast; they stand together, or in front where something lies between."""
    source: Any = node.args[0]
    sizes = shape(source)
    given: Any = node.args[1]
    picks: list[Any] = [*given, *[None] * (len(sizes) - len(given))]
    used = [d for d, p in enumerate(picks) if p is not None]
    if any("bool" in str(picks[d].meta["val"].dtype) for d in used):
        raise Unreadable("selection by a condition")
    rank = max(len(shape(picks[d])) for d in used)
    together = used == list(range(used[0], used[-1] + 1))
    at = used[0] if together else 0
    common, rest = index[at : at + rank], iter(index[:at] + index[at + rank :])
    full: list[Expr] = []
    for d, pick in enumerate(picks):
        if pick is None:
            full.append(next(rest))
            continue
        e = reader.at(pick, aligned(pick, common))
        full.append(ZERO if is_one(sizes[d]) else _checked(reader, e))
    return reader.at(source, tuple(full))


def _checked(reader: Reader, e: Expr) -> Expr:
    """An index may count from the end in torch and may not in an expression."""
    if not e.is_integer or not reader.frame.space.never_negative(e):
        raise Unreadable("an index whose sign is not known")
    return e


def _index_select(reader: Reader, node: fx.Node, index: Index) -> Expr:
    d = _dim(node, 1, len(index))
    picked = _checked(reader, reader.at(node.args[2], (index[d],)))
    return reader.at(node.args[0], (*index[:d], picked, *index[d + 1 :]))


def _getitem(reader: Reader, node: fx.Node, index: Index) -> Expr:
    """One of the tensors that an operator with several results gives."""
    source: Any = node.args[0]
    which = node.args[1]
    if not isinstance(source, fx.Node) or not isinstance(which, int):
        raise Unreadable("an item of something that is not a list of tensors")
    kind = operator_name(source).split(".")[0]
    results = source.meta["val"]
    which %= len(results)
    if kind == "unbind":
        d = _dim(source, 1, len(index) + 1)
        return reader.at(source.args[0], (*index[:d], const(which), *index[d:]))
    if kind in ("split", "split_with_sizes", "chunk"):
        d = _dim(source, 2, len(index))
        before = ZERO
        for value in results[:which]:
            before = before + reader.frame.size(value.shape[d])
        return reader.at(source.args[0], (*index[:d], index[d] + before, *index[d + 1 :]))
    if kind == "meshgrid":
        position = which
        if source.kwargs.get("indexing", "ij") == "xy" or "xy" in source.args[1:]:
            position = {0: 1, 1: 0}.get(which, which)
        return reader.at(args_of(source)[0][which], (index[position],))
    raise Unreadable(f"{kind} is not read")


def _pad(reader: Reader, node: fx.Node, index: Index) -> Expr:
    amounts: Any = node.args[1]
    if operator_name(node).startswith("pad.") and argument(node, 2, "mode", "constant") != "constant":
        raise Unreadable("padding that mirrors")
    value = argument(node, 3 if operator_name(node).startswith("pad.") else 2, "value", 0)
    inside, own = const(True), list(index)
    for k in range(len(amounts) // 2):
        d = len(index) - 1 - k
        before, after = reader.frame.size(amounts[2 * k]), reader.frame.size(amounts[2 * k + 1])
        size = reader.frame.size(shape(node)[d])
        inside = inside & (index[d] >= before) & (index[d] < size - after)
        own[d] = index[d] - before
    inside = simplify_indices(inside, reader.frame.space)
    fill = cast(reader.at(0 if value is None else value, ()), dtype(0 if value is None else value), dtype(node))
    e = reader.at(node.args[0], tuple(own))
    return choose(truth(inside), e, fill)


def _named(handler: Handler, *names: str) -> dict[str, Handler]:
    return {name if "." in name else f"{name}.default": handler for name in names}


MOVING: dict[str, Handler] = {
    **_named(_expand, "expand", "expand_as", "broadcast_to", "unsafe_expand"),
    **_named(_unsqueeze, "unsqueeze"),
    **_named(_permute, "permute"),
    **_named(_transpose, "transpose.int", "t", "swapaxes", "swapdims", "mT", "numpy_T"),
    **_named(_slice, "slice.Tensor"),
    **_named(_select, "select.int"),
    **_named(_narrow, "narrow"),
    **_named(_cat, "cat", "concat", "concatenate"),
    **_named(_stack, "stack"),
    **_named(_flip, "flip"),
    **_named(_repeat, "repeat"),
    **_named(_repeat_interleave, "repeat_interleave.self_int"),
    **_named(_view, "view", "reshape", "_unsafe_view", "view_as", "flatten.using_ints", "unflatten.int", "reshape_as"),
    **_named(_squeeze, "squeeze", "squeeze.dim", "squeeze.dims"),
    **_named(_index, "index.Tensor"),
    **_named(_index_select, "index_select"),
    **_named(_pad, "pad", "constant_pad_nd"),
    "getitem": _getitem,
}
