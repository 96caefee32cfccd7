"""A call with several segments, gathered rows or a table of key heads as plain calls, one for each segment.

Once each row's number and delta are known, a gradient is a sum over keys: segments no longer meet in one normaliser,
and rows that a query gathers can be copied out, their gradients added back where they came from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...compiler.primitives.attend_spec import AttendSpec
from ...compiler.primitives.operator import Groups
from ...compiler.primitives.rows import repeat_heads
from ...compiler.symbol_text import parse
from ...compiler.symbols import build, name

Back = Callable[[Tensor], Tensor]  # the gradient of a part's keys or values as that of the tensor it was made from


@dataclass(frozen=True)
class Part:
    """One segment as a call of its own: keys in order, heads that divide those of the queries."""

    groups: Groups
    text: str
    back: Back


def parts(groups: Groups, text: str) -> Iterator[Part]:
    (q,), kv, tables = groups
    spec = AttendSpec.of(text)
    for number, (k, v) in enumerate(zip(kv[::2], kv[1::2], strict=True)):
        yield _Segment(q, k, v, list(tables), spec, number, kv[0].shape[2]).part()


@dataclass
class _Segment:
    q: Tensor
    k: Tensor
    v: Tensor
    tables: list[Tensor]
    spec: AttendSpec
    number: int
    keys: int  # of the first segment, whose end the last query may stand at

    def part(self) -> Part:
        keep, score, places = self.spec.segments[self.number]
        k, v = (t.expand(self.q.shape[0], *t.shape[1:]) for t in (self.k, self.v))
        back: Back = lambda t: t
        if self.spec.kv_heads:
            heads = self.tables[int(self.spec.kv_heads[1:])].long()
            k, v, back = k.index_select(1, heads), v.index_select(1, heads), _heads_back(heads, self.k.shape[1])
        gathers = bool(self.spec.rows_of(self.number))
        if gathers:
            k, v, keep, places, back = self._gathered(k, v, keep, places, back)
        alone = replace(self.spec, keep=keep, score=score, k_positions=places, more=(), rows=(), kv_heads="",
                        sink="" if self.number else self.spec.sink, outputs=("o",))  # fmt: skip
        if (gathers or self.number) and self.spec.align == "end" and not self.spec.q_positions:
            n = self.q.shape[2]  # these keys do not say where the last query stands
            stand = self._table(torch.arange(n, device=self.q.device) + self.keys - n)
            alone = replace(alone, q_positions=stand, align="start")
        return Part([[self.q], [k, v], self.tables], alone.text, back)

    def _gathered(
        self, k: Tensor, v: Tensor, keep: str, places: str, back: Back
    ) -> tuple[Tensor, Tensor, str, str, Back]:
        """Rows copied out, at the positions that they had; one that does not stand there is nowhere."""
        rows = self.tables[int(self.spec.rows_of(self.number)[1:])].long()
        own = rows.shape[1] not in (1, k.shape[1])
        heads = self.q.shape[1] if own else k.shape[1]
        if own:
            k, v, back = repeat_heads(k, self.q), repeat_heads(v, self.q), _groups_back(k.shape[1], back)
        rows = (repeat_heads(rows, self.q) if own else rows).expand(k.shape[0], heads, rows.shape[-1])
        here = (rows >= 0) & (rows < k.shape[2])
        at = torch.where(here, rows, 0)
        stand = at if not places else self._places(places, k).gather(2, at)
        kept = build("and", parse(keep) if keep else build("le", 0, 0), build("le", 0, name("j")))
        count = k.shape[2]

        def returned(t: Tensor) -> Tensor:
            made = t.new_zeros(*t.shape[:2], count, t.shape[-1])
            return back(made.scatter_add_(2, at[..., None].expand(t.shape), t * here[..., None]))

        k, v = (t.gather(2, at[..., None].expand(*at.shape, t.shape[-1])) for t in (k, v))
        return k, v, kept.text, self._table(torch.where(here, stand, -1)), returned

    def _places(self, places: str, k: Tensor) -> Tensor:
        table = self.tables[int(places[1:])].long()
        wide = table.reshape(
            (1, 1, -1) if table.ndim == 1 else (table.shape[0], 1, -1) if table.ndim == 2 else table.shape
        )
        if wide.shape[1] not in (1, k.shape[1]):
            wide = repeat_heads(wide, self.q)
        return wide.expand(*k.shape[:3])

    def _table(self, t: Tensor) -> str:
        self.tables.append(t)
        return f"t{len(self.tables) - 1}"


def _heads_back(heads: Tensor, count: int) -> Back:
    return lambda t: t.new_zeros(t.shape[0], count, *t.shape[2:]).index_add_(1, heads, t)


def _groups_back(count: int, back: Back) -> Back:
    return lambda t: back(t.unflatten(1, (count, -1)).sum(2))
