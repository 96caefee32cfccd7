"""Index predicates and score functions as expressions: ordinary Python functions, run once on symbols.

`keep = lambda i, j: (j <= i) & (i - j < 1024)` run on the names `i` and `j` gives an `Expr`; its text is canonical, so
two spellings of one mask are one mask:

>>> i, j = name("i"), name("j")
>>> (i - j >= 0) & (i - j < 1024)
(i <= j + 1023) & (j <= i)
>>> (j < i + 1) & (i - 1024 < j)
(i <= j + 1023) & (j <= i)

Why a tree of our own and not sympy's: `doc[i] == doc[j]` must be an expression (sympy compares structure and answers
False), the printed order must not depend on a library's version, and `exp(a - b)` must never be expanded.
`symbol_math.to_sympy` hands an expression over where algebra is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from .refusal import Refused
from .symbol_print import printed

INDEX_NAMES = ("b", "h", "i", "j")  # batch, head, logical query position, logical key position
SIZE_NAMES = ("N", "M")  # number of queries, number of keys
CORNER_NAMES = ("i0", "i1", "j0", "j1")  # first and last query and key of a box of them
VALUE_NAMES = ("s", "w")  # score, weight
INTEGER_NAMES = frozenset(INDEX_NAMES + SIZE_NAMES + CORNER_NAMES)
FUNCTIONS: dict[str, Callable[..., Any]] = {  # what may be called in an expression, with its meaning on tensors
    "exp": torch.exp,
    "exp2": torch.exp2,
    "log": torch.log,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": torch.nn.functional.softplus,
    "relu": torch.relu,
    "elu": torch.nn.functional.elu,
    "sqrt": torch.sqrt,
    "floor": torch.floor,
    "sin": torch.sin,
    "cos": torch.cos,
    "abs": torch.abs,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "where": torch.where,
}
_DEFAULTS = {"alpha": 1.0, "inplace": False, "beta": 1, "threshold": 20, "rounding_mode": None}  # of torch's functions
COMPARE = {"le": "<=", "lt": "<", "eq": "==", "ne": "!="}
BOOLEAN = frozenset({"and", "or", "not", *COMPARE})


class Table:
    """A tensor that an expression looks up: `bias[h, i - j]`, `doc[b, i] == doc[b, j]`; indices are clamped."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __getitem__(self, index: Any) -> Expr:
        parts = index if isinstance(index, tuple) else (index,)
        if len(parts) != self.tensor.ndim:
            raise Refused(f"a table of {self.tensor.ndim} dimensions looked up with {len(parts)} indices")
        found = Expr("lookup", (self, *[as_expr(part) for part in parts]))
        if READING:
            found._text = f"table{self._number(READING[-1])}[{', '.join([a.text for a in found.args[1:]])}]"
        return found

    def _number(self, seen: list[Table]) -> int:
        """Its place among the tables of the function being read: an order that is the same in every run."""
        for number, known in enumerate(seen):
            if known.tensor is self.tensor:
                return number
        seen.append(self)
        return len(seen) - 1


READING: list[list[Table]] = []  # the tables met so far by each function that is being read


