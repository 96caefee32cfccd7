"""What was found in several models, as a table: a row a model, a column a kind of group, what each allows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .groups import ACTIONS, KINDS, Group


def group_table(found: Mapping[str, Iterable[Group]]) -> str:
    """Markdown; "2x keys: scale" are two groups of a kind that allow the same, `-` is a kind that was not found."""
    lines = [f"| model | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    for name, groups in found.items():
        known = tuple(groups)
        cells = [_cell([g for g in known if g.kind == kind]) for kind in KINDS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(groups: list[Group]) -> str:
    allowed: dict[tuple[str, ...], int] = {}
    for one in groups:
        allowed[one.allows] = allowed.get(one.allows, 0) + 1
    return "; ".join(f"{count}x {_shown(actions)}" for actions, count in allowed.items()) or "-"


def _shown(actions: tuple[str, ...]) -> str:
    return "any" if actions == ACTIONS else ", ".join(actions) or "none"
