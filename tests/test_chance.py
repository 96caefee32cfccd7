"""Numbers that a forward draws in Python, and seeds that it sets, are in no graph: such models are refused, by name."""

from __future__ import annotations

import random
import threading

import numpy
import pytest
import torch
from small_models import stack
from torch import Tensor, nn

import reattend
from reattend.compiler.capture import capture
from reattend.compiler.refusal import Refused


class Chance(nn.Module):
    """Attention behind a step that draws."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.body = how, stack(1)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "python":
            x = x * random.random()
        elif self.how == "numpy":
            x = x * float(numpy.random.rand())
        elif self.how == "seed":
            torch.manual_seed(0)
        return self.body(x + torch.rand_like(x))


SAID = {
    "python": "its forward draws by Python's random, and a graph would repeat that draw",
    "numpy": "its forward draws by numpy.random, and a graph would repeat that draw",
    "seed": r"its forward seeds torch's generator \(torch.manual_seed\(0\)\).* \(test_chance.py:\d+, in forward\)",
}


@pytest.mark.parametrize("how", SAID)
def test_chance_that_no_graph_has_is_refused_by_name(how: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(Refused, match=SAID[how]) as said:
        capture(Chance(how).eval(), (torch.randn(2, 5, 32),))
    assert "without a seed" in said.value.fits


class Dropping(nn.Module):
    """Draws for every layer, in eval() too, and drops some in train() (MusicGen)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.body = rate, stack(1)

    def forward(self, x: Tensor) -> Tensor:
        drawn = random.uniform(0, 1)
        return x if self.training and drawn < self.rate else self.body(x)


def test_a_draw_that_decides_nothing_is_no_chance() -> None:
    x, state = torch.randn(2, 5, 32), random.getstate()
    for model in (Dropping(0.3).eval(), Dropping(0.0).train()):
        fast = reattend.optimize(model, "exact", (x,), measure=False)
        torch.testing.assert_close(fast(x), model.body(x))
        assert "Python's random" not in fast.report.text()
    random.setstate(state)
    for draw in (random.uniform, random.random):
        assert draw.__name__ in ("uniform", "random") and draw.__self__ is random._inst  # type: ignore[attr-defined]
    with pytest.raises(Refused, match="draws by Python's random"):
        capture(Dropping(0.3).train(), (x,))


class LayerDrop(nn.Module):
    """A layer is left out by torch's draw (wav2vec 2.0, BART)."""

    def __init__(self) -> None:
        super().__init__()
        self.layerdrop, self.body = 0.1, stack(1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.layerdrop > 0 and torch.rand([]) < self.layerdrop:
            return x
        y: Tensor = self.body(x)
        return y


def test_layers_left_out_at_random_are_named_with_the_way_out() -> None:
    x, model = torch.randn(2, 5, 32), LayerDrop()
    fast = reattend.optimize(model.eval(), "exact", (x,), measure=False)
    fast.train()
    with pytest.raises(Refused, match="layerdrop of 0 while it trains"):
        fast(x)
    fast.layerdrop = 0.0
    torch.testing.assert_close(fast(x), model.body(x))


def test_draws_in_the_graph_are_as_the_models_own() -> None:
    model = Chance("none").eval()
    fast = reattend.optimize(model, "exact", (torch.randn(2, 5, 32),), measure=False)
    x = torch.randn(2, 7, 32)
    torch.manual_seed(3)
    wanted = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(fast(x), wanted)


def test_what_does_not_draw_is_rewritten_in_its_place() -> None:
    model = Chance("seed").eval()
    fast = reattend.optimize(model, "exact", (torch.randn(2, 5, 32),), measure=False)
    assert len(fast.sites) == 1 and any("torch.manual_seed(0)" in note for note in fast.report.notes)
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(fast(x), model(x))


def test_no_generator_is_moved_and_other_threads_may_seed() -> None:
    before = random.getstate(), numpy.random.get_state()[1].copy(), torch.get_rng_state()
    stop = threading.Event()

    def seeding() -> None:
        while not stop.wait(0.01):
            torch.manual_seed(5)

    other = threading.Thread(target=seeding)
    other.start()
    try:
        capture(stack(1), (torch.randn(2, 5, 32),))
    finally:
        stop.set()
        other.join()
    assert random.getstate() == before[0] and (numpy.random.get_state()[1] == before[1]).all()
    assert torch.manual_seed is torch.random.manual_seed and torch.manual_seed.__name__ == "manual_seed"
