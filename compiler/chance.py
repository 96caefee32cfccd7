"""Chance that a graph does not see: numbers that a forward draws in Python, and seeds that it sets.

A trace makes constants of what random and numpy drew and leaves seeds out: its graph would answer differently. A draw
of Python's that decides nothing, as for layers that are dropped in train() alone, is in the graph in no way.
"""

from __future__ import annotations

import pickle
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch

_UNLIKELY = 0x5EED_0DD  # a seed that a forward sets must show as a change


class UnseenChance(Exception):
    """A forward that draws or seeds where no graph sees it."""


@contextmanager
def no_unseen_chance() -> Iterator[None]:
    """Raise where what runs inside draws from Python's or numpy's generator, or seeds torch's; all are put back."""
    before = random.getstate(), numpy.random.get_state(), torch.manual_seed
    random.seed(_UNLIKELY)
    numpy.random.seed(_UNLIKELY)
    ours = _drawn()
    torch.manual_seed = torch.random.manual_seed = _seeding(torch.manual_seed)
    try:
        yield
        moved = [f"draws by {name}" for name, state in _drawn().items() if state != ours[name]]
    finally:
        torch.manual_seed = torch.random.manual_seed = before[2]
        random.setstate(before[0])
        numpy.random.set_state(before[1])
    if moved:
        raise UnseenChance(f"its forward {' and '.join(moved)}, and a graph would repeat that draw")


def layers_drawn(model: torch.nn.Module) -> list[str]:
    """Settings above 0 by which a model leaves layers out at random in train(), as its modules and their configs name
    them.
    """
    held = [vars(each) for module in model.modules() for each in (module, getattr(module, "config", None)) if each]
    named = ((name, value) for each in held for name, value in each.items() if "layerdrop" in str(name).lower())
    return sorted({name for name, value in named if isinstance(value, int | float) and value > 0})


SAMPLES = 0.0, 0.5, 1.0 - 2.0**-53  # a draw is compared with bounds: what all of these leave alone, it leaves alone


@contextmanager
def drawing(number: float) -> Iterator[None]:
    """What runs inside draws this number, 0 <= number < 1, in Python; raise where it draws in other ways."""
    tracing, before = threading.get_ident(), (random.random, random.uniform)

    def one() -> float:
        return number if threading.get_ident() == tracing else before[0]()

    def between(a: float, b: float) -> float:
        return a + (b - a) * one()

    random.random, random.uniform = one, between
    try:
        with no_unseen_chance():
            yield
    finally:
        random.random, random.uniform = before


def _seeding(manual_seed: Callable[..., Any]) -> Callable[..., Any]:
    """torch.manual_seed, refused where a forward is traced; other threads may go on seeding."""
    tracing = threading.get_ident()

    def seed(value: Any) -> Any:
        if threading.get_ident() != tracing:
            return manual_seed(value)
        raise UnseenChance(f"its forward seeds torch's generator (torch.manual_seed({value})), and a graph would not")

    return seed


def _drawn() -> dict[str, bytes]:
    states = {"Python's random": random.getstate(), "numpy.random": numpy.random.get_state()}
    return {name: pickle.dumps(state) for name, state in states.items()}
