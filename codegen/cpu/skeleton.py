"""A loop skeleton with what a spec says put in front of it: the text that becomes a library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import resources

from ...compiler.symbols import Expr
from .printer import Row, cpp


def skeleton(*names: str, said: Sequence[str], halves: str = "") -> str:
    """Vectors and their functions, then what is said, then the loops. `halves`: tensors of bfloat16; their products by
    the processor's "units", by loops that stand in for them ("emulated"), a few at a time ("dots"), or in float32
    ("vectors").
    """
    chosen = ["#define HALVES"] if halves else []
    chosen += [f"#define {halves.upper()}"] if halves in ("emulated", "dots") else []
    products = {"units": ["units.hpp"], "emulated": ["units.hpp"], "dots": ["dots.hpp"]}.get(halves, [])
    parts = [*chosen, *map(_text, ("lanes.hpp", "lookups.hpp", *products))]
    return "\n".join([*parts, *said, *map(_text, names)])


@lru_cache(maxsize=16)
def _text(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def function(signature: str, e: Expr, kind: str, tables: str = "") -> str:
    """One expression as a function of the skeleton's."""
    return f"INLINE {signature} {{ return {cpp(e, kind, tables)}; }}"


def of_a_row(
    name: str,
    functions: Mapping[str, tuple[Expr, str]],
    tables: str,
    *more: str,
    steps: Mapping[str, Sequence[Callable[[Row], str]]] | None = None,
) -> str:
    """A struct made for a row (b, h, i) and the keys of a tile: functions by signature, of j, a key's position, and n,
    its number in the tile; what the row decides is computed once, what is looked up along the keys lies in lines.
    `steps`: functions that are statements.
    """
    row = Row()
    said = [
        f"    MEMBER {signature} const {{ return {cpp(e, kind, tables, row)}; }}"
        for signature, (e, kind) in functions.items()
    ]
    said += [
        f"    MEMBER {signature} const {{ {' '.join(step(row) for step in own)} }}"
        for signature, own in (steps or {}).items()
    ]
    members = {f"c{n}": made for n, made in enumerate(row.once.items())}
    for n, (line, kind) in enumerate(row.lines.items()):
        places = f"[=](int32_t j) {{ return {line.one}; }}, [=](vi j) {{ return {line.several}; }}"
        way = "true" if line.one_way else "false"
        members[f"l{n}"] = f"looked_up<{way}>({line.table}, keys, {n}, {places})", kind
    given = ["b(b)", "h(h)", "i(i)", "t(t)"]
    return "\n".join(
        [
            f"struct {name} {{",
            f"    static constexpr int LINES = {len(row.lines)};",
            "    const int b, h, i;",
            "    const Table* t;",
            *(f"    {kind} {member};" for member, (_, kind) in members.items()),
            f"    MEMBER {name.partition('<')[0]}(int b, int h, int i, const Table* t, const Keys& keys = {{}})",
            f"        : {', '.join([*given, *(f'{member}({text})' for member, (text, _) in members.items())])} {{}}",
            *said,
            *(f"    {line}" for line in more),
            "};",
        ]
    )
