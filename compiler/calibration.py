"""Calibration: statistics of named values over many calls, reduced as they stream by; nothing of their size is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from tqdm import tqdm

from .refusal import Refused
from .taps import stream


class Reducer:
    """Takes values one by one; `keep` are the dimensions that the statistic has, all others are reduced over."""

    def __init__(self, *keep: int) -> None:
        self.keep, self.seen = keep, 0

    def take(self, value: Tensor) -> None:
        rows = self._rows(value.detach())
        if rows.shape[-1] == 0:
            return
        if not bool(rows.isfinite().all()):
            raise Refused("NaN or infinity among the values", fits="calls on which the model gives numbers")
        self.seen += rows.shape[-1]
        self.add(rows)

    def _rows(self, value: Tensor) -> Tensor:
        """(kept dimensions ..., everything else)"""
        kept = [d % value.ndim for d in self.keep]
        rest = [d for d in range(value.ndim) if d not in kept]
        return value.permute(*kept, *rest).reshape(*(value.shape[d] for d in kept), -1)

    def add(self, rows: Tensor) -> None:
        raise Refused(f"{type(self).__name__} does not say how", fits="define it")

    def result(self) -> Tensor:
        raise Refused(f"{type(self).__name__} does not say how", fits="define it")


class AbsMax(Reducer):
    """The largest magnitude.

    >>> most = AbsMax(-1)
    >>> for value in ([[1.0, -4.0]], [[-2.0, 3.0]]): most.take(torch.tensor(value))
    >>> most.result().tolist()
    [2.0, 4.0]
    """

    def __init__(self, *keep: int) -> None:
        super().__init__(*keep)
        self.most: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        most = rows.abs().amax(-1).float()
        self.most = most if self.most is None else torch.maximum(self.most, most)

    def result(self) -> Tensor:
        return _given(self.most)


PER_OCTAVE = 32  # bins: a percentile is off by a factor of at most 2^(1/64)
LOWEST, HIGHEST = -40, 24  # octaves; smaller magnitudes count as zero


class Percentile(Reducer):
    """The magnitude below which `share` of the values lie, from counts in logarithmic bins: within 1.1 %, or zero."""

    def __init__(self, share: float, *keep: int) -> None:
        super().__init__(*keep)
        if not 0 <= share <= 1:
            raise Refused(f"share={share}", where="percentile", fits="0 to 1")
        self.share, self.counts = share, torch.zeros(0)

    def add(self, rows: Tensor) -> None:
        bins = (HIGHEST - LOWEST) * PER_OCTAVE
        place = ((rows.abs().double().log2() - LOWEST) * PER_OCTAVE).floor().clamp(-1, bins - 1).long() + 1
        if self.counts.numel() == 0:
            self.counts = torch.zeros(*rows.shape[:-1], bins + 1, dtype=torch.long, device=rows.device)
        self.counts.scatter_add_(-1, place, torch.ones_like(place))

    def result(self) -> Tensor:
        reached = _given(self.counts).cumsum(-1) >= max(1.0, self.share * self.seen)
        place = reached.int().argmax(-1)
        return torch.where(place == 0, 0.0, torch.exp2((place - 0.5) / PER_OCTAVE + LOWEST)).float()


class Gram(Reducer):
    """X^T X / n over the last dimension, in float64: what GPTQ and a best low rank ask for."""

    def __init__(self) -> None:
        super().__init__(-1)
        self.sum: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        x = rows.double()
        self.sum = x @ x.T if self.sum is None else self.sum + x @ x.T

    def result(self) -> Tensor:
        return _given(self.sum) / self.seen


def _given(found: Tensor | None) -> Tensor:
    if found is None or found.numel() == 0:
        raise Refused("no value was seen", where="calibration", fits="at least one call")
    return found


def calibrate(
    graph: fx.GraphModule,
    batches: Sequence[Sequence[Any]],
    wanted: Mapping[str, tuple[fx.Node, Reducer]],
    *,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    """Run a graph over all batches and give what each reducer found. progress: None shows a bar on a terminal."""
    nodes = {name: node for name, (node, _) in wanted.items()}

    def receive(name: str, value: Tensor) -> None:
        try:
            wanted[name][1].take(value)
        except Refused as refused:
            raise refused.at(f"calibration of {name}") from None

    hidden = None if progress is None else not progress
    with torch.no_grad():
        for batch in tqdm(batches, desc="calibrate", unit="call", disable=hidden, leave=False):
            stream(graph, batch, nodes, receive)
    return {name: reducer.result() for name, (_, reducer) in wanted.items()}
