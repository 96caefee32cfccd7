"""A cascade from its text: the reverse of printing one.

>>> c = read_cascade("in A[k], B[k]; Y[] = sum[k](A * B); Z[] = sum[k](Y * A); out Z")
>>> print(c)
in   A[k], B[k]
Y[] = sum[k](A * B)
Z[] = sum[k](A * Y)
out  Z
"""

from __future__ import annotations

import re

from ..refusal import Refused
from ..symbol_text import parse
from .einsum import MONOIDS, Cascade, Node, Operand, Ranks

_TENSOR = re.compile(r"(\w+)\[([\w, ]*)\]")
_LINE = re.compile(r"(\w+)\[([\w, ]*)\]\s*=\s*(.+?)(?:\s+if\s+(.+))?$")
_REDUCED = re.compile(r"([a-z_0-9]+)\[([\w, ]+)\]\((.*)\)$")
_OPTION = re.compile(r"^(decay|init)=(.*)$")
_SCAN = re.compile(rf"(prefix|suffix)_({'|'.join(MONOIDS)})(_before)?$")


def read_cascade(text: str) -> Cascade:
    """Equations by line or semicolon; `in A[k], ...` first, `out Z, ...` last."""
    operands: tuple[Operand, ...] = ()
    nodes: list[Node] = []
    outputs: Ranks = ()
    for line in (part.strip() for part in re.split(r"[;\n]", text)):
        if line.startswith("in "):
            operands = tuple(Operand(name, _names(ranks)) for name, ranks in _TENSOR.findall(line[3:]))
        elif line.startswith("out "):
            outputs = _names(line[4:])
        elif line:
            nodes.append(_node(line))
    return Cascade(operands, tuple(nodes), outputs)


def _node(line: str) -> Node:
    found = _LINE.match(line)
    if found is None:
        raise Refused(f"equation {line!r}", where="cascade", fits="NAME[ranks] = expression, or sum[ranks](expression)")
    name, ranks, right, keep = found.groups()
    given = Node(name, _names(ranks), right, keep=parse(keep).text if keep else "")
    reduced = _REDUCED.match(right)
    if reduced is None:
        return Node(name, given.ranks, parse(right).text, keep=given.keep)
    called, over, inside = reduced.groups()
    first, options = _inside(inside)
    scan = _SCAN.match(called)
    kind = "scan" if scan else "reduce" if called in MONOIDS else "last" if called == "last" else "global"
    return Node(
        name,
        given.ranks,
        parse(first).text,
        kind,
        scan[2] if scan else "" if kind == "last" else called,
        _names(over),
        reverse=bool(scan and scan[1] == "suffix"),
        before=bool(scan and scan[3]),
        keep=given.keep,
        decay=options.get("decay", ""),
        init=options.get("init", ""),
    )


def _inside(text: str) -> tuple[str, dict[str, str]]:
    """The expression, and what is said beside it; commas inside brackets separate nothing."""
    parts, depth, current = [], 0, ""
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += letter
    parts.append(current)
    options = [_OPTION.match(part.strip()) for part in parts[1:]]
    if not all(options):
        raise Refused(f"({text})", where="cascade", fits="(expression, decay=..., init=...)")
    return parts[0], {o[1]: parse(o[2]).text for o in options if o}


def _names(text: str) -> Ranks:
    return tuple(part.strip() for part in text.split(",") if part.strip())
