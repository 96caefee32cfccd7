"""The numeric check: the mask that the graph computes and the one that was read, on the same sizes and random data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped, unused-ignore]
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from ..primitives.attend_spec import FAINT, AttendSpec
from ..symbol_eval import evaluate
from ..symbols import Expr
from .aliases import shares_memory
from .frame import formula
from .reading import attribute, backward_slice

LOW = FAINT / 2  # a logit below this has no weight
ELEMENTS = 1 << 22  # compared at a time
EXAMPLE = 1 << 18  # elements of a mask at which the example's own sizes are given up for smaller ones
ENOUGH = 2  # sizes at which the comparison must have been possible
LOOKS = 3  # sizes at which it is made
STYLES = ("right padding", "left padding", "random", "packed")


class Unknown(Exception):
    """Why a mask cannot be computed here."""


@dataclass(frozen=True)
class Sizes:
    """Values for the graph's symbolic sizes."""

    values: tuple[tuple[sympy.Symbol, int], ...]

    def of(self, size: Any) -> int:
        if isinstance(size, fx.Node):
            size = size.meta["val"]
        value = formula(size).subs(dict(self.values))
        if not value.is_Integer:
            raise Unknown(f"size {size} is not known")
        return int(value)

    def shape(self, value: Tensor) -> tuple[int, ...]:
        return tuple(self.of(s) for s in value.shape)


def choose_sizes(values: Iterable[Any], mask: Sequence[Any], beyond: int = 0) -> list[Sizes]:
    """The example's sizes and others; small ones instead where the example is large, a large one to see `beyond`.

    Equal sizes of the example stay equal. A size that is the sum of two others (past + new) may have to stay that:
    there are choices that keep sums and choices that do not; those that the graph cannot compute are passed over.
    """
    hints = _hints(values)
    if not hints:
        return [Sizes(())]
    example = Sizes(tuple(hints.items()))
    fits = math.prod(example.of(s) for s in mask) <= EXAMPLE
    ways = [_grown(hints, 3, 2, sums=True), _grown(hints, 4, 3, sums=False), _grown(hints, 2, 5, sums=True)]
    if beyond > max(hints.values()) or (beyond and not fits):
        ways.append(_grown(hints, beyond, 3, sums=True))
    return list(dict.fromkeys(([example] if fits else []) + ways))


def _grown(hints: Mapping[sympy.Symbol, int], start: int, step: int, *, sums: bool) -> Sizes:
    """New sizes in the order of the example's, with its sums of two sizes if asked for."""
    to: dict[int, int] = {}
    for hint in sorted(set(hints.values())):
        parts = [(a, hint - a) for a in to if hint - a in to and 2 * a != hint] if sums else []
        to[hint] = to[parts[-1][0]] + to[parts[-1][1]] if parts else max([start, *(v + step for v in to.values())])
    return Sizes(tuple((symbol, to[hint]) for symbol, hint in hints.items()))


def _hints(values: Iterable[Any]) -> dict[sympy.Symbol, int]:
    """Every symbol with its size in the example."""
    found: dict[sympy.Symbol, int] = {}
    for value in values:
        sizes = value.shape if isinstance(value, Tensor) else (value,)
        for size in sizes:
            if not isinstance(size, torch.SymInt):
                continue
            known = size.node.shape_env.backed_var_to_val if hasattr(size.node.shape_env, "backed_var_to_val") else \
                size.node.shape_env.var_to_val  # fmt: skip
            for symbol in size.node.expr.free_symbols:
                found[symbol] = int(known.get(symbol, 4))
    return {s: found[s] for s in sorted(found, key=str)}


def compute(
    wanted: Sequence[fx.Node], sizes: Sizes, known: dict[fx.Node, Any], graph_module: fx.GraphModule, style: int
) -> list[Any]:
    """The values of nodes at these sizes, operators run in the graph's order; inputs are made up in the given style."""
    for n in needed(wanted, known):
        value = n.meta.get("val")
        if n in known:
            continue
        if isinstance(value, int | torch.SymInt):
            known[n] = sizes.of(value)
        elif n.op == "placeholder" and isinstance(value, Tensor):
            known[n] = invent(value, sizes, style)
        elif n.op == "get_attr":
            known[n] = _attribute(n, graph_module, sizes, style)
        elif n.op == "call_function":
            known[n] = _call(n, known)
        else:
            raise Unknown(f"{n.op} {n.target}")
    return [known[n] for n in wanted]


