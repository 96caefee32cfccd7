"""A recipe from the table of heads: those that a measure ranks highest are kept, all others are given a mechanism.

Heads that share keys stay together: a group counts as much as the largest of its heads (RazorAttention).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..recipe import KEEP, Choice, Recipe, Rule, Split
from ..recipe_load import load_recipe
from ..refusal import Refused
from ..selectors import selector
from ..site import Site
from ..steps import vocabulary
from .table import HeadTable

Group = tuple[str, int]  # a site's path and the number of a key head


def plan(table: HeadTable, keep: Mapping[str, float], attention: str | Mapping[str, Any] = "window") -> Recipe:
    """The recipe that gives `attention` to every group of heads outside the kept ones.

    keep  measure: the share of the whole model's groups that it keeps, those with its largest values; with a minus
          before its name, the smallest. What any measure keeps is kept.
    """
    kept = {group for measure, share in keep.items() for group in best(table, measure, share)}
    wish = _wish(attention)
    rules = [rule for site in table.sites for rule in _rule(site, {k for p, k in kept if p == site.path}, wish)]
    if not rules:
        raise Refused("every head is kept", where="plan", fits="a smaller share")
    return load_recipe(Recipe(rules=tuple(rules)), vocabulary())


def best(table: HeadTable, measure: str, share: float) -> set[Group]:
    """The groups that a measure puts first: a share of all that it knows, rounded; ties in order of the model."""
    name = measure.removeprefix("-")
    table.knows(name)
    if not 0 <= share <= 1:
        raise Refused(f"{measure}={share}", where="plan", fits="a share of the heads, 0 to 1")
    sign = 1 if measure.startswith("-") else -1
    values = _groups(table, name)
    order = sorted(values, key=lambda group: sign * values[group])
    return set(order[: math.floor(share * len(values) + 0.5)])


def _groups(table: HeadTable, measure: str) -> dict[Group, float]:
    found: dict[Group, float] = {}
    for head in table:
        value = head.values[measure]
        if value is not None:
            group = (head.site, head.kv_head)
            found[group] = max(found.get(group, -math.inf), value)
    if not found:
        raise Refused(f"measure {measure!r} is defined at no head", where="plan", fits=", ".join(table.measures))
    return found


def _wish(attention: str | Mapping[str, Any]) -> Choice:
    written = {"version": 1, "sites": [{"match": "*", "attention": attention}]}
    (rule,) = load_recipe(written, vocabulary()).rules
    ((_, wish),) = rule.decides
    if not isinstance(wish, Choice):
        raise Refused(f"attention {wish}", where="plan", fits="one mechanism")
    return wish


def _rule(site: Site, kept: set[int], wish: Choice) -> list[Rule]:
    share = site.heads // site.kv_heads
    others = [h for h in range(site.heads) if h // share not in kept]
    if not others:
        return []
    decides: Choice | Split = wish
    if len(others) < site.heads:
        decides = Split(((spans(others), wish), ("rest", KEEP)))
    return [Rule(selector({"path": site.path} if site.path else {"index": site.index}), (("attention", decides),))]


def spans(numbers: Sequence[int]) -> str:
    """Head numbers as a recipe writes them.

    >>> spans([0, 1, 2, 5, 7, 8])
    '0-2,5,7-8'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