class Expr:
    """One node: an operator and its operands. Equal meaning is aimed at, equal text is what counts."""

    __slots__ = ("_text", "args", "op")

    def __init__(self, op: str, args: tuple[Any, ...]) -> None:
        self.op, self.args = op, args
        self._text: str | None = None

    @property
    def text(self) -> str:
        if self._text is None:
            self._text = printed(self)
        return self._text

    @property
    def is_integer(self) -> bool:
        if self.op == "name":
            return self.args[0] in INTEGER_NAMES
        if self.op == "const":
            return isinstance(self.args[0], int) and not isinstance(self.args[0], bool)
        return self.op in ("add", "mul", "floordiv", "mod") and all(a.is_integer for a in self.args)

    @property
    def is_boolean(self) -> bool:
        return self.op in BOOLEAN or (self.op == "const" and isinstance(self.args[0], bool))

    def walk(self) -> Iterator[Expr]:
        """Every node, operands before the operator."""
        for arg in self.args:
            if isinstance(arg, Expr):
                yield from arg.walk()
        yield self

    @property
    def names(self) -> frozenset[str]:
        return frozenset(e.args[0] for e in self.walk() if e.op == "name")

    def replace(self, values: Mapping[Any, Any]) -> Expr:
        """The expression with names (or whole lookups of a named table, through a callable) put in."""
        if self.op == "name":
            word: str = self.args[0]
            return as_expr(values[word]) if word in values else self
        if self.op == "const":
            return self
        new = tuple(a.replace(values) if isinstance(a, Expr) else a for a in self.args)
        if self.op == "lookup" and callable(values.get(new[0])):
            return as_expr(values[new[0]](*new[1:]))
        return build(self.op, *new)

    def __repr__(self) -> str:
        return self.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __bool__(self) -> bool:
        if self.op == "const":
            return bool(self.args[0])
        raise Refused(
            f"the truth of `{self.text}` is not known while a predicate is read",
            fits="write `&`, `|`, `~`, where(), minimum(), maximum() instead of and, or, not, if, min, max",
        )

    def __iter__(self) -> Iterator[Expr]:
        raise Refused(f"`{self.text}` cannot be iterated")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Expr:
        called = getattr(func, "__name__", str(func))
        changed = [f"{key}={value!r}" for key, value in (kwargs or {}).items() if _DEFAULTS.get(key) != value]
        if changed:
            raise Refused(
                f"{called} with {', '.join(changed)} in an expression", fits="the plain function of its operands"
            )
        return build({"div": "truediv", "true_divide": "truediv"}.get(called, called), *args)

    def __add__(self, other: Any) -> Expr:
        return build("add", self, other)

    def __radd__(self, other: Any) -> Expr:
        return build("add", other, self)

    def __sub__(self, other: Any) -> Expr:
        return build("sub", self, other)

    def __rsub__(self, other: Any) -> Expr:
        return build("sub", other, self)

    def __mul__(self, other: Any) -> Expr:
        return build("mul", self, other)

    def __rmul__(self, other: Any) -> Expr:
        return build("mul", other, self)

    def __truediv__(self, other: Any) -> Expr:
        return build("truediv", self, other)

    def __rtruediv__(self, other: Any) -> Expr:
        return build("truediv", other, self)

    def __floordiv__(self, other: Any) -> Expr:
        return build("floordiv", self, other)

    def __mod__(self, other: Any) -> Expr:
        return build("mod", self, other)

    def __pow__(self, other: Any) -> Expr:
        return build("pow", self, other)

    def __neg__(self) -> Expr:
        return build("mul", -1, self)

    def __abs__(self) -> Expr:
        return build("abs", self)

    def __le__(self, other: Any) -> Expr:
        return build("le", self, other)

    def __lt__(self, other: Any) -> Expr:
        return build("lt", self, other)

    def __ge__(self, other: Any) -> Expr:
        return build("le", other, self)

    def __gt__(self, other: Any) -> Expr:
        return build("lt", other, self)

    def __eq__(self, other: Any) -> Expr:  # type: ignore[override]
        return build("eq", self, other)

    def __ne__(self, other: Any) -> Expr:  # type: ignore[override]
        return build("ne", self, other)

    def __and__(self, other: Any) -> Expr:
        return build("and", self, other)

    def __rand__(self, other: Any) -> Expr:
        return build("and", other, self)

    def __or__(self, other: Any) -> Expr:
        return build("or", self, other)

    def __ror__(self, other: Any) -> Expr:
        return build("or", other, self)

    def __invert__(self) -> Expr:
        return build("not", self)


def name(text: str) -> Expr:
    return Expr("name", (text,))


def const(value: float | int | bool) -> Expr:
    return Expr("const", (value,))


TRUE, FALSE = const(True), const(False)


def as_expr(value: Any) -> Expr:
    if isinstance(value, Expr):
        return value
    if isinstance(value, bool | int | float):
        return const(value)
    raise Refused(
        f"{type(value).__name__} in an expression",
        fits="numbers, the index names and tables: wrap a tensor as reattend.table(tensor) and look it up",
    )


def table(tensor: torch.Tensor) -> Table:
    """A tensor that a predicate or score looks up by index: `slope = table(m)`, then `slope[h] * (j - i)`."""
    return Table(tensor)


# --- construction: one function per operator, each gives the canonical form -------------------------------------------


def build(op: str, *args: Any) -> Expr:
    """The canonical expression for an operator; unknown operators are refused with the list of known ones."""
    operands = tuple(arg if isinstance(arg, str | Table) else as_expr(arg) for arg in args)
    make = _MAKE.get(op)
    if make is not None:
        return make(*operands)
    if op in FUNCTIONS:
        return _fold(op, operands)
    raise Refused(f"operator {op!r} in an expression", fits=f"known: {', '.join(sorted({*_MAKE, *FUNCTIONS}))}")


