"""The byte model's task: bits per byte of held-out text, and recall: passkeys by distance, pairs, copying."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import log

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...compiler.held_out import Batch
from ...compiler.refusal import Refused
from ..training.recall import Sample, copying, pairs, passkeys_at
from ..training.text import Text, standard_library
from .task import KL, TOP1, Measure, Part, Tally, Task, agreement

DEFINITION = 1  # raised whenever a number would come out differently
TEXTS, PASSKEYS, PAIRS, COPIES = 12, 8, 4, 4  # rows of the whole context: the budget of one model
ASKED = 2  # passkeys of each distance in a row
DISTANCES = (64, 256, 1024, 1984)  # bytes between a passkey and the question for it, where the context is so long
SEED = 2


def language(context: int, held_out: Text | None = None) -> Task:
    """Rows of `context` bytes, one a call, so that every call has the size that was optimized for."""
    text = _held_out() if held_out is None else held_out
    if len(text.bytes) <= context:
        raise Refused("Python without its sources", where="language", fits="a standard library with .py files")
    distances = tuple(distance for distance in DISTANCES if distance + 64 <= context)
    settings = {"definition": DEFINITION, "context": context, "texts": TEXTS, "passkeys": PASSKEYS, "asked": ASKED,
                "distances": distances, "pairs": PAIRS, "copies": COPIES, "seed": SEED,
                "text": text.sha256}  # fmt: skip
    passkeys = (
        Measure(f"passkey@{d}", f"passkeys answered whole, {d} bytes back", True, 0.0, ".2f") for d in distances
    )
    measures = (
        Measure("bpb", "bits per byte of held-out text", False, 8.0),
        *passkeys,
        Measure("pairs", "values of pairs answered whole", True, 0.0, ".2f"),
        Measure("copying", "bytes of a copy foretold", True, 0.0, ".2f"),
        KL,
        TOP1,
    )
    return Task("language", measures, settings, lambda: _parts(context, text, distances))


@cache
def _held_out() -> Text:
    """Found and read once in a process."""
    return standard_library()[1]


def _parts(context: int, text: Text, distances: tuple[int, ...]) -> tuple[Part, ...]:
    rng = np.random.default_rng(SEED)
    keys = [passkeys_at(rng, text, context, distances * ASKED) for _ in range(PASSKEYS if distances else 0)]
    lists = [pairs(rng, text, context) for _ in range(PAIRS)]
    copies = [copying(rng, text, context) for _ in range(COPIES)]
    rows = _calls(text.windows(context, TEXTS))
    return (
        Part(rows, lambda n, got, before: bits(got, _ids(rows[n])) | agreement(got, _must(before)), against=True),
        Part(_calls([s.bytes for s in keys]), lambda n, got, _: _by_distance(got, keys[n])),
        Part(_calls([s.bytes for s in lists]), lambda n, got, _: {"pairs": whole(got, lists[n])}),
        Part(_calls([s.bytes for s in copies]), lambda n, got, _: {"copying": each_byte(got, copies[n])}),
    )


def _calls(rows: Sequence[np.ndarray] | np.ndarray) -> tuple[Batch, ...]:
    return tuple(((), {"input_ids": torch.from_numpy(r.astype(np.int64))[None], "use_cache": False}) for r in rows)


def _ids(call: Batch) -> Tensor:
    ids: Tensor = call[1]["input_ids"]
    return ids


def _must(before: Tensor | None) -> Tensor:
    assert before is not None
    return before


def bits(logits: Tensor, ids: Tensor) -> Tally:
    """Bits of every byte but the first."""
    nats = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum").item()
    return {"bpb": (nats / log(2), float(ids[:, 1:].numel()))}


def whole(logits: Tensor, sample: Sample) -> tuple[float, float]:
    """How many answers are right in every byte, and how many there are."""
    right = _right(logits, sample)
    return float(sum(all(one) for one in right)), float(len(right))


def each_byte(logits: Tensor, sample: Sample) -> tuple[float, float]:
    right = _right(logits, sample)
    return float(sum(sum(one) for one in right)), float(sum(len(one) for one in right))


def _by_distance(logits: Tensor, sample: Sample) -> Tally:
    right = _right(logits, sample)
    found: Tally = {}
    for answer, one in zip(sample.answers, right, strict=True):
        name = f"passkey@{answer.distance}"
        good, asked = found.get(name, (0.0, 0.0))
        found[name] = (good + all(one), asked + 1)
    return found


def _right(logits: Tensor, sample: Sample) -> list[list[bool]]:
    """For every answer, which of its bytes the model foretells from the ones before them."""
    guesses = logits[0].argmax(-1).numpy()
    return [
        [bool(guesses[place - 1] == sample.bytes[place]) for place in range(a.start, a.start + a.length)]
        for a in sample.answers
    ]
