"""What each ATen operator does to an element: given the index asked for, the expression in the operands' elements."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..raising.einsums import terms_of
from ..symbols import Expr, build, const
from .arithmetic import choose, combine, same, truth
from .casts import cast, rounded
from .frame import Unreadable
from .moving import MOVING
from .reading import Handler, Index, Operators, Reader, aligned, argument, dtype, free, is_one, shape


def operand(reader: Reader, node: Any, index: Index) -> Expr:
    """The element of an operand that broadcasts to the index."""
    return reader.at(node, aligned(node, index))


def _filled(value: Any) -> Handler:
    return lambda reader, node, index: cast(const(value), torch.int64, dtype(node))


def _full(position: int) -> Handler:
    def read(reader: Reader, node: fx.Node, index: Index) -> Expr:
        value = argument(node, position, "fill_value" if position else "s")
        return cast(reader.at(value, ()), dtype(value), dtype(node))

    return read


def _arange(start: int | None, end: int, step: int | None) -> Handler:
    def read(reader: Reader, node: fx.Node, index: Index) -> Expr:
        first = reader.frame.size(node.args[start]) if start is not None else const(0)
        by = reader.frame.size(argument(node, step, "step", 1)) if step is not None else const(1)
        return cast(index[0] * by + first, torch.int64, dtype(node))

    return read


def _cast(reader: Reader, node: fx.Node, index: Index) -> Expr:
    return cast(operand(reader, node.args[0], index), dtype(node.args[0]), dtype(node))


def _two(op: str, swap: bool = False) -> Handler:
    def read(reader: Reader, node: fx.Node, index: Index) -> Expr:
        left, right = node.args[:2]
        a, b = operand(reader, left, index), operand(reader, right, index)
        alpha = argument(node, 2, "alpha", 1) if op in ("add", "sub") else 1
        if dtype(left) == dtype(right) == dtype(node) == torch.bool and op in ("add", "mul"):
            return build("or" if op == "add" else "and", truth(a), truth(b))
        kind = torch.float32 if dtype(node).is_floating_point else torch.int64
        a, b = (_as_number(e, dtype(n), kind) for e, n in ((a, left), (b, right)))
        if swap:
            a, b = b, a
        scaled = b if isinstance(alpha, int) and alpha == 1 else combine("mul", b, reader.at(alpha, ()))
        return rounded(combine(op, a, scaled), dtype(node))

    return read


def _as_number(e: Expr, old: torch.dtype, new: torch.dtype) -> Expr:
    return cast(e, old, new) if old == torch.bool else e


def _compare(op: str) -> Handler:
    def read(reader: Reader, node: fx.Node, index: Index) -> Expr:
        left, right = node.args[:2]
        a, b = operand(reader, left, index), operand(reader, right, index)
        if dtype(left) == dtype(right) == torch.bool and op in ("eq", "ne"):
            equal = same(truth(a), truth(b))
            return equal if op == "eq" else ~equal
        a, b = (_as_number(e, dtype(n), torch.int64) for e, n in ((a, left), (b, right)))
        return truth(combine(op, a, b))

    return read


def _logical(op: str, *, bits: bool) -> Handler:
    def read(reader: Reader, node: fx.Node, index: Index) -> Expr:
        if bits and any(dtype(a) != torch.bool for a in node.args):
            raise Unreadable(f"bitwise {op} of numbers")
        parts = [truth(operand(reader, a, index)) for a in node.args]
        return ~same(*parts) if op == "xor" else build(op, *parts)

    return read


def _where(reader: Reader, node: fx.Node, index: Index) -> Expr:
    condition, a, b = (operand(reader, x, index) for x in node.args[:3])
    first, second = (cast(e, dtype(x), dtype(node)) for e, x in ((a, node.args[1]), (b, node.args[2])))
    return choose(truth(condition), first, second)


def _masked_fill(reader: Reader, node: fx.Node, index: Index) -> Expr:
    value, mask, filling = node.args[:3]
    fill = cast(reader.at(filling, ()), dtype(filling), dtype(node))
    return choose(truth(operand(reader, mask, index)), fill, operand(reader, value, index))


def _triangle(lower: bool) -> Handler:
    def read(reader: Reader, node: fx.Node, index: Index) -> Expr:
        diagonal = reader.frame.size(argument(node, 1, "diagonal", 0))
        row, column = index[-2:]
        kept = column - row <= diagonal if lower else column - row >= diagonal
        return choose(kept, reader.at(node.args[0], index), cast(const(0), torch.int64, dtype(node)))

    return read


def _negative(reader: Reader, node: fx.Node, index: Index) -> Expr:
    return combine("mul", operand(reader, node.args[0], index), const(-1))


def _absolute(reader: Reader, node: fx.Node, index: Index) -> Expr:
    e = operand(reader, node.args[0], index)
    if e.is_integer and reader.frame.space.never_negative(e):
        return e
    return build("maximum", e, combine("mul", e, const(-1)))


def _clamp(reader: Reader, node: fx.Node, index: Index) -> Expr:
    e = operand(reader, node.args[0], index)
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    if low is not None:
        e = combine("maximum", e, operand(reader, low, index))
    return e if high is None else combine("minimum", e, operand(reader, high, index))


def _divide(reader: Reader, node: fx.Node, index: Index) -> Expr:
    mode = node.kwargs.get("rounding_mode")
    a, b = (operand(reader, x, index) for x in node.args[:2])
    if mode is None and operator_is_true_division(node):
        return combine("truediv", a, b)
    space = reader.frame.space
    exact = a.is_integer or not dtype(node.args[0]).is_floating_point
    if not exact or dtype(node.args[1]).is_floating_point:
        raise Unreadable("a floored quotient of floats")
    if mode == "trunc" and not (space.never_negative(a) and space.never_negative(b)):
        raise Unreadable("a truncated quotient of what may be negative")
    return combine("floordiv", a, b)


def operator_is_true_division(node: fx.Node) -> bool:
    return "floor_divide" not in str(node.target)


def _remainder(reader: Reader, node: fx.Node, index: Index) -> Expr:
    if dtype(node).is_floating_point:
        raise Unreadable("a remainder of floats")
    return combine("mod", *(operand(reader, x, index) for x in node.args[:2]))


WHOLE = (torch.float32, torch.float64)  # which count ones without rounding as far as sequences go


def _cumsum(reader: Reader, node: fx.Node, index: Index) -> Expr:
    """Of what does not vary along the dimension: value times count."""
    axis = _axis(node, 1)
    (unknown,) = free(1, index)
    e = reader.at(node.args[0], (*index[:axis], unknown, *index[axis + 1 :]))
    counts = not dtype(node).is_floating_point or (e.op == "const" and dtype(node) in WHOLE and e.args[0] in (0, 1))
    if unknown.args[0] in e.names or not counts:
        raise Unreadable("a running sum of data")
    return combine("mul", cast(e, dtype(node.args[0]), torch.int64), index[axis] + 1)


def _axis(node: fx.Node, position: int, default: int = -1) -> int:
    rank = len(shape(node.args[0]))
    axis = argument(node, position, "dim", default)
    if not isinstance(axis, int) or rank == 0:
        raise Unreadable("a dimension that is not a number")
    return axis % rank


def _diff(reader: Reader, node: fx.Node, index: Index) -> Expr:
    axis, before = _axis(node, 2), argument(node, 3, "prepend")
    if argument(node, 1, "n", 1) != 1 or argument(node, 4, "append") is not None:
        raise Unreadable("a difference of higher order")
    source, here = node.args[0], index[axis]

    def at(what: Any, position: Expr) -> Expr:
        sizes = shape(what)
        full = (*index[:axis], position, *index[axis + 1 :])
        e = reader.at(what, tuple(const(0) if is_one(s) else x for s, x in zip(sizes, full, strict=True)))
        return _as_number(e, dtype(what), torch.int64)

    if before is None:
        return combine("sub", at(source, here + 1), at(source, here))
    if not is_one(shape(before)[axis]):
        raise Unreadable("a difference with more than one value before")
    first = combine("sub", at(source, const(0)), at(before, const(0)))
    return choose(here <= 0, first, combine("sub", at(source, here), at(source, here - 1)))


def _reduced(reader: Reader, node: fx.Node, index: Index) -> Expr:
    """all / any of something that is the same everywhere."""
    source = node.args[0]
    dims = argument(node, 1, "dim")
    rank = len(shape(source))
    axes = range(rank) if dims is None else [d % rank for d in ([dims] if isinstance(dims, int) else dims)]
    kept = [e for d, e in enumerate(index) if d not in axes] if argument(node, 2, "keepdim", False) else list(index)
    wide = [d for d in axes if not is_one(shape(source)[d])]
    unknown = dict(zip(wide, free(len(wide), tuple(kept)), strict=True))
    rest = iter(kept)
    full = (unknown.get(d, const(0)) if d in axes else next(rest) for d in range(rank))
    e = truth(reader.at(source, tuple(full)))
    if e.names & {x.args[0] for x in unknown.values()}:
        raise Unreadable("a reduction over data")
    return e


def _outer(reader: Reader, node: fx.Node, index: Index) -> Expr:
    return _times(node, [(node.args[0], index[:1]), (node.args[1], index[1:])], reader)


def _einsum(reader: Reader, node: fx.Node, index: Index) -> Expr:
    """Nothing is summed: 'bi,bj->bij' is a product of elements."""
    found = terms_of(node)
    if found is None:
        raise Unreadable("a diagonal")
    terms, out = found
    known = dict(zip(out, index, strict=True))
    for term in terms:
        known |= {x: const(0) for x, size in zip(term.labels, shape(term.node), strict=True) if is_one(size)}
    if any(label not in known for term in terms for label in term.labels):
        raise Unreadable("a sum over data")
    return _times(node, [(t.node, tuple(known[x] for x in t.labels)) for t in terms], reader)


def _matmul(reader: Reader, node: fx.Node, index: Index) -> Expr:
    """A column times a row."""
    left, right = node.args[:2]
    a, b = shape(left), shape(right)
    if len(a) < 2 or len(b) < 2 or not is_one(a[-1]):
        raise Unreadable("a sum over data")
    lead, row, column = index[:-2], index[-2], index[-1]
    places = [(*lead[len(lead) - len(a) + 2 :], row, const(0)), (*lead[len(lead) - len(b) + 2 :], const(0), column)]
    return _times(node, list(zip((left, right), places, strict=True)), reader)


def _times(node: fx.Node, elements: list[tuple[Any, Index]], reader: Reader) -> Expr:
    kind = torch.float32 if dtype(node).is_floating_point else torch.int64
    first, *rest = (_as_number(reader.at(n, place), dtype(n), kind) for n, place in elements)
    for other in rest:
        first = combine("mul", first, other)
    return first


_SCALAR_FORMS = ("Tensor", "Scalar", "default")


def _forms(names: str, handler: Handler, forms: tuple[str, ...] = _SCALAR_FORMS) -> dict[str, Handler]:
    return {f"{name}.{form}": handler for name in names.split() for form in forms}


_HANDLERS: dict[str, Handler] = {
    **MOVING,
    **_forms("to _to_copy type_as", _cast, ("dtype", "dtype_layout", "device", "other", "default")),
    **_forms("contiguous clone detach alias lift_fresh lift_fresh_copy lift detach_", _cast, ("default",)),
    **_forms("ones ones_like new_ones", _filled(1), ("default",)),
    **_forms("zeros zeros_like new_zeros", _filled(0), ("default",)),
    **_forms("full full_like", _full(1), ("default",)),
    "new_full.default": _full(2),
    "scalar_tensor.default": _full(0),
    "arange.default": _arange(None, 0, None),
    "arange.start": _arange(0, 1, None),
    "arange.start_step": _arange(0, 1, 2),
    **_forms("add", _two("add")),
    **_forms("sub subtract", _two("sub")),
    **_forms("rsub", _two("sub", swap=True)),
    **_forms("mul multiply", _two("mul")),
    **_forms("minimum", _two("minimum")),
    **_forms("maximum", _two("maximum")),
    "min.other": _two("minimum"),
    "max.other": _two("maximum"),
    **{
        key: value
        for op, names in {
            "le": "le less_equal",
            "lt": "lt less",
            "ge": "ge greater_equal",
            "gt": "gt greater",
            "eq": "eq",
            "ne": "ne not_equal",
        }.items()
        for key, value in _forms(names, _compare(op)).items()
    },
    **_forms("logical_and", _logical("and", bits=False)),
    **_forms("logical_or", _logical("or", bits=False)),
    **_forms("logical_xor", _logical("xor", bits=False)),
    **_forms("logical_not", _logical("not", bits=False)),
    **_forms("bitwise_and __and__", _logical("and", bits=True)),
    **_forms("bitwise_or __or__", _logical("or", bits=True)),
    **_forms("bitwise_xor __xor__", _logical("xor", bits=True)),
    **_forms("bitwise_not", _logical("not", bits=True)),
    **_forms("where", _where, ("self", "ScalarOther", "ScalarSelf", "Scalar")),
    **_forms("masked_fill", _masked_fill),
    **_forms("tril", _triangle(lower=True)),
    **_forms("triu", _triangle(lower=False)),
    **_forms("neg negative", _negative),
    **_forms("abs", _absolute),
    **_forms("clamp", _clamp),
    "clamp_min.default": _two("maximum"),
    "clamp_max.default": _two("minimum"),
    **_forms("div divide", _divide, ("Tensor", "Scalar", "Tensor_mode", "Scalar_mode")),
    **_forms("floor_divide", _divide),
    **_forms("remainder", _remainder),
    **_forms("outer ger", _outer, ("default",)),
    "einsum.default": _einsum,
    **_forms("matmul bmm mm", _matmul, ("default",)),
    "cumsum.default": _cumsum,
    "diff.default": _diff,
    **_forms("all", _reduced, ("default", "dim", "dims")),
    **_forms("any", _reduced, ("default", "dim", "dims")),
}

# operators through which a tensor over queries and keys is followed: they move it or join it to something else
_PASSING = frozenset(MOVING) | {
    name
    for name in _HANDLERS
    if name.split(".")[0]
    in ("where", "masked_fill", "add", "logical_and", "bitwise_and", "__and__", "logical_or", "bitwise_or", "__or__",
        "logical_not", "bitwise_not", "contiguous", "clone", "detach", "alias", "lift_fresh", "lift_fresh_copy")
}  # fmt: skip

OPERATORS = Operators(_HANDLERS, _PASSING)
