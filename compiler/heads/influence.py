"""How much a model loses without a head, and which samples need a set of heads (AttentionInfluence)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .interventions import heads_of, masked
from .losses import Loss, loss_for
from .reading import Edit, Reading

Batch = tuple[Sequence[Any], Mapping[str, Any]]
LEAST = 1e-9  # a loss below it is none


def sample_influence(
    reading: Reading,
    batch: Batch,
    heads: Mapping[str, Iterable[int]],
    *,
    loss: Loss | None = None,
    mode: str = "uniform",
) -> Tensor:
    """(L_masked - L) / L of every sample, all the given heads masked at once; none masked: 0."""
    edits = {p: masked(heads_of(reading.program.site(p), h), mode) for p, h in heads.items() if tuple(h)}
    return _Judge(reading, batch, loss).relative(edits)


def head_influence(
    reading: Reading, batch: Batch, *, loss: Loss | None = None, mode: str = "uniform"
) -> dict[str, Tensor]:
    """The same of every head alone, mean over samples: (H,) for each site."""
    judge = _Judge(reading, batch, loss)
    return {
        site.path: torch.stack(
            [judge.relative({site.path: masked([head], mode)}).mean() for head in range(site.heads)]
        ).double()
        for site in reading.sites
    }


class _Judge:
    """One call and its loss without any edit."""

    def __init__(self, reading: Reading, batch: Batch, loss: Loss | None) -> None:
        self.reading = reading
        self.call, self.tensors = reading.call(*batch)
        intact = self._output({})
        self.loss = loss or loss_for(intact, self.call.values)
        self.base = self._of(intact)

    def relative(self, edits: Mapping[str, Edit]) -> Tensor:
        return (self._of(self._output(edits)) - self.base) / self.base.clamp(min=LEAST)

    def _output(self, edits: Mapping[str, Edit]) -> Any:
        with torch.no_grad():
            return self.reading.edited(self.call, self.tensors, edits)

    def _of(self, output: Any) -> Tensor:
        return self.loss(output, self.call.values).detach().double().reshape(-1)
