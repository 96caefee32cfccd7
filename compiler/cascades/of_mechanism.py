"""Cascades of what is registered and of what models have: a forward traced and expanded, the spec of a site."""

from __future__ import annotations

from collections.abc import Sequence

from ..case import DIM, GRIDS, PLACED, Case
from ..mechanism import Mechanism
from ..nodes import op_name
from ..primitives.attend_spec import AttendSpec
from ..refusal import Refused
from ..symbol_text import parse
from ..tiles import tiles_of
from ..tracing import Fragment, Setting, trace
from .analysis import Verdict, analyse
from .attend_fragment import attend_fragment
from .building import Builder
from .expansion import PORTS, Expanded, expand
from .nest import LoopNest
from .showing import math_text

SHOWN = 4096  # tokens at which the share of visited tiles is told
TOKENS = (7, 8)  # a case without and with a grid that fills it


def cascade_of(chosen: Mechanism, *, causal: bool = False) -> Expanded:
    """What its forward computes, as equations; refused where it stands at no single place."""
    return expand(_traced(chosen, causal).graph)


def _traced(chosen: Mechanism, causal: bool) -> Fragment:
    case = _case(chosen, causal)
    place = case.place(case.tensors())
    values = dict(place.ports)
    values |= {f"table_{k}": t for k, t in enumerate(place.tables)}
    values |= {f"param_{name}": t for name, t in case.own().items()}
    return trace(chosen, Setting(place.site, place.spec), values)


def cascade_of_spec(text: str) -> Expanded:
    """What one `attend` computes, from its spec alone."""
    b = Builder()
    b.counts.update(dict.fromkeys("bhmpef", 1))
    q, k, v = (b.operand(port.upper(), tuple((r,) for r in PORTS[port])) for port in "qkv")
    spec = AttendSpec.of(text)
    tables = [b.operand("T", tuple((b.rank("x"),) for _ in range(n))) for n in _arities(spec)]
    more = [t for n in range(len(spec.more)) for t in (k, v)]
    o = attend_fragment(b, text, ((q,), (k, v, *more), tables))
    return Expanded(b.cascade(tuple(h.name for h in o)), ("m",), ("p",), {})


def _arities(spec: AttendSpec) -> list[int]:
    """The number of dimensions of t0, t1, ...: as many as they are looked up with."""
    found: dict[int, int] = {}
    texts = [spec.weight, spec.sink, spec.after, spec.leader, *(part for s in spec.segments for part in s[:2])]
    for text in filter(None, texts):
        for e in parse(text).walk():
            if e.op == "lookup":
                found[int(e.args[0][1:])] = len(e.args) - 1
    placed = {"q_positions": spec.q_positions, **{f"k{n}": s[2] for n, s in enumerate(spec.segments)}}
    for name in filter(None, placed.values()):
        found.setdefault(int(name[1:]), 1)
    for name in filter(
        None, (*spec.rows, *(r[0] for r in spec.relative), *spec.tiles[:1], spec.kv_heads, spec.group_rows)
    ):
        found.setdefault(int(str(name)[1:]), 3)
    return [found.get(n, 1) for n in range(max(found, default=-1) + 1)]


def verdict_of(found: Expanded) -> Verdict:
    return analyse(found.cascade, found.keys, found.queries)


def _case(chosen: Mechanism, causal: bool) -> Case:
    if chosen.part not in PLACED:
        raise Refused(f"{chosen.slug} is a {chosen.part}", where="cascade", fits=", ".join(PLACED))
    patterns = ("causal-self",) if causal else ("noncausal-self", "causal-self")
    cases = [
        Case(chosen, pattern, n=n, m=n, grid=grid, dim=DIM)
        for pattern in patterns
        for n, grid in ((TOKENS[0], None), (TOKENS[1], GRIDS[TOKENS[1]]))
    ]
    reasons = [(case.refused(), case) for case in cases]
    for reason, case in reasons:
        if reason is None:
            return case
    raise Refused(str(reasons[0][0]), where=f"cascade of {chosen.slug}")


def mechanism_math(chosen: Mechanism, *, causal: bool = False) -> str:
    graph = _traced(chosen, causal).graph
    specs = [str(node.args[-1]) for node in graph.graph.nodes if op_name(node) == "attend"]
    return _math(expand(graph), specs)


def spec_math(text: str) -> str:
    return _math(cascade_of_spec(text), [text])


def _math(found: Expanded, specs: Sequence[str]) -> str:
    told = [math_text(verdict_of(found), LoopNest(found.cascade, found.keys[0]))]
    return "\n".join([*told, *(line for text in specs for line in _tiles(AttendSpec.of(text)))])


def _tiles(spec: AttendSpec) -> list[str]:
    """What a kernel has to visit of a long call, where one predicate of rows and keys in their places says so."""
    if spec.tiles or spec.more or spec.q_positions or spec.k_positions or not spec.conjuncts:
        return []
    return ["tiles", f"  at {SHOWN:,} tokens, {tiles_of(spec.keep_expr, SHOWN, SHOWN)}"]