def _fold(op: str, operands: tuple[Any, ...]) -> Expr:
    if op != "lookup" and all(o.op == "const" for o in operands):
        whole = op in ("abs", "minimum", "maximum") and all(o.is_integer for o in operands)
        kind = torch.int64 if whole else torch.float64
        tensors = [torch.tensor(o.args[0], dtype=None if o.is_boolean else kind) for o in operands]
        return const(FUNCTIONS[op](*tensors).item())
    return Expr(op, operands)


def _value(e: Expr) -> Any:
    return e.args[0] if e.op == "const" else None


def linear(e: Expr) -> tuple[dict[str, tuple[Expr, Any]], Any]:
    """Terms with their constant coefficients, and the constant."""
    if e.op == "const":
        return {}, e.args[0]
    if e.op == "add":
        terms: dict[str, tuple[Expr, Any]] = {}
        total: Any = 0
        for arg in e.args:
            part, constant = linear(arg)
            total += constant
            for key, (term, factor) in part.items():
                terms[key] = (term, terms[key][1] + factor if key in terms else factor)
        return terms, total
    if e.op == "mul" and len(e.args) == 2 and e.args[1].op == "const":
        return {e.args[0].text: (e.args[0], e.args[1].args[0])}, 0
    return {e.text: (e, 1)}, 0


def _from_linear(terms: Mapping[str, tuple[Expr, Any]], constant: Any) -> Expr:
    parts = [_scaled(*terms[key]) for key in sorted(terms) if terms[key][1] != 0]
    if constant != 0 or not parts:
        parts.append(const(constant))
    return parts[0] if len(parts) == 1 else Expr("add", tuple(parts))


def _scaled(term: Expr, factor: Any) -> Expr:
    return term if factor == 1 and isinstance(factor, int) else Expr("mul", (term, const(factor)))


def _add(*args: Expr) -> Expr:
    return _from_linear(*linear(Expr("add", args)))


def _sub(a: Expr, b: Expr) -> Expr:
    return _add(a, _mul(b, const(-1)))


def _factors(args: tuple[Expr, ...]) -> Iterator[Expr]:
    for arg in args:
        if arg.op == "mul":
            yield from _factors(arg.args)
        else:
            yield arg


def _mul(*args: Expr) -> Expr:
    factor: Any = 1
    rest: list[Expr] = []
    for part in _factors(args):
        if part.op == "const":
            factor = factor * part.args[0]
        else:
            rest.append(part)
    if not rest or (factor == 0 and all(r.is_integer for r in rest)):
        return const(factor)
    rest.sort(key=lambda e: e.text)
    product = rest[0] if len(rest) == 1 else Expr("mul", tuple(rest))
    if product.op == "add" and product.is_integer and isinstance(factor, int):
        terms, constant = linear(product)
        return _from_linear({k: (t, f * factor) for k, (t, f) in terms.items()}, constant * factor)
    return _scaled(product, factor)


def _truediv(a: Expr, b: Expr) -> Expr:
    if a.op == b.op == "const":
        return const(a.args[0] / b.args[0])
    if b.op == "const" and math.frexp(b.args[0])[0] == 0.5:  # a power of two divides exactly
        return _mul(a, const(1.0 / b.args[0]))
    return a if _value(b) == 1 else Expr("truediv", (a, b))


