"""Which linear layers keep how many bits: each changed alone and measured, then all chosen under a budget.

What a choice costs is the squared error of the model's output with this one layer changed, relative to the output.
Small errors of different layers add up nearly enough, so that bytes are spent where they take most error away: along
each layer's lower hull of (bytes, error), the steepest piece first.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .containers import take_apart
from .mechanism import mechanism
from .quantize import Scheme
from .quantized_linear import QuantizedLinear
from .recipe import Recipe
from .recipe_load import load_recipe
from .refusal import Refused
from .steps import vocabulary

KEEP = "keep"
Wish = str | Mapping[str, Mapping[str, Any]]  # "w8", {"w4a16": {"group_size": 64}}
Call = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True)
class Option:
    """One layer by one scheme: what its weights take, and the error of the model's output with it alone changed."""

    scheme: str  # "keep", "w4a16(group_size=64)"
    wish: Any  # as a recipe says it
    bytes: int
    error: float


@dataclass(frozen=True)
class BitPlan:
    """The options of every layer, and the one chosen for each under the budget."""

    options: Mapping[str, tuple[Option, ...]]
    chosen: Mapping[str, Option]
    weights: Mapping[str, int]
    budget: float  # bits a weight, scales and zeros included
    shared: tuple[str, ...] = ()  # linear layers whose weights are others' as well: they stay

    @property
    def bits(self) -> float:
        """What is spent, in bits a weight."""
        return 8 * sum(o.bytes for o in self.chosen.values()) / sum(self.weights.values())

    @property
    def recipe(self) -> Recipe:
        """The most frequent choice for all, those that differ by name before it."""
        wishes = {path: option.wish for path, option in self.chosen.items()}
        (most, _), *_ = Counter(option.scheme for option in self.chosen.values()).most_common()
        rest = next(option.wish for option in self.chosen.values() if option.scheme == most)
        named = {path: wish for path, wish in wishes.items() if wish != rest}
        stay = dict.fromkeys(self.shared, KEEP)
        return load_recipe({"version": 1, "quantize": {**stay, **named, "*": rest}}, vocabulary())

    def text(self) -> str:
        """A row a layer, those that cost most when made smallest first."""
        lines = [f"{self.bits:.2f} bits a weight of {self.budget:g}; squared error of the output, one layer at a time"]
        worst = lambda path: -max(option.error for option in self.options[path])
        for path in sorted(self.options, key=worst):
            tried = "  ".join(f"{o.scheme} {o.error:.2g}" for o in self.options[path] if o.scheme != KEEP)
            lines.append(f"{path:<40} {self.chosen[path].scheme:<28} {tried}")
        return "\n".join(lines)

    __str__ = text

    def to_dict(self) -> dict[str, Any]:
        options = {path: [vars(option) for option in found] for path, found in self.options.items()}
        chosen = {path: option.scheme for path, option in self.chosen.items()}
        return {"bits": self.bits, "budget": self.budget, "chosen": chosen, "options": options}


def plan_bits(model: nn.Module, calls: Sequence[Call], schemes: Sequence[Wish], bits: float) -> BitPlan:
    """Measure every linear layer by every scheme on these calls, and choose within so many bits a weight."""
    made = [(wish, _scheme(wish)) for wish in schemes]
    trial = _twin(model).eval()
    layers, shared = _layers(trial)
    if not layers:
        raise Refused(
            "no linear layer with weights of its own", where=type(model).__name__, fits="a model that has some"
        )
    expected = [_output(trial, call) for call in calls]
    options: dict[str, tuple[Option, ...]] = {}
    with tqdm(total=len(layers) * len(made), desc="one layer at a time", leave=False) as bar:
        for path, layer in layers.items():
            whole = Option(KEEP, KEEP, layer.weight.numel() * layer.weight.element_size(), 0.0)  # type: ignore[operator]
            found = [whole]
            for wish, scheme in made:
                found += _tried(trial, path, wish, scheme, calls, expected)
                bar.update()
            options[path] = tuple(found)
    weights = {path: int(layer.weight.numel()) for path, layer in layers.items()}  # type: ignore[operator]
    count = sum(weights.values())
    least = 8 * sum(min(option.bytes for option in found) for found in options.values()) / count
    if bits < least:
        fits = f"{math.ceil(least * 100) / 100:.2f} or more, or a scheme with fewer: scales count as well"
        raise Refused(f"{bits:g} bits a weight", where="plan_bits", fits=fits)
    chosen = choose(options, int(bits * count / 8))
    return BitPlan(options, chosen, weights, bits, shared)


