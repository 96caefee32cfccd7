"""What the measures of quality say, against values computed by hand and models whose knowledge is planted."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from quality_models import vit
from torch import Tensor, nn

from reattend.models.load import minilm
from reattend.models.quality.language import _by_distance, bits, each_byte, language, whole
from reattend.models.quality.pictures import pictures
from reattend.models.quality.sentences import embedded, nearest, read, spearman
from reattend.models.quality.task import Original, Task, agreement, judged
from reattend.models.quality.tasks import task_for
from reattend.models.training.recall import Answer, Sample, passkeys_at
from reattend.models.training.text import standard_library

TRAINED_ON, HELD_OUT = standard_library()


def one_hot(ids: Tensor, right: Tensor) -> Tensor:
    """Logits (1, N, 256) that foretell the next byte where `right`, and another one elsewhere."""
    after = torch.cat([ids[0, 1:], ids[0, :1]])
    return 30.0 * torch.nn.functional.one_hot(torch.where(right, after, (after + 1) % 256), 256)[None].float()


def test_bits_of_known_distributions() -> None:
    ids = torch.randint(0, 256, (1, 9))
    total, count = bits(torch.zeros(1, 9, 256), ids)["bpb"]
    assert count == 8 and total / count == pytest.approx(8.0)  # knowing nothing: eight bits a byte
    logits = torch.full((1, 9, 256), -math.inf)
    logits[..., 7] = logits[..., 9] = 0.0  # one of two: one bit
    assert bits(logits, torch.tensor([[0] + [7, 9] * 4]))["bpb"] == pytest.approx((8.0, 8.0))


def test_kl_and_top1_by_hand() -> None:
    original = torch.zeros(1, 2, 16)
    got = torch.zeros(1, 2, 16)
    got[0, 1, 8:] = math.log(3.0)  # 1/32 eight times, 3/32 eight times
    found = agreement(got, original)
    assert found["kl"] == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3), 2.0))
    assert found["top1"] == (1.0, 2.0)


def test_answers_count_by_their_distance_and_only_whole() -> None:
    sample = passkeys_at(np.random.default_rng(0), HELD_OUT, 512, (64, 256) * 2)
    ids = torch.from_numpy(sample.bytes.astype(np.int64))[None]
    right = torch.zeros(512, dtype=torch.bool)
    near = [a for a in sample.answers if a.distance == 64]
    for answer in near:
        right[answer.start - 1 : answer.start + 4] = True
    assert _by_distance(one_hot(ids, right), sample) == {"passkey@64": (2.0, 2.0), "passkey@256": (0.0, 2.0)}
    right[near[0].start + 3] = False  # one byte of five
    assert _by_distance(one_hot(ids, right), sample)["passkey@64"] == (1.0, 2.0)


def test_a_passkey_stands_where_its_distance_says() -> None:
    for distances in [(64,), (64, 256, 1024, 1984), (64, 256, 1024, 1984) * 2]:
        length = max(distances) + 64
        sample = passkeys_at(np.random.default_rng(3), HELD_OUT, length, distances)
        assert len(sample.bytes) == length and sorted(a.distance for a in sample.answers) == sorted(distances)
        texts = []
        for a in sample.answers:
            now, then = (sample.bytes[at - 12 : at + 6].tobytes() for at in (a.start, a.start - a.distance))
            assert now == then and now.startswith(b"\n# key ") and now.endswith(b"\n")
            texts.append(now)
        assert len(set(texts)) == len(distances)


def test_pairs_are_whole_and_copies_are_bytes() -> None:
    sample = Sample(np.arange(8, dtype=np.uint8), np.ones(8, np.float32), (Answer(2, 2, 2), Answer(5, 2, 2)))
    right = torch.tensor([False, True, True, False, True, False, False, False])  # places 2, 3 and 5 are foretold
    logits = one_hot(torch.arange(8)[None], right)
    assert whole(logits, sample) == (1.0, 2.0) and each_byte(logits, sample) == (3.0, 4.0)


class Table(nn.Module):
    """A causal language model that knows which byte follows which, in part."""

    def __init__(self, known: float) -> None:
        super().__init__()
        text = TRAINED_ON.bytes[:200_000].astype(np.int64)
        counts = np.zeros((256, 256))
        np.add.at(counts, (text[:-1], text[1:]), 1.0)
        self.logits = nn.Parameter(known * torch.from_numpy(np.log(counts + 0.1)).float())

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> Tensor:
        return self.logits[input_ids]


class Oracle(nn.Module):
    """Foretells every byte: it looks ahead."""

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> Tensor:
        return one_hot(input_ids, torch.ones(input_ids.shape[1], dtype=torch.bool))


def measured(task: Task, model: nn.Module, original: nn.Module) -> dict[str, float]:
    return judged(task, model, Original(original), lambda: None)


def test_worse_models_rank_worse() -> None:
    task, best = language(144), Table(1.0)
    rows = [measured(task, Table(known), best) for known in (1.0, 0.7, 0.3, 0.0)]
    assert [r["bpb"] for r in rows] == sorted(r["bpb"] for r in rows) and rows[-1]["bpb"] == pytest.approx(8.0)
    assert [r["kl"] for r in rows] == sorted(r["kl"] for r in rows) and rows[0]["kl"] == 0.0 < rows[1]["kl"]
    assert rows[0]["top1"] == 1.0 > rows[-1]["top1"]
    oracle = measured(task, Oracle(), best)
    assert oracle["bpb"] < 1e-3
    assert [oracle[name] for name in ("passkey@64", "pairs", "copying")] == [1.0, 1.0, 1.0]
    assert rows[0]["pairs"] < 0.2 and rows[0]["passkey@64"] == 0.0
    assert measured(task, best, best) == rows[0]


def test_spearman_by_hand() -> None:
    a = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 2.0, 3.0]])
    b = torch.tensor([[4.0, 3.0, 2.0, 1.0], [5.0, 6.0, 6.0, 9.0]])
    assert spearman(a, b).tolist() == pytest.approx([-1.0, 1.0])
    # ranks 0 1 2 3 against 1 0 2 3: 1 - 6 * 2 / (4 * 15)
    assert spearman(a[:1], torch.tensor([[2.0, 1.0, 3.0, 4.0]])).item() == pytest.approx(0.8)


def test_only_real_tokens_are_pooled() -> None:
    hidden = torch.tensor([[[3.0, 0.0], [3.0, 8.0], [99.0, 99.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert embedded(hidden, mask).tolist() == [[0.6, 0.8]]
    close = torch.tensor([[1.0, 0.2, 0.9], [0.2, 1.0, 0.3], [0.9, 0.3, 1.0]])
    assert nearest(close).tolist() == [2, 2, 0]


def test_the_sentences_are_many_of_several_topics() -> None:
    texts, topics = read()
    assert len(set(texts)) == len(texts) >= 60 and len(set(topics)) >= 15
    assert min(topics.count(topic) for topic in set(topics)) >= 3


def test_an_encoder_that_forgets_ranks_worse() -> None:
    model: Any = minilm().model
    task = task_for(model)
    original = Original(model)
    before = judged(task, model, original, lambda: None)
    assert before["ranking"] == pytest.approx(1.0) and before["cosine"] == pytest.approx(1.0)
    assert before["topic"] > 0.8
    rows = []
    for noise in (0.01, 0.1):
        worse = copy.deepcopy(model)
        with torch.no_grad():
            for p in worse.parameters():
                p.add_(noise * torch.randn_like(p))
        rows.append(judged(task, worse, original, lambda: None))
    assert 1.0 > rows[0]["ranking"] > rows[1]["ranking"] and 1.0 > rows[0]["cosine"] > rows[1]["cosine"]
    assert rows[1]["topic"] < before["topic"]


def test_accuracy_is_the_share_of_right_names() -> None:
    model = vit()
    rng = np.random.default_rng(0)
    images = rng.standard_normal((6, 3, 64, 64), dtype=np.float32)
    with torch.no_grad():
        guesses = model(pixel_values=torch.from_numpy(images)).logits.argmax(-1).numpy()
    labels = guesses.copy()
    labels[:2] = (labels[:2] + 1) % 24
    found = measured(pictures(lambda first, count: (images[:count], labels[:count]), 24, 6), model, model)
    assert found == {"accuracy": pytest.approx(4 / 6), "top1": 1.0, "kl": 0.0}
