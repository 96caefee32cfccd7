"""One core split over heads: each set of heads attends by its own mechanism, in whole kv groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .live import LiveSite
from .mechanism import Aux, Mechanism, Param, Tensors
from .site import Site
from .symbol_text import parse
from .symbols import name

_QUERY_PORTS, _KEY_PORTS = ("q", "q_nope", "o"), ("k", "v", "k_nope")


@dataclass(frozen=True)
class Split(Mechanism):
    """`groups` cover every head once: (head numbers, mechanism)."""

    groups: tuple[tuple[tuple[int, ...], Mechanism], ...]

    @property
    def slug(self) -> str:  # type: ignore[override]
        return "+".join(f"{m.slug}[{_said(heads)}]" for heads, m in self.groups)

    @property
    def kind(self) -> str:  # type: ignore[override]
        kinds = {m.kind for _, m in self.groups}
        return next(k for k in ("needs recovery", "approximate", "exact") if k in kinds)

    @property
    def honours(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset.intersection(*(frozenset(m.honours) for _, m in self.groups))

    def wanted_ports(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        must = {port for _, m in self.groups for port in m.wanted_ports()[0]}
        may = {port for _, m in self.groups for port in m.wanted_ports()[1]} - must
        return tuple(sorted(must | {"q"})), tuple(sorted(may))

    def fits(self, site: Site) -> str | None:
        covered = sorted(h for heads, _ in self.groups for h in heads)
        if covered != list(range(site.heads)):
            return f"the split covers heads {_said(tuple(covered))}, this site has heads 0-{site.heads - 1}"
        share = site.heads // site.kv_heads
        for heads, mechanism in self.groups:
            if any(len([h for h in heads if h // share == g]) != share for g in {h // share for h in heads}):
                return f"heads {_said(heads)} cut a group of {share} heads that share keys"
            reason = mechanism.fits(_part(site, heads))
            if reason:
                return f"heads {_said(heads)}: {reason}"
        return None

    def params(self, site: Site) -> Mapping[str, Param]:
        return {_own(h, n): q for h, m in self.groups for n, q in m.params(_part(site, h)).items()}

    def buffers(self, site: Site) -> Mapping[str, Param]:
        return {_own(h, n): q for h, m in self.groups for n, q in m.buffers(_part(site, h)).items()}

    def forward(self, site: Any, p: Any, **ports: Tensor) -> Any:
        outputs, losses, buffers = [], {}, {}
        for heads, mechanism in self.groups:
            must, may = mechanism.wanted_ports()
            own = {n: _taken(n, ports[n], heads, site.facts) for n in (*must, *may) if n in ports}
            part = _part(site.facts, heads)
            names = (*mechanism.params(part), *mechanism.buffers(part))
            held = Tensors({n: getattr(p, _own(heads, n)) for n in names})
            answer = mechanism.forward(_live(site, part, heads, ports["q"].device), held, **own)
            output, aux = answer if isinstance(answer, tuple) else (answer, Aux())
            outputs.append(output)
            losses.update({_own(heads, n): loss for n, loss in aux.losses.items()})
            buffers.update({_own(heads, n): value for n, value in aux.buffers.items()})
        order = [h for heads, _ in self.groups for h in heads]
        joined = torch.cat(outputs, 1)
        if order != sorted(order):
            joined = joined[:, [order.index(h) for h in range(len(order))]]
        return joined, Aux(losses, buffers)


def _own(heads: tuple[int, ...], tensor: str) -> str:
    return f"heads{heads[0]}_{tensor}"


def _said(heads: tuple[int, ...]) -> str:
    straight = heads == tuple(range(heads[0], heads[-1] + 1)) if heads else False
    return f"{heads[0]}-{heads[-1]}" if straight and len(heads) > 1 else ",".join(map(str, heads))


def _part(site: Site, heads: tuple[int, ...]) -> Site:
    share = site.heads // site.kv_heads
    return replace(site, heads=len(heads), kv_heads=len({h // share for h in heads}))


def _live(site: LiveSite, part: Site, heads: tuple[int, ...], device: torch.device) -> LiveSite:
    """The live site of some heads: its head h is heads[h] of the whole."""
    spec, tables = site.spec, site.tables
    straight = _said(heads) == f"{heads[0]}-{heads[-1]}" or len(heads) == 1
    number = name("h") + heads[0] if straight else parse(f"t{len(tables)}[h]")
    texts = {f: getattr(spec, f) for f in ("keep", "score", "sink", "after")}
    moved: dict[str, Any] = {f: parse(text).replace({"h": number}).text if text else "" for f, text in texts.items()}
    if not straight and any(moved[f] != texts[f] for f in texts):
        tables = (*tables, torch.tensor(heads, device=device))
    return LiveSite(part, replace(spec, **moved), tables, site.ports)


def _taken(port: str, tensor: Tensor, heads: tuple[int, ...], site: Site) -> Tensor:
    share = site.heads // site.kv_heads
    if port in _KEY_PORTS:
        heads = tuple(sorted({h // share for h in heads}))
    elif port not in _QUERY_PORTS:
        return tensor
    straight = heads == tuple(range(heads[0], heads[-1] + 1))
    return tensor[:, heads[0] : heads[-1] + 1] if straight else tensor[:, list(heads)]