def _floordiv(a: Expr, b: Expr) -> Expr:
    if a.op == b.op == "const":
        return const(a.args[0] // b.args[0])
    return a if _value(b) == 1 else Expr("floordiv", (a, b))


def _mod(a: Expr, b: Expr) -> Expr:
    if a.op == b.op == "const":
        return const(a.args[0] % b.args[0])
    return const(0) if _value(b) == 1 and a.is_integer else Expr("mod", (a, b))


def _pow(a: Expr, b: Expr) -> Expr:
    if a.op == b.op == "const":
        return const(a.args[0] ** b.args[0])
    return a if _value(b) == 1 else Expr("pow", (a, b))


def _compare(op: str, a: Expr, b: Expr) -> Expr:
    if a.op == b.op == "const":
        x, y = a.args[0], b.args[0]
        return const({"le": x <= y, "lt": x < y, "eq": x == y, "ne": x != y}[op])
    if a.text == b.text and not _may_be_nan(a):
        return const(op in ("le", "eq"))
    if op in ("le", "lt") and a.op == "abs" and a.args[0].is_integer and b.is_integer:
        return _and(_compare(op, a.args[0], b), _compare(op, _mul(a.args[0], const(-1)), b))
    if a.is_integer and b.is_integer:
        return _compare_affine(op, *linear(_sub(a, b)))
    if op in ("eq", "ne") and b.text < a.text:
        a, b = b, a
    return Expr(op, (a, b))


def _may_be_nan(e: Expr) -> bool:
    return bool(e.names & set(VALUE_NAMES))


def _compare_affine(op: str, terms: dict[str, tuple[Expr, Any]], constant: Any) -> Expr:
    """Integers: all on one side, then positive terms left, negative ones and the constant right; `<` becomes `<=`."""
    terms = {k: v for k, v in terms.items() if v[1] != 0}
    if op == "lt":
        op, constant = "le", constant + 1
    if not terms:
        return const({"le": constant <= 0, "eq": constant == 0, "ne": constant != 0}[op])
    if op in ("eq", "ne") and terms[min(terms)][1] < 0:
        terms, constant = {k: (t, -f) for k, (t, f) in terms.items()}, -constant
    left = {k: v for k, v in terms.items() if v[1] > 0}
    right = {k: (t, -f) for k, (t, f) in terms.items() if f < 0}
    if not left:
        return Expr(op, (const(constant), _from_linear(right, 0)))
    return Expr(op, (_from_linear(left, 0), _from_linear(right, -constant)))


def _and(*args: Expr) -> Expr:
    return _lattice("and", args, absorbing=False)


def _or(*args: Expr) -> Expr:
    return _lattice("or", args, absorbing=True)


def _lattice(op: str, args: tuple[Expr, ...], absorbing: bool) -> Expr:
    parts: dict[str, Expr] = {}
    for arg in args:
        for part in arg.args if arg.op == op else (arg,):
            if part.op == "const":
                if bool(part.args[0]) is absorbing:
                    return const(absorbing)
            else:
                parts[part.text] = part
    dual = "or" if op == "and" else "and"
    for text, part in list(parts.items()):  # a & (a | b) is a
        if part.op == dual and any(inner.text in parts for inner in part.args):
            del parts[text]
    if any(_not(part).text in parts for part in parts.values()):
        return const(absorbing)
    ordered = tuple([parts[key] for key in sorted(parts)])
    if not ordered:
        return const(not absorbing)
    return ordered[0] if len(ordered) == 1 else Expr(op, ordered)


def _not(a: Expr) -> Expr:
    match a.op:
        case "const":
            return const(not a.args[0])
        case "not":
            return a.args[0]
        case "le" if not _may_be_nan(a):
            return _compare("lt", a.args[1], a.args[0])
        case "lt" if not _may_be_nan(a):
            return _compare("le", a.args[1], a.args[0])
        case "eq":
            return _compare("ne", *a.args)
        case "ne":
            return _compare("eq", *a.args)
        case "and":
            return _or(*map(_not, a.args))
        case "or":
            return _and(*map(_not, a.args))
    return Expr("not", (a,))


def _where(c: Expr, a: Expr, b: Expr) -> Expr:
    if c.op == "const":
        return a if c.args[0] else b
    if a.is_boolean and b.is_boolean:
        return _or(_and(c, a), _and(_not(c), b))
    return a if a.text == b.text else Expr("where", (c, a, b))


def _minimum(a: Expr, b: Expr) -> Expr:
    return a if a.text == b.text else _fold("minimum", tuple(sorted((a, b), key=lambda e: e.text)))


def _maximum(a: Expr, b: Expr) -> Expr:
    return a if a.text == b.text else _fold("maximum", tuple(sorted((a, b), key=lambda e: e.text)))


_MAKE: dict[str, Callable[..., Expr]] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "truediv": _truediv,
    "floordiv": _floordiv,
    "mod": _mod,
    "pow": _pow,
    "le": lambda a, b: _compare("le", a, b),
    "lt": lambda a, b: _compare("lt", a, b),
    "ge": lambda a, b: _compare("le", b, a),
    "gt": lambda a, b: _compare("lt", b, a),
    "eq": lambda a, b: _compare("eq", a, b),
    "ne": lambda a, b: _compare("ne", a, b),
    "and": _and,
    "or": _or,
    "not": _not,
    "where": _where,
    "minimum": _minimum,
    "maximum": _maximum,
    "lookup": lambda *args: Expr("lookup", args),
}