def choose(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """One option a layer within so many bytes: from the smallest of each, the steepest pieces of their hulls first.

    >>> small, large = Option("w4", "w4", 4, 1.0), Option("w8", "w8", 8, 0.1)
    >>> other = Option("w4", "w4", 4, 0.2), Option("w8", "w8", 8, 0.1)
    >>> {path: option.scheme for path, option in choose({"a": (small, large), "b": other}, 12).items()}
    {'a': 'w8', 'b': 'w4'}
    """
    hulls = {path: _hull(found) for path, found in options.items()}
    chosen = {path: hull[0] for path, hull in hulls.items()}
    spent = sum(option.bytes for option in chosen.values())
    if spent > budget:
        fits = f"at least {spent} bytes, or a scheme with fewer bits"
        raise Refused(f"a budget of {budget} bytes", where="bits", fits=fits)
    steps = [(_slope(now, more), path, now, more) for path, hull in hulls.items() for now, more in pairwise(hull)]
    full = set[str]()
    for _, path, now, more in sorted(steps, key=lambda step: step[0]):
        if path in full or spent + more.bytes - now.bytes > budget:
            full.add(path)
            continue
        chosen[path] = more
        spent += more.bytes - now.bytes
    return chosen


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options that some price of a byte makes best, smallest first: less and less error saved a byte."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.error)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(a: Option, b: Option) -> float:
    return (b.error - a.error) / (b.bytes - a.bytes)


def _tried(
    trial: nn.Module, path: str, wish: Any, scheme: Scheme, calls: Sequence[Call], expected: Sequence[Tensor]
) -> Iterator[Option]:
    """The option that a scheme is for a layer; none where its groups do not fit."""
    layer = trial.get_submodule(path)
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    try:
        small = scheme.layer(weight.t() if type(layer).__name__ == "Conv1D" else weight, bias)
    except Refused:
        return
    trial.set_submodule(path, small)
    try:
        pairs = [(_output(trial, call), y) for call, y in zip(calls, expected, strict=True)]
    finally:
        trial.set_submodule(path, layer)
    lost = sum(float((y - x).double().square().sum()) for x, y in pairs)
    size = sum(float(y.double().square().sum()) for _, y in pairs)
    yield Option(repr(scheme), wish, _bytes(small), lost / max(size, 1e-30))


def _bytes(layer: QuantizedLinear) -> int:
    return sum(t.numel() * t.element_size() for t in layer.buffers())


def _output(model: nn.Module, call: Call) -> Tensor:
    """The largest real tensor of an output that is no cache: logits, hidden states, embeddings."""
    with torch.no_grad():
        leaves, _ = take_apart(model(*call[0], **call[1]), "output")
    real = [leaf.tensor for leaf in leaves if isinstance(leaf.tensor, Tensor) and not leaf.cached]
    real = [t for t in real if t.is_floating_point()]
    if not real:
        raise Refused(
            "no output of real numbers", where=type(model).__name__, fits="a model that gives logits or states"
        )
    return max(real, key=lambda t: t.numel()).float()


def _layers(model: nn.Module) -> tuple[dict[str, nn.Module], tuple[str, ...]]:
    """Linear layers by path, gpt2's Conv1D too, and the paths of those whose weights are others' as well."""
    readers = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found = {path: m for path, m in model.named_modules(remove_duplicate=False) if path and _linear(m)}
    shared = tuple(path for path, m in found.items() if readers[id(m.weight)] > 1)
    return {path: m for path, m in found.items() if path not in shared}, shared


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _twin(model: nn.Module) -> nn.Module:
    """Modules of its own around the same tensors."""
    return copy.deepcopy(model, {id(t): t for t in chain(model.parameters(), model.buffers())})


def _scheme(wish: Wish) -> Scheme:
    name, knobs = (wish, {}) if isinstance(wish, str) else next(iter(wish.items()))
    found = mechanism(name, **knobs)
    if not isinstance(found, Scheme):
        raise Refused(f"{name!r} is no scheme of weights", where="bits", fits="w4a16, w8, w8a8, qserve")
    if found.fitted:
        raise Refused(f"{found!r} is fitted to calls", where="bits", fits="rounding: nearest here, gptq in the recipe")
    return found
