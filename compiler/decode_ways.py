"""The ways of carrying a state from token to token: kept keys, the state of a scan, a mechanism's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from .mechanism import Mechanism, Tensors
from .place import own_tensors
from .primitives.attend_spec import AttendSpec
from .reach import Reach, kept_keys, key_positions
from .refusal import Refused
from .site import Site
from .tracing import Setting, forward

State = Mapping[str, Tensor]
OWN = ("state", "prefill", "step")  # what a mechanism defines that decodes in its own way


@dataclass(frozen=True)
class Standing:
    """A mechanism at a causal site with its tensors: what a forward needs besides q, k, v."""

    mechanism: Mechanism
    site: Site
    spec: AttendSpec
    tables: tuple[Tensor, ...] = ()
    own: Mapping[str, Tensor] = field(default_factory=dict)

    def values(
        self, q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor], ports: Mapping[str, Tensor] = {}
    ) -> dict[str, Tensor]:
        named = {f"table_{n}": t for n, t in enumerate(tables)} | {f"param_{n}": t for n, t in self.own.items()}
        return {"q": q, "k": k, "v": v, **ports, **named}

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttendSpec, tables: Sequence[Tensor], ports: Mapping[str, Tensor]
    ) -> Tensor:
        return forward(self.mechanism, Setting(self.site, spec), self.values(q, k, v, tables, ports))[0]

    def whole(self, q: Tensor, k: Tensor, v: Tensor, ports: Mapping[str, Tensor] = {}) -> Tensor:
        """The forward over a whole sequence, positions counted from its start."""
        return self.forward(q, k, v, self.spec, self.tables, ports)

    def moved(self, queries: Tensor, keys: Tensor) -> tuple[AttendSpec, tuple[Tensor, ...]]:
        """The same attention where queries and keys stand at given positions."""
        count = len(self.tables)
        spec = replace(self.spec, align="start", q_positions=f"t{count}", k_positions=f"t{count + 1}")
        return spec, (*self.tables, queries, keys)

    def to(self, dtype: torch.dtype) -> Standing:
        def wide(t: Tensor) -> Tensor:
            return t.to(dtype) if t.is_floating_point() else t

        return replace(self, tables=tuple(map(wide, self.tables)), own={n: wide(t) for n, t in self.own.items()})


def standing(
    mechanism: Mechanism,
    site: Site,
    params: Mapping[str, Tensor] = {},
    spec: AttendSpec | None = None,
    tables: Sequence[Tensor] = (),
) -> Standing:
    """The mechanism at the site, if it can stand there and the site decodes at all."""
    stands = mechanism.part == "core" or (mechanism.part == "region" and decodes_by_itself(mechanism))
    if not stands or site.pattern != "causal-self":
        found = f"{mechanism.slug} ({mechanism.part}) at a site that is {site.pattern}"
        raise Refused(found, where=f"{site.path}: decode", fits="a core mechanism at a causal-self site")
    reason = mechanism.refuses(site)
    if reason:
        raise Refused(reason, where=str(site))
    own = own_tensors(mechanism, site, params, like=torch.empty(0))
    plain = AttendSpec(score=f"s * {site.scale!r}", keep="j <= i")
    return Standing(mechanism, site, spec or plain, tuple(tables), own)


class Way(Protocol):
    """How a state is carried: rows q, k, v after `seen` others give their outputs and the state behind them."""

    def run(self, at: Standing, state: State, seen: int, *rows: Tensor, **ports: Tensor) -> tuple[Tensor, State]: ...


@dataclass(frozen=True)
class KeptKeys:
    """The state is keys and values: all of them, or those that are still in reach."""

    bound: Reach
    free: bool  # only i - j counts: rows that end where the queries end need no positions
    ports: tuple[str, ...] = ()  # what else the forward is given of the new tokens

    def run(self, at: Standing, state: State, seen: int, *rows: Tensor, **ports: Tensor) -> tuple[Tensor, State]:
        q, k, v = _asked(rows, ports, self.ports, at)
        new = k.shape[2]
        if state:
            k, v = torch.cat((state["k"], k), 2), torch.cat((state["v"], v), 2)
        o = at.forward(q, k, v, *self._placed(at, seen, new, k), ports)
        kept = kept_keys(k.shape[2], self.bound, k.device)
        if kept is not None and len(kept) < k.shape[2]:
            k, v = k.index_select(2, kept), v.index_select(2, kept)
        return o, {"k": k, "v": v}

    def _placed(self, at: Standing, seen: int, new: int, k: Tensor) -> tuple[AttendSpec, tuple[Tensor, ...]]:
        if seen == 0:
            return at.spec, at.tables
        if self.free:
            return replace(at.spec, align="end"), at.tables
        queries = torch.arange(seen, seen + new, device=k.device)
        return at.moved(queries, key_positions(k.shape[2], seen, new, self.bound, k.device))


@dataclass(frozen=True)
class ScanState:
    """The state is that of the mechanism's one scan: its graph, with the scan made to start from it and to give it."""

    graph: fx.GraphModule
    inputs: tuple[str, ...]
    size: tuple[int, ...]  # (H, D, Dv) as the scan sees them: features may be wider than the keys they are made of
    ports: tuple[str, ...] = ()

    def run(self, at: Standing, state: State, seen: int, *rows: Tensor, **ports: Tensor) -> tuple[Tensor, State]:
        q, k, v = _asked(rows, ports, self.ports, at)
        start = state["state"] if state else self._empty(q)
        places = torch.arange(seen, seen + k.shape[2], device=k.device)
        values = at.values(q, k, v, at.moved(places, places)[1], ports)
        o, after = self.graph(*(values[n] for n in self.inputs), start)
        return o, {"state": after}

    def _empty(self, q: Tensor) -> Tensor:
        return q.new_zeros((q.shape[0], *self.size), dtype=torch.promote_types(q.dtype, torch.float32))


@dataclass(frozen=True)
class OwnWay:
    """The mechanism's own: from state(site, q), by prefill and step(site, p, state, q, k, v) -> (o, state).

    A region's take x for q, k and v; ports are those that its step takes beside the rows.
    """

    def run(self, at: Standing, state: State, seen: int, *rows: Tensor, **ports: Tensor) -> tuple[Tensor, State]:
        how: Any = at.mechanism
        before = state if seen else self.empty(at, rows[0])
        step = how.step if seen else how.prefill
        o, after = step(at.site, Tensors(at.own), before, *rows, **ports)
        return o, after

    def empty(self, at: Standing, q: Tensor) -> State:
        how: Any = at.mechanism
        made: State = how.state(at.site, q)
        return made


def decodes_by_itself(mechanism: Mechanism) -> bool:
    return all(hasattr(mechanism, name) for name in OWN)


def _asked(rows: Sequence[Tensor], ports: Mapping[str, Tensor], asked: Sequence[str], at: Standing) -> Sequence[Tensor]:
    if set(ports) != set(asked):
        found = f"ports {', '.join(ports) or 'none'} beside q, k and v"
        raise Refused(found, where=f"{at.site.path}: decode", fits=", ".join(asked) or "q, k and v alone")
    return rows
