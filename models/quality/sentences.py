"""The sentence encoder's task: whether sentences stay where they were, and near those they belong to."""

from __future__ import annotations

import hashlib
import importlib.resources
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .task import Measure, Part, Tally, Task

DEFINITION = 1  # raised whenever a number would come out differently
Tokenize = Callable[[Sequence[str]], Mapping[str, Tensor]]  # input_ids and attention_mask (S, N) of the sentences


def sentences(tokenize: Tokenize) -> Task:
    """All sentences in one call: every similarity is between two rows of it."""
    texts, groups = read()
    call = dict(tokenize(texts))
    print_of = hashlib.sha256(b"".join(t.numpy().tobytes() for t in call.values())).hexdigest()
    settings = {"definition": DEFINITION, "sentences": len(texts), "tokens": print_of}
    measures = (
        Measure("ranking", "rank correlation of similarities with the original's", True, 0.0),
        Measure("cosine", "cosine of embeddings with the original's", True, 0.0),
        Measure("topic", "sentences whose nearest neighbour has their topic", True, 0.0),
    )
    mask, own = call["attention_mask"], torch.tensor(groups)

    def judge(_: int, got: Tensor, before: Tensor | None) -> Tally:
        assert before is not None
        a, b = embedded(got, mask), embedded(before, mask)
        near, count = without_self(a @ a.mT), float(len(groups))
        right = (own[nearest(a @ a.mT)] == own).sum().item()
        together = spearman(near, without_self(b @ b.mT)).sum().item()
        return {"ranking": (together, count), "cosine": ((a * b).sum().item(), count), "topic": (float(right), count)}

    return Task("sentences", measures, settings, lambda: (Part((((), call),), judge, against=True),))


def read() -> tuple[list[str], list[int]]:
    """The sentences, and the number of the topic of each; topics are set apart by empty lines."""
    folder = importlib.resources.files(__package__)
    lines = folder.joinpath("sentences.txt").read_text(encoding="utf-8").splitlines()
    topics = [list(group) for there, group in groupby(lines, key=bool) if there]
    return [line for topic in topics for line in topic], [n for n, topic in enumerate(topics) for _ in topic]


def embedded(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean of the real tokens' states, of length 1 (S, C), in float64: equal models give exactly 1."""
    real = mask[..., None].double()
    return normalize((hidden.double() * real).sum(1) / real.sum(1), dim=-1)


def without_self(similar: Tensor) -> Tensor:
    """Each row without its entry on the diagonal (S, S - 1)."""
    size = similar.shape[0]
    return similar[~torch.eye(size, dtype=torch.bool)].view(size, size - 1)


def nearest(similar: Tensor) -> Tensor:
    """The most similar other sentence of each."""
    return similar.masked_fill(torch.eye(len(similar), dtype=torch.bool), -2.0).argmax(-1)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """The correlation of the ranks in each row.

    >>> spearman(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0, 30.0, 20.0]]))
    tensor([0.5000], dtype=torch.float64)
    """
    x, y = (_ranks(t) - _ranks(t).mean(-1, keepdim=True) for t in (a, b))
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))


def _ranks(t: Tensor) -> Tensor:
    """The place of each entry in its row, equal ones sharing the mean of theirs."""
    below = (t[..., None] > t[..., None, :]).sum(-1)
    equal = (t[..., None] == t[..., None, :]).sum(-1)
    return below.double() + (equal.double() - 1) / 2
