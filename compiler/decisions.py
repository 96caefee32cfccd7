"""What a recipe decides at each site: the first matching rule per key; no match leaves a site alone.

A rule that decides nothing becomes a warning that names its file and line and says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .positions import Position, SiteLike, positions
from .recipe import KEEP, Recipe, Rule, Split, Wish
from .refusal import Refused
from .selectors import selector
from .vocabulary import SITE_KEYS


@dataclass(frozen=True)
class Decided:
    """One key at one site: what is wished, what may be dropped for it, and the rule that says so."""

    key: str
    wish: Wish
    drop: frozenset[str]
    where: str
    refused: str = ""  # why a split cannot stand here


@dataclass(frozen=True)
class Decision:
    """All that is decided at one site."""

    path: str
    layer: int | None
    decided: tuple[Decided, ...]

    def of(self, key: str) -> Decided | None:
        return next((one for one in self.decided if one.key == key), None)

    @property
    def changes(self) -> bool:
        return any(one.wish != KEEP for one in self.decided)


@dataclass(frozen=True)
class Decisions:
    """The decisions in the order of the sites, and what should be said about them."""

    sites: tuple[Decision, ...]
    warnings: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, path: str) -> Decision:
        found = next((one for one in self.sites if one.path == path), None)
        if found is None:
            raise Refused(f"site {path!r}", fits=f"sites: {', '.join(one.path for one in self.sites[:8]) or 'none'}")
        return found

    @property
    def changes(self) -> bool:
        """Whether any site is to change."""
        return any(one.changes for one in self.sites)

    @property
    def refusals(self) -> tuple[Refused, ...]:
        """What was asked of a site that cannot stand there."""
        return tuple(
            Refused(one.refused, where=f"{site.path} ({one.where})")
            for site in self.sites
            for one in site.decided
            if one.refused
        )

    def __str__(self) -> str:
        """A table: a line a site, a column a key that is decided anywhere, the rules at the end; then the warnings."""
        keys = [key for key in SITE_KEYS if any(site.of(key) for site in self.sites)]
        rows = [["site", "layer", *keys, "rule"]]
        for site in self.sites:
            rules = ", ".join(dict.fromkeys(one.where for one in site.decided if one.where))
            rows.append([site.path, _shown(site.layer), *(_wish(site.of(key)) for key in keys), rules or "-"])
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def decide(recipe: Recipe, sites: Sequence[SiteLike]) -> Decisions:
    """What each site becomes by a recipe."""
    places = positions(sites)
    used: set[int] = set()
    found = []
    for site, place in zip(sites, places):
        matching = [n for n, rule in enumerate(recipe.rules) if rule.match.matches(site, place)]
        decided = []
        for key in SITE_KEYS:
            n = next((n for n in matching if key in dict(recipe.rules[n].decides)), None)
            if n is not None:
                used.add(n)
                decided.append(_decided(key, recipe.rules[n], site))
        found.append(Decision(site.path, place.layer, tuple(decided)))
    idle = [_idle(recipe, n, sites, places) for n in range(len(recipe.rules)) if n not in used]
    empty = [f"{recipe.source or 'recipe'}: empty, nothing is asked"] if recipe.empty else []
    return Decisions(tuple(found), (*empty, *idle))


def _decided(key: str, rule: Rule, site: SiteLike) -> Decided:
    wish = dict(rule.decides)[key]
    refused = ""
    if isinstance(wish, Split):
        try:
            wish.over(site.heads, site.kv_heads)
        except Refused as refusal:
            refused = str(refusal)
    return Decided(key, wish, rule.drop, rule.where, refused)


def _idle(recipe: Recipe, n: int, sites: Sequence[SiteLike], places: Sequence[Position]) -> str:
    """Why a rule decides nothing: nothing matches, or earlier rules took it all."""
    rule = recipe.rules[n]
    mine = [(site, place) for site, place in zip(sites, places) if rule.match.matches(site, place)]
    if mine:
        keys = {key for key, _ in rule.decides}
        earlier = [
            other.where or f"rule {m}"
            for m, other in enumerate(recipe.rules[:n])
            if keys & {key for key, _ in other.decides} and any(other.match.matches(*one) for one in mine)
        ]
        return f"{rule.where}: decides nothing: its {len(mine)} sites are taken by {', '.join(earlier)}"
    return f"{rule.where}: decides nothing: {_unmatched(rule, sites, places)}"


def _unmatched(rule: Rule, sites: Sequence[SiteLike], places: Sequence[Position]) -> str:
    if not sites:
        return "the model has no sites"
    alone = [
        (key, values)
        for key, values in rule.match.conditions
        if all(selector({key: list(values)}).misses(site, place) for site, place in zip(sites, places))
    ]
    if not alone:
        return f"no site meets all of {rule.match}"
    key, values = alone[0]
    what = {"has": "has", "without": "is without"}.get(key, f"has {key}")
    return f"no site {what} {' or '.join(values)} ({_there_is(key, values, sites, places)})"


def _there_is(key: str, values: Sequence[str], sites: Sequence[SiteLike], places: Sequence[Position]) -> str:
    """What the sites have instead."""
    if key in ("layer", "stage", "index"):
        numbers = sorted({number for place in places if (number := place.of(key)[0]) is not None})
        return f"there are {numbers[0]} to {numbers[-1]}" if numbers else f"no path here tells a {key}"
    if key == "path":
        deeper = [value.replace("**", "*").replace("*", "**") for value in values]
        if any(selector({"path": one}).matches(site, place) for one in deeper for site, place in zip(sites, places)):
            return f"`*` stays within a segment: {deeper[0]}"
        return f"paths are like {sites[0].path}"
    if key == "part":
        return f"paths are like {sites[0].path}"
    if key in ("has", "without"):
        return f"features here: {', '.join(sorted(set().union(*(site.features for site in sites)))) or 'none'}"
    there: list[Any] = [site.pattern if key == "kind" else getattr(site, key) for site in sites]
    return f"there are {', '.join(map(str, sorted(set(there))[:8]))}"


def _wish(one: Decided | None) -> str:
    if one is None:
        return "-"
    drop = f" drop {'+'.join(sorted(one.drop))}" if one.drop else ""
    return f"{one.wish}{drop}" + (" REFUSED" if one.refused else "")


def _shown(number: int | None) -> str:
    return "-" if number is None else str(number)
