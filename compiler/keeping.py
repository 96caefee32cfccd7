"""What the layers of an optimized decoder keep for later tokens: all rows, a ring of the latest, or a scan's state.

Derived from what was put at each site; a saved model brings it along, so that it decodes without deriving it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .decode_derived import way_of
from .decode_ways import KeptKeys, ScanState, standing
from .positions import positions
from .primitives.attend_spec import AttendSpec
from .program import Change, Program
from .reach import Reach, reach
from .refusal import Refused
from .site import Site


@dataclass(frozen=True)
class Ring:
    """The first `sinks` and the last `back` keys."""

    back: int
    sinks: int = 0


@dataclass(frozen=True)
class State:
    """The state of a causal scan."""


@dataclass(frozen=True)
class Rows:
    """Every key and value."""


Keeps = Ring | State | Rows
KINDS: Mapping[str, type[Ring] | type[State]] = {"ring": Ring, "state": State}


def keeping(program: Program) -> dict[int, Ring | State]:
    """By the number of a layer, where it keeps less than all rows."""
    changes = {c.site.path: c for c in program.changes if c.mechanism.part in ("core", "region")}
    stored = {c.site.path for c in program.changes if c.mechanism.part == "cache"}
    layers: dict[int, list[Keeps]] = {}
    known: dict[Any, Keeps] = {}
    for site, place in zip(program.sites, positions(program.sites), strict=True):
        change = changes.get(site.path)
        key = (repr(change and change.mechanism), change and change.setting.signature, site.mask)
        if key not in known:
            known[key] = _of_site(site, change)
        in_bytes = site.path in stored and isinstance(known[key], State)  # its rows are asked for
        if place.layer is not None:
            layers.setdefault(place.layer, []).append(Rows() if in_bytes else known[key])
    return {layer: kept for layer, sites in layers.items() if not isinstance(kept := _one(layer, sites), Rows)}


def _one(layer: int, sites: Sequence[Keeps]) -> Keeps:
    less = [kept for kept in sites if not isinstance(kept, Rows)]
    if len(less) > 1:
        found = f"several attentions in layer {layer}"
        raise Refused(found, where="cache_for", fits="one cached attention per layer")
    return less[0] if less else Rows()


def _of_site(site: Site, change: Change | None) -> Keeps:
    """What a later token asks of a site, decoding being causal."""
    conditions = [c.text for c in AttendSpec("s", site.mask).conjuncts if c.op != "lookup" and c.names <= {"i", "j"}]
    plain = [text for text in conditions if reach(AttendSpec("s", text).text) != Reach()]
    spec = AttendSpec(f"s * {site.scale!r}", " & ".join(f"({text})" for text in {*plain, "j <= i"}))
    spec = AttendSpec(spec.score, spec.keep_expr.text)
    if change is None:
        return _ring(reach(spec.text))
    own = {n.removeprefix("param_"): t.detach().float().cpu() for n, t in change.own.items()}
    causal = replace(site, pattern="causal-self", features=frozenset())
    try:
        way = way_of(standing(change.mechanism, causal, own, spec))
    except Refused:
        return Rows()
    if isinstance(way, ScanState):
        return State()
    return _ring(way.bound) if isinstance(way, KeptKeys) else Rows()


def _ring(found: Reach) -> Keeps:
    return Rows() if found.back is None else Ring(max(found.back, 0), found.sinks)


# --- as JSON ----------------------------------------------------------------------------------------------------------


def keeping_json(kept: Mapping[int, Ring | State]) -> dict[str, list[Any]]:
    """
    >>> keeping_json({0: Ring(64, 4), 2: State()})
    {'0': ['ring', 64, 4], '2': ['state']}
    """
    names = {made: name for name, made in KINDS.items()}
    return {str(layer): [names[type(one)], *vars(one).values()] for layer, one in kept.items()}


def keeping_of(said: Mapping[str, Sequence[Any]]) -> dict[int, Ring | State]:
    """
    >>> keeping_of({"0": ["ring", 64, 4]})
    {0: Ring(back=64, sinks=4)}
    """
    found: dict[int, Ring | State] = {}
    for layer, (name, *numbers) in said.items():
        if name not in KINDS or any(type(n) is not int or n < 0 for n in numbers):
            raise Refused(f"layer {layer} keeps {name!r} {numbers}", where="keeps", fits=", ".join(KINDS))
        found[int(layer)] = KINDS[name](*numbers)
    return found
