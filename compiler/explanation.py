"""What was found in a model before anything is changed: sites, masks and ports, and near misses with the reason."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .cost import Cost
from .masks import MaskVerdict
from .primitives.attend_spec import AttendSpec
from .refusal import Refused
from .showing import looking, page
from .site import Site


@dataclass(frozen=True)
class Explanation:
    """Prints as a list of sites; `text(path)` says everything about one."""

    sites: tuple[Site, ...]
    misses: tuple[str, ...] = ()
    masks: tuple[MaskVerdict, ...] = ()
    specs: tuple[str, ...] = ()
    costs: tuple[Cost, ...] = ()
    fits: tuple[tuple[str, ...], ...] = ()
    analyses: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()

    def brief(self) -> str:
        lines = [f"{len(self.sites)} sites", *(f"  {site}" for site in self.sites)]
        if self.misses:
            lines += ["not raised", *(f"  {miss}" for miss in self.misses)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def text(self, path: str = "") -> str:
        chosen = [k for k, site in enumerate(self.sites) if path in ("", site.path)]
        if path and not chosen:
            raise Refused(f"site {path!r}", fits=", ".join(s.path for s in self.sites) or "this model has none")
        lines: list[str] = []
        for k in chosen:
            lines += [str(self.sites[k]), *(f"    {name:<10}{value}" for name, value in self._facts(k)), ""]
        lines += [f"not raised: {miss}" for miss in self.misses]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)]).rstrip()

    __str__ = brief

    def _facts(self, k: int) -> Sequence[tuple[str, str]]:
        site, spec = self.sites[k], AttendSpec.of(self.specs[k])
        verdict = self.masks[k] if k < len(self.masks) else None
        facts = [
            ("score", spec.score),
            ("keeps", spec.keep or "everything"),
            ("mask", f"{verdict.proof}" + (f": {verdict.reason}" if verdict.reason else "") if verdict else ""),
            ("sizes", f"N={site.queries} M={site.keys}" + (f" grid={site.grid}" if site.grid else "")),
            ("ports", ", ".join(site.ports)),
            ("weights", ", ".join(f"{role}={name}" for role, name in site.weights)),
            ("cost", str(self.costs[k])),
            ("fits", ", ".join(self.fits[k])),
            ("counted", "; ".join(self.analyses[k]) if k < len(self.analyses) else ""),
        ]
        return [(name, value) for name, value in facts if value]

    def to_dict(self) -> dict[str, Any]:
        return {
            "sites": [
                json.loads(site.to_json()) | dict(self._facts(k)) for k, site in enumerate(self.sites)
            ],
            "misses": list(self.misses),
            "notes": list(self.notes),
        }  # fmt: skip

    def fitting(self, k: int) -> Sequence[tuple[str, str]]:
        """What is said of a site beside its own facts: mask, cost, what fits."""
        wanted = ("mask", "cost", "fits", "counted")
        return [(name, value) for name, value in self._facts(k) if name in wanted]

    def _repr_html_(self) -> str:
        return page.part(looking.view_of_sites(self))


def together(parts: Iterable[Explanation], *, misses: Sequence[str] = (), notes: Sequence[str] = ()) -> Explanation:
    """One explanation of a model that was captured in parts; sites are counted through.

    misses, notes   what is said of the parts beside these.
    """
    every = tuple(parts)
    sites = tuple(replace(site, index=k) for k, site in enumerate(site for part in every for site in part.sites))
    return Explanation(
        sites=sites,
        misses=(*(m for part in every for m in part.misses), *misses),
        masks=tuple(m for part in every for m in part.masks),
        specs=tuple(s for part in every for s in part.specs),
        costs=tuple(c for part in every for c in part.costs),
        fits=tuple(f for part in every for f in part.fits),
        analyses=tuple(a for part in every for a in part.analyses),
        notes=tuple(dict.fromkeys([*notes, *(n for part in every for n in part.notes)])),
    )
