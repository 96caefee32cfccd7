"""The view as Markdown: verdict, table, what is next; names from outside stay text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..cost import human
from .view import Layer, Pair, View

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!&$])")


def document(view: View) -> str:
    """One page."""
    lines = [f"# {_plain(view.title)}", "", f"**{_plain(view.verdict)}**", ""]
    lines += [f"- {_plain(name)}: {_plain(value)}" for name, value in view.facts]
    if view.layers:
        lines += ["", *_table(("site", "what stands there", "deviation, measured", "FLOPs, predicted",
                               "KV bytes, predicted", "reason"), [_cells(x) for x in view.layers])]  # fmt: skip
    for title, entries in (("what to do next", view.next), *view.lists):
        lines += ["", f"## {_plain(title[0].upper() + title[1:])}", "", *(f"- {_plain(e)}" for e in entries)]
    if view.rules:
        rows = [(_plain(r.text), _plain(r.where), ", ".join(map(_plain, r.sites)) or "none") for r in view.rules]
        lines += ["", "## Recipe", "", *_table(("rule", "where", "sites"), rows)]
    return "\n".join(lines) + "\n"


def _cells(x: Layer) -> tuple[str, ...]:
    said = f"{x.mechanism} ({x.kind})" if x.kind else x.mechanism or x.status
    deviation = f"{x.deviation:.2g}" if x.deviation is not None else ""
    return (_plain(x.path), _plain(said), deviation, _pair(x.work), _pair(x.kv), _plain(x.reason))


def _pair(pair: Pair | None) -> str:
    if pair is None:
        return ""
    before, after = human(pair.before).strip(), human(pair.after).strip()
    return before if before == after else f"{before} → {after}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _plain(text: str) -> str:
    """Nothing in it is markup, and a line is a line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