def needed(wanted: Sequence[fx.Node], known: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """What the wanted nodes are computed from, and what writes into any of that, in the graph's order."""
    seen: set[fx.Node] = set()
    todo = list(wanted)
    while todo:
        n = todo.pop()
        if n in seen:
            continue
        seen.add(n)
        if n in known or isinstance(n.meta.get("val"), int | torch.SymInt):
            continue
        todo.extend(n.all_input_nodes)
        todo.extend(u for u in n.users if shares_memory(u, n))  # a view of it, or an operator that writes into it
    return sorted(seen)


def _call(n: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
    given: Any = fx.map_arg((n.args, n.kwargs), lambda a: known[a])
    args, kwargs = given
    args, kwargs = _on_cpu(args), _on_cpu(kwargs)
    try:
        target: Any = n.target
        return target(*args, **kwargs)
    except (RuntimeError, IndexError, ValueError) as error:
        raise Unknown(f"{n.name}: {error}") from None


def _on_cpu(given: Any) -> Any:
    """Masks are compared on the CPU, whatever device the graph was captured for (weights without memory among them)."""
    if isinstance(given, torch.device):
        return torch.device("cpu")
    if isinstance(given, dict):
        return {name: _on_cpu(value) for name, value in given.items()}
    return tuple(_on_cpu(value) for value in given) if isinstance(given, tuple) else given


def _attribute(n: fx.Node, graph_module: fx.GraphModule, sizes: Sizes, style: int) -> Any:
    tensor = attribute(graph_module, str(n.target))
    if isinstance(tensor, torch.nn.Parameter):
        return invent(n.meta["val"], sizes, style)
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        raise Unknown(f"the values of {n.target} are not known here")
    return tensor.detach().cpu()


def invent(value: Tensor, sizes: Sizes, style: int) -> Tensor:
    """Data in the shape of an input: random numbers; whole ones like a padding mask, document ids or positions."""
    shape = sizes.shape(value)
    random = torch.Generator().manual_seed(17 * style + len(shape))
    if value.dtype.is_floating_point:
        return torch.randn(shape, generator=random).to(value.dtype)
    if value.dtype.is_complex:
        raise Unknown("complex data")
    length = shape[-1] if shape else 1
    lead = shape[:-1]
    count = torch.arange(length).expand(*lead, length)
    cut = torch.randint(1, length + 1, (*lead, 1), generator=random)
    match STYLES[style % len(STYLES)]:
        case "right padding":
            made = (count < cut).long()
        case "left padding":
            made = (count >= length - cut).long()
        case "random":
            made = torch.randint(0, 3, (*lead, length), generator=random)
        case _:
            made = torch.where(count < cut, count, count - cut)
            if value.dtype == torch.bool:
                made = torch.randint(0, 2, (*lead, length), generator=random)
    return made.reshape(shape).to(value.dtype)


def spec_exprs(spec: AttendSpec) -> tuple[Expr, ...]:
    """What may look a mask up: predicate and score, also that of rows that keep nothing."""
    return (spec.keep_expr, spec.score_expr, *((spec.empty_expr,) if spec.empty_expr is not None else ()))


@dataclass(frozen=True)
class Side:
    """A spec with the nodes that its tables stand for."""

    spec: AttendSpec
    tables: tuple[tuple[str, fx.Node], ...]

    @property
    def exprs(self) -> tuple[Expr, ...]:
        return spec_exprs(self.spec)

    @property
    def used(self) -> set[str]:
        return {e.args[0] for x in self.exprs for e in x.walk() if e.op == "lookup"}


def disagreement(
    old: Side, new: Side, cut: Iterable[fx.Node], q: fx.Node, k: fx.Node, graph_module: fx.GraphModule, beyond: int = 0
) -> tuple[str, tuple[str, ...]]:
    """Where the two differ ("" if nowhere), and the sizes that were looked at."""
    cut = list(cut)
    qv, kv = q.meta["val"], k.meta["val"]
    before = [n for name, n in old.tables if name in old.used]
    values = [n.meta.get("val") for n in backward_slice(before)] + [qv, kv]
    all_sizes = choose_sizes(values, (qv.shape[0], qv.shape[2], kv.shape[2]), beyond)
    checked: list[str] = []
    failure = ""
    for sizes in all_sizes:
        batch, heads, n = (sizes.of(s) for s in qv.shape[:3])
        m = sizes.of(kv.shape[2])
        names = {x for e in (*old.exprs, *new.exprs) for x in e.names}
        grid = (batch if "b" in names else 1, heads if "h" in names else 1, n, m)
        styles = range(len(STYLES)) if math.prod(grid) <= ELEMENTS and cut else range(1)
        ran = False
        for style in styles:
            try:
                found = _differs(old, new, cut, grid, sizes, graph_module, style)
            except Unknown as unknown:
                failure = str(unknown)
                continue
            ran = True
            if found:
                return f"{found} at B={grid[0]} N={n} M={m}, {STYLES[style]}", tuple(checked)
        if ran:
            checked.append(f"B={batch} N={n} M={m}")
        if len(checked) == LOOKS and not beyond:
            break
    if len(checked) < min(len(all_sizes), ENOUGH):
        return f"it cannot be computed here: {failure}", tuple(checked)
    return "", tuple(dict.fromkeys(checked))


def _differs(
    old: Side, new: Side, cut: Sequence[fx.Node], grid: tuple[int, ...], sizes: Sizes, gm: fx.GraphModule, style: int
) -> str:
    known: dict[fx.Node, Any] = {n: invent(n.meta["val"], sizes, style) for n in cut}
    sides = [[(name, n) for name, n in side.tables if name in side.used] for side in (old, new)]
    values = compute([n for side in sides for _, n in side], sizes, known, gm, style)
    before = {name: value for (name, _), value in zip(sides[0], values, strict=False)}
    after = {name: value for (name, _), value in zip(sides[1], values[len(sides[0]) :], strict=True)}
    batch, heads, n, m = grid
    rows = max(1, ELEMENTS // max(1, batch * heads * m))
    for start in range(0, n, rows):
        block = torch.arange(start, min(n, start + rows))
        products = torch.randn(batch, heads, len(block), m, generator=torch.Generator().manual_seed(start))
        (a, fill_a), (b, fill_b) = (
            _logits(spec, tables, products, block, grid) for spec, tables in ((old.spec, before), (new.spec, after))
        )
        if not torch.equal(a == -math.inf, b == -math.inf):
            return f"{int(((a == -math.inf) != (b == -math.inf)).sum())} positions differ"
        kept = a != -math.inf
        if not torch.allclose(a[kept], b[kept], rtol=2e-6, atol=2e-6):
            return f"scores differ by {float((a[kept] - b[kept]).abs().max()):.2g}"
        if not torch.allclose(_weights(fill_a), _weights(fill_b), rtol=1e-5, atol=1e-6):
            return "queries that keep no key differ"
    return ""


def _weights(fill: Tensor) -> Tensor:
    """What a softmax makes of rows, 0 where all is minus infinity."""
    return torch.nan_to_num(fill.softmax(-1), nan=0.0)


def _logits(
    spec: AttendSpec, tables: dict[str, Tensor], products: Tensor, rows: Tensor, grid: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """The logits, minus infinity where they have no weight; and the scores of the rows in which none has."""
    batch, heads, n, m = grid
    names = {
        "b": torch.arange(batch).view(-1, 1, 1, 1),
        "h": torch.arange(heads).view(1, -1, 1, 1),
        "i": (rows + (m - n if spec.align == "end" else 0)).view(1, 1, -1, 1),
        "j": torch.arange(m).view(1, 1, 1, -1),
        "N": n,
        "M": m,
        "s": products,
    }
    score = evaluate(spec.score_expr, names, tables)
    keep = evaluate(spec.keep_expr, names, tables) if spec.keep else torch.tensor(True)
    keep = keep if keep.dtype == torch.bool else keep != 0
    score = torch.where(keep, score.to(torch.float32), -math.inf).expand(products.shape)
    logits = torch.where(score > LOW, score, -math.inf)
    none = (logits == -math.inf).all(-1)
    if spec.empty_expr is not None:
        score = evaluate(spec.empty_expr, names, tables).to(torch.float32).expand(products.shape)
    return logits, score[none]
