"""One core split over heads: each range of heads attends by its own mechanism, in whole kv groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .live import LiveSite
from .mechanism import Aux, Mechanism, Param, Tensors
from .refusal import Refused
from .site import Site
from .symbol_text import parse
from .symbols import name

_QUERY_PORTS, _KEY_PORTS = ("q", "q_nope", "o"), ("k", "v", "k_nope")


@dataclass(frozen=True)
class Split(Mechanism):
    """`groups` cover every head once: (first head, one past the last, mechanism)."""

    groups: tuple[tuple[int, int, Mechanism], ...]

    @property
    def slug(self) -> str:  # type: ignore[override]
        return "+".join(f"{m.slug}[{a}-{b - 1}]" for a, b, m in self.groups)

    @property
    def kind(self) -> str:  # type: ignore[override]
        kinds = {m.kind for _, _, m in self.groups}
        return next(k for k in ("needs recovery", "approximate", "exact") if k in kinds)

    @property
    def honours(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset.intersection(*(frozenset(m.honours) for _, _, m in self.groups))

    def wanted_ports(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        must = {port for _, _, m in self.groups for port in m.wanted_ports()[0]}
        may = {port for _, _, m in self.groups for port in m.wanted_ports()[1]} - must
        return tuple(sorted(must | {"q"})), tuple(sorted(may))

    def fits(self, site: Site) -> str | None:
        share = site.heads // site.kv_heads
        covered = sorted(h for a, b, _ in self.groups for h in range(a, b))
        if covered != list(range(site.heads)):
            return f"the split covers heads {covered}, this site has heads 0-{site.heads - 1}"
        for first, last, mechanism in self.groups:
            if first % share or last % share:
                return f"heads {first}-{last - 1} cut a group of {share} heads that share keys"
            reason = mechanism.fits(_part(site, first, last))
            if reason:
                return f"heads {first}-{last - 1}: {reason}"
        return None

    def params(self, site: Site) -> Mapping[str, Param]:
        return {_own(a, n): q for a, b, m in self.groups for n, q in m.params(_part(site, a, b)).items()}

    def buffers(self, site: Site) -> Mapping[str, Param]:
        return {_own(a, n): q for a, b, m in self.groups for n, q in m.buffers(_part(site, a, b)).items()}

    def forward(self, site: Any, p: Any, **ports: Tensor) -> Any:
        outputs, losses, buffers = [], {}, {}
        for first, last, mechanism in self.groups:
            must, may = mechanism.wanted_ports()
            own = {n: _heads(n, ports[n], first, last, site.facts) for n in (*must, *may) if n in ports}
            part = _part(site.facts, first, last)
            held = Tensors({n: p[_own(first, n)] for n in (*mechanism.params(part), *mechanism.buffers(part))})
            answer = mechanism.forward(_live(site, part, first), held, **own)
            output, aux = answer if isinstance(answer, tuple) else (answer, Aux())
            outputs.append(output)
            losses.update({_own(first, n): loss for n, loss in aux.losses.items()})
            buffers.update({_own(first, n): value for n, value in aux.buffers.items()})
        return torch.cat(outputs, 1), Aux(losses, buffers)


def _own(first: int, tensor: str) -> str:
    return f"heads{first}_{tensor}"


def _part(site: Site, first: int, last: int) -> Site:
    share = site.heads // site.kv_heads
    if (last - first) < share:
        raise Refused(f"{last - first} heads of groups of {share}", where=site.path, fits="whole kv groups")
    return replace(site, heads=last - first, kv_heads=(last - first) // share)


def _live(site: LiveSite, part: Site, first: int) -> LiveSite:
    """The live site of a range of heads: head h there is head h + first of the whole."""
    shift = {"h": name("h") + first}
    spec = site.spec
    texts = {f: getattr(spec, f) for f in ("keep", "score", "sink", "after")}
    moved = {f: parse(text).replace(shift).text if text else "" for f, text in texts.items()}
    return LiveSite(part, replace(spec, **moved), site.tables, site.ports)


def _heads(port: str, tensor: Tensor, first: int, last: int, site: Site) -> Tensor:
    share = site.heads // site.kv_heads
    if port in _QUERY_PORTS:
        return tensor[:, first:last]
    return tensor[:, first // share : last // share] if port in _KEY_PORTS else tensor
