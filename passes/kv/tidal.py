"""Sparse decoding: two layers select tokens, the layers behind them read only those (TidalDecode, arXiv 2410.05076).

    layer < sparse_layer_start                      full attention
    layer = sparse_layer_start, correction_layer    full attention, and idx = top_k of s = q k^T * scale
    every other layer                               softmax over the stored idx only

The selection is made anew for every generated token and handed from layer to layer: an edge between sites. Prefill
(more than one query row) is full attention in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ...compiler.mechanism import Mechanism, register
from ...compiler.nodes import args_of
from ...compiler.ports import Ports
from ...compiler.primitives.attend_meaning import attend_meaning
from ...compiler.primitives.attend_spec import AttendSpec
from ...compiler.program import Program
from ...compiler.refusal import Refused
from ...compiler.surgery import insert
from ...compiler.symbol_text import parse
from ...compiler.symbols import name


@register("tidal")
@dataclass(frozen=True)
class Tidal(Mechanism):
    top_k: int = 256  # keys that the sparse layers read
    sparse_layer_start: int = 2  # the first layer that selects; those before it are full
    correction_layer: int = 13  # selects again; beyond the last layer: never
    force_last: bool = True  # the newest key is always among the selected

    part = "model"
    kind = "approximate"
    paper = "arXiv 2410.05076"

    def apply(self, program: Program, paths: Sequence[str]) -> None:
        if self.top_k < 1 or self.correction_layer <= self.sparse_layer_start:
            found = f"top_k={self.top_k}, correction_layer={self.correction_layer}"
            raise Refused(found, where="tidal", fits="top_k >= 1 and correction_layer > sparse_layer_start")
        selected: fx.Node | None = None
        for layer, path in enumerate(paths):
            site, ports = program.site(path), program.ports[path]
            if not site.causal or not site.self_attention:
                raise Refused(f"tidal decodes causal self-attention, this is {site.pattern}", where=path)
            if layer in (self.sparse_layer_start, self.correction_layer):
                selected = self._select(program, ports)
            elif selected is not None:
                _restrict(ports.attend, selected)

    def _select(self, program: Program, ports: Ports) -> fx.Node:
        """(B, H, 1, M), true where a key is among the top_k of the last row: of the only one, where it is asked."""
        attend = ports.attend
        tables = {f"table_{k}": node for k, node in enumerate(args_of(attend)[2])}
        spec = AttendSpec.of(str(attend.args[3]))

        def select(q: Tensor, k: Tensor, **tables: Tensor) -> Tensor:
            return top_keys(q[:, :, -1:], k, list(tables.values()), spec, self.top_k, force_last=self.force_last)

        inputs = {"q": ports.nodes["q"], "k": ports.nodes["k"], **tables}
        (selected,) = insert(attend, select, inputs, like=attend)
        return selected


def top_keys(
    q: Tensor, k: Tensor, tables: Sequence[Tensor], spec: AttendSpec, top_k: int, *, force_last: bool
) -> Tensor:
    """The top_k kept keys of every row by their logits, lowest index first among equals; all where there are fewer."""
    logits_of = replace(spec, outputs=("logits",))
    (logits,) = attend_meaning([[q], [k, k], list(tables)], logits_of.text)
    if force_last:  # the last key that a row keeps beats all others
        place = torch.arange(logits.shape[-1], device=q.device)
        newest = torch.where(logits > -torch.inf, place, -1).amax(-1, keepdim=True)
        logits = torch.where(place == newest, torch.inf, logits)
    order = logits.argsort(dim=-1, descending=True, stable=True)
    chosen = (torch.arange(logits.shape[-1], device=q.device) < top_k).expand_as(order)
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, chosen)


def _restrict(attend: fx.Node, selected: fx.Node) -> None:
    """This site keeps the selected keys only, where a single row is asked (N < 2)."""
    tables = list(args_of(attend)[2])
    spec = AttendSpec.of(str(attend.args[3]))
    keep = spec.keep_expr & (parse(f"t{len(tables)}[b, h, 0, j]") | (name("N") >= 2))
    attend.args = (attend.args[0], attend.args[1], [*tables, selected], replace(spec, keep=keep.text, empty="").text)
