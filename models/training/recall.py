"""Recall, to be learned and to be measured: passkeys in text, pairs asked for by name, and copying.

A task gives bytes, how much each byte counts in the loss, and the answers: start, length, how far back its key stands.
A byte drawn at random counts nothing where it first appears (nobody could know it) and fully where it returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .text import Text

_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", dtype=np.uint8)
_DIGITS = np.frombuffer(b"0123456789", dtype=np.uint8)


@dataclass(frozen=True)
class Answer:
    """`length` bytes from `start` on that repeat what stands `distance` bytes before them."""

    start: int
    length: int
    distance: int


@dataclass(frozen=True)
class Sample:
    bytes: np.ndarray
    weight: np.ndarray  # float32, one for each byte
    answers: tuple[Answer, ...]


Task = Callable[[np.random.Generator, Text, int], Sample]


def passkey(rng: np.random.Generator, text: Text, length: int, every: int = 256) -> Sample:
    """Text with a line `# key name=12345` for `every` so many bytes; each comes again, up to the whole length on."""
    line = len(b"\n# key abcd=12345\n")
    count = max(1, length // every)
    keys = [_key(rng) for _ in range(count)]
    filler = text.window(rng, length - 2 * count * line)
    return _with_lines(rng, filler, keys, length)


def one_passkey(rng: np.random.Generator, text: Text, length: int, distance: int) -> Sample:
    """The classic form: one key, `distance` bytes of text, and the question at the very end."""
    key = _key(rng)
    before, between = length - distance - len(key), distance - len(key)
    bytes_ = np.concatenate([text.window(rng, before), key, text.window(rng, between), key])
    return _weighed(bytes_, [(before, length - len(key))])


def passkeys_at(rng: np.random.Generator, text: Text, length: int, distances: tuple[int, ...]) -> Sample:
    """Several keys in one row, each asked for again so many bytes later; the questions stand together at the end."""
    bytes_ = text.window(rng, length).copy()
    twice = []
    for place, distance in enumerate(sorted(distances, reverse=True)):
        key = _key(rng)
        second = length - len(key) - 24 * place
        twice.append((second - distance, second))
        for start in twice[-1]:
            bytes_[start : start + len(key)] = key
    return _weighed(bytes_, twice[::-1])


def pairs(rng: np.random.Generator, text: Text, length: int) -> Sample:
    """A list `ab=12 cd=34 ...` and, after it, the same pairs asked for in another order, over and over."""
    size = len(b"ab=12 ")
    head = np.frombuffer(b"\n# pairs ", dtype=np.uint8)
    slots = (length - len(head)) // size
    count = int(rng.integers(min(4, slots // 2), max(5, min(64, slots // 2)) + 1))
    names = rng.choice(26 * 26, count, replace=False)
    made = [np.concatenate([_LETTERS[[n // 26, n % 26]], [ord("=")], rng.choice(_DIGITS, 2), [32]]) for n in names]
    order = list(range(count))
    while len(order) < slots:
        order += list(rng.permutation(count))
    order = order[:slots]
    body = np.concatenate([head, *[made[which] for which in order]]).astype(np.uint8)
    bytes_ = np.concatenate([body, np.full(length - len(body), 10, np.uint8)])
    weight = np.zeros(length, np.float32)
    answers = []
    last: dict[int, int] = {}
    for slot, which in enumerate(order):
        start = len(head) + slot * size + 3
        if which in last:
            weight[start : start + 2] = 1
            answers.append(Answer(start, 2, start - last[which]))
        last.setdefault(which, start)
    return Sample(bytes_, weight, tuple(answers))


def copying(rng: np.random.Generator, text: Text, length: int) -> Sample:
    """Random words, and the same words again."""
    head = np.frombuffer(b"\n# again ", dtype=np.uint8)
    half = int(rng.integers(max(8, length // 16), (length - 2 * len(head)) // 2 + 1))
    filler = text.window(rng, length - 2 * (half + len(head)))
    words = rng.choice(np.append(_LETTERS, 32), half).astype(np.uint8)
    bytes_ = np.concatenate([filler, head, words, head, words])
    first, second = length - 2 * half - len(head), length - half
    weight = np.ones(length, np.float32)
    weight[first : first + half] = 0
    weight[second : second + 2] = 0  # where the copy begins can be told only after a byte or two
    return Sample(bytes_, weight, (Answer(second + 2, half - 2, second - first),))


TASKS: dict[str, Task] = {"passkey": passkey, "pairs": pairs, "copying": copying}


def _key(rng: np.random.Generator) -> np.ndarray:
    parts = (b"\n# key ", rng.choice(_LETTERS, 4).tobytes(), b"=", rng.choice(_DIGITS, 5).tobytes(), b"\n")
    return np.frombuffer(b"".join(parts), dtype=np.uint8)


def _with_lines(rng: np.random.Generator, filler: np.ndarray, keys: list[np.ndarray], length: int) -> Sample:
    """The lines put between the bytes of the filler, each twice; a second time may come at once or at the very end."""
    which = np.repeat(np.arange(len(keys)), 2)
    rng.shuffle(which)
    cuts = np.sort(rng.integers(0, len(filler) + 1, len(which)))
    parts: list[np.ndarray] = []
    found: dict[int, int] = {}
    twice: list[tuple[int, int]] = []
    at = position = 0
    for cut, key in zip(cuts, which, strict=True):
        parts += [filler[at:cut], keys[key]]
        position += int(cut) - at
        if int(key) in found:
            twice.append((found[int(key)], position))
        found[int(key)] = position
        position += len(keys[key])
        at = int(cut)
    return _weighed(np.concatenate([*parts, filler[at:]])[:length], twice)


def _weighed(bytes_: np.ndarray, twice: list[tuple[int, int]]) -> Sample:
    """What stood at the first place of each pair is noise there and an answer at the second."""
    weight = np.ones(len(bytes_), np.float32)
    name, value = len(b"\n# key "), len(b"\n# key abcd=")
    answers = []
    for first, second in twice:
        for place in (first, second):
            weight[place + name : place + name + 4] = 0
        weight[first + value : first + value + 5] = 0
        weight[second + value : second + value + 5] = 4
        answers.append(Answer(second + value, 5, second - first))
    return Sample(bytes_, weight, tuple(answers))
