"""From names of measures to the table of heads: which pass over the model gives which number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..refusal import Refused, nearest
from .blocks import block_influence, loss_outside
from .influence import head_influence
from .losses import Loss
from .measures import ROW_MEASURES, Mean, PerRow, echo, induction, retrieval
from .rank import arank
from .reading import Reading
from .repeats import Repeats, probe_call
from .rows import weight_rows
from .table import HeadTable, table_of

Batch = tuple[Sequence[Any], Mapping[str, Any]]
PerSite = dict[str, Tensor]  # (H,) by path

MEASURES: Mapping[str, str] = {
    "entropy": "of a row of weights, in nats, mean over rows",
    "sink": "weight of the first key (a class token stands there)",
    "distance": "mean distance of what is looked at: tokens, or patches on a grid",
    "induction": "weight behind earlier copies of the own token, on repeated random tokens",
    "echo": "weight on earlier copies of the own token, on the same",
    "retrieval": "share of rows whose largest weight lies on their known source",
    "arank": "rank of the map without its diagonal, mean over samples",
    "influence": "relative rise of the loss with this head masked",
    "far": "first-order loss of what lies outside a window of the nearest tokens and the first block",
}
DEFAULT = ("entropy", "sink", "distance")


@dataclass(frozen=True)
class Look:
    """How measures that can be taken in several ways are taken."""

    loss: Loss | None = None
    mode: str = "uniform"  # of masking: uniform weights, or a zero output
    sources: tuple[tuple[int, int, int], ...] = ()  # (sample, row, key it must copy from)
    repeats: Repeats = field(default_factory=Repeats)
    window: int = 64  # tokens that `far` leaves to a head
    block: int = 16  # tokens; blocks that it counts in


def look(model: nn.Module, batches: Sequence[Batch], measures: Iterable[str], how: Look, name: str) -> HeadTable:
    """Measure every head of every site; several batches count as one."""
    wanted = known(measures)
    reading = Reading.of(model, *batches[0])
    found: dict[str, PerSite] = {}
    plain: dict[str, PerRow] = {n: ROW_MEASURES[n] for n in wanted if n in ROW_MEASURES}
    if "retrieval" in wanted:
        plain["retrieval"] = retrieval(_sources(reading, batches, how))
    if plain:
        found |= row_means(reading, batches, plain)
    notes = []
    if {"induction", "echo"} & set(wanted):
        call, block = probe_call(model, batches[0], how.repeats)
        copies: dict[str, PerRow] = {"induction": induction(block), "echo": echo(block)}
        found |= row_means(Reading.of(model, (), call), [((), call)], {n: copies[n] for n in wanted if n in copies})
        notes.append(f"induction, echo: {how.repeats.samples} rows of {block} random tokens {how.repeats.times} times")
    if "arank" in wanted:
        found["arank"] = _ranks(reading, batches)
    if "influence" in wanted:
        found["influence"] = _mean_of([head_influence(reading, b, loss=how.loss, mode=how.mode) for b in batches])
        notes.append(f"influence: masked heads {'are zero' if how.mode == 'zero' else 'attend uniformly'}")
    if "far" in wanted:
        found["far"] = _mean_of([_far(reading, b, how) for b in batches])
        notes.append(f"far: outside {_blocks(how)} blocks of {how.block} tokens and the first")
    return table_of(name, reading.sites, {n: {p: v.tolist() for p, v in found[n].items()} for n in wanted}, notes)


def known(measures: Iterable[str]) -> tuple[str, ...]:
    """Names of measures, each once."""
    wanted = tuple(dict.fromkeys((measures,) if isinstance(measures, str) else measures))
    for name in wanted:
        if name not in MEASURES:
            raise Refused(f"measure {name!r}", where="heads", fits=nearest(name, MEASURES))
    if not wanted:
        raise Refused("no measure", where="heads", fits=", ".join(MEASURES))
    return wanted


def row_means(reading: Reading, batches: Sequence[Batch], measures: Mapping[str, PerRow]) -> dict[str, PerSite]:
    """Measures of rows, averaged over all rows of all batches, in one pass over each."""
    means: dict[tuple[str, str], Mean] = {(n, s.path): Mean() for n in measures for s in reading.sites}
    for batch in batches:
        _, tensors = reading.call(*batch)
        reading.each(tensors, lambda seen: _read(seen, measures, means))
    return {n: {s.path: means[n, s.path].value() for s in reading.sites} for n in measures}


def _read(seen: Any, measures: Mapping[str, Callable[..., Tensor]], means: Mapping[tuple[str, str], Mean]) -> None:
    for rows in weight_rows(seen):
        for name, measure in measures.items():
            means[name, seen.site.path].add(measure(rows), rows.real)


def _sources(reading: Reading, batches: Sequence[Batch], how: Look) -> tuple[tuple[int, int, int], ...]:
    """Those whose token is the one to be answered, where the call has tokens: row t answers token t + 1."""
    if not how.sources:
        fits = "sources=[(sample, row, key)]: where the token that a row must give stands in the inputs"
        raise Refused("retrieval without known sources", where="heads", fits=fits)
    if len(batches) > 1:
        raise Refused(f"sources for {len(batches)} batches", where="heads", fits="one batch")
    call, _ = reading.call(*batches[0])
    ids = call.values.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return how.sources
    batch, length = ids.shape
    beyond = next((s for s in how.sources if not (s[0] < batch and s[1] < length and s[2] < length)), None)
    if beyond is not None:
        raise Refused(f"source {beyond}", where="heads", fits=f"samples 0..{batch - 1}, rows and keys 0..{length - 1}")
    asked = {(b, t) for b, t, _ in how.sources}
    true = {(b, t): s for b, t, s in how.sources if t + 1 >= length or ids[b, s] == ids[b, t + 1]}
    return tuple((b, t, true.get((b, t), -1)) for b, t in sorted(asked))  # a false source is never hit


def _ranks(reading: Reading, batches: Sequence[Batch]) -> PerSite:
    def one(batch: Batch) -> PerSite:
        found: PerSite = {}
        _, tensors = reading.call(*batch)
        reading.each(tensors, lambda seen: found.__setitem__(seen.site.path, arank(seen).mean(0)))
        return found

    return _mean_of([one(batch) for batch in batches])


def _far(reading: Reading, batch: Batch, how: Look) -> PerSite:
    blocks = block_influence(reading, batch, loss=how.loss, block=how.block)
    return {path: loss_outside(found, _blocks(how)) for path, found in blocks.items()}


def _blocks(how: Look) -> int:
    """The diagonal block, and as many as the window reaches beyond it."""
    if how.block < 1 or how.window < 1:
        raise Refused(f"window={how.window}, block={how.block}", where="heads", fits="both at least 1")
    return -(-how.window // how.block) + 1


def _mean_of(parts: Sequence[PerSite]) -> PerSite:
    return {path: torch.stack([part[path] for part in parts]).mean(0) for path in parts[0]}
