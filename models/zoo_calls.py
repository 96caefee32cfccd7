"""The kinds of calls that a model of the zoo takes, and how far a hosted one is from the original at each."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..compiler.containers import take_apart
from ..compiler.hosting import original
from ..compiler.refusal import Refused
from ..compiler.signature import forward_signature
from .zoo_family import Family, Inputs

Make = Callable[[nn.Module, dict[str, Any]], dict[str, Any] | None]  # None: the model takes no such call


@dataclass(frozen=True)
class Kind:
    """One kind of call, made from the family's own; `before` is done to both models first."""

    name: str
    make: Make
    before: Callable[[nn.Module], object] | None = None
    positional: bool = False


@dataclass(frozen=True)
class Answer:
    """What came of one kind: "ok" with the largest difference, "refused", "as original" (both raise), "wrong", ..."""

    kind: str
    verdict: str
    difference: float = math.nan
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.difference:.0e}" if self.verdict == "ok" else self.verdict


def reference(family: Family, spelling: str = "") -> nn.Module:
    """The family's model with nothing random in train(): no dropout, no masks in time, no dropped layers."""
    return without_chance(family.build(spelling or family.spellings[0]))


def without_chance(model: nn.Module) -> nn.Module:
    config = getattr(model, "config", None)
    if hasattr(config, "apply_spec_augment"):
        config.apply_spec_augment = False  # type: ignore[union-attr]
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or (name == "p" and "Drop" in type(module).__name__)):
                setattr(module, name, 0.0)
    return model


def named(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The family's call with every argument by name."""
    args, kwargs = inputs
    return dict(forward_signature(model).bind(*args, **kwargs).arguments) | kwargs


def answers(model: nn.Module, fast: nn.Module, inputs: Inputs) -> Iterator[Answer]:
    """Every kind in turn; what is done to the models (train, dtype) comes last and stays."""
    given = named(model, inputs)
    for kind in KINDS:
        yield answer(kind, model, fast, given)


def answer(kind: Kind, model: nn.Module, fast: nn.Module, given: dict[str, Any]) -> Answer:
    asked = kind.make(model, given)
    if asked is None:
        return Answer(kind.name, "-")
    if kind.before is not None:
        kind.before(model), kind.before(fast)
    try:
        wanted = _run(kind, model, asked)
    except Exception as error:
        return _as_original(kind, fast, asked, error)
    try:
        found = _run(kind, fast, asked)
    except Refused as refused:
        return Answer(kind.name, "refused", reason=str(refused))
    except Exception as error:
        return Answer(kind.name, "wrong", reason=f"{type(error).__name__}: {error}".splitlines()[0])
    return compared(kind.name, wanted, found, _tolerance(model))


def compared(kind: str, wanted: Any, found: Any, tolerance: float) -> Answer:
    """Both results taken apart: the same types and names, and the tensors at most this far apart."""
    ours, our_layout = take_apart(found, "")
    theirs, their_layout = take_apart(wanted, "")
    if our_layout != their_layout:
        return Answer(kind, "wrong", reason=f"gives {our_layout}, the original {their_layout}")
    worst = 0.0
    for leaf, other in zip(ours, theirs, strict=True):
        one, two = leaf.tensor, other.tensor
        if one is None or two is None:
            if one is not two:
                return Answer(kind, "wrong", reason=f"{leaf.path} is missing")
            continue
        if one.shape != two.shape or one.dtype is not two.dtype:
            return Answer(
                kind, "wrong", reason=f"{leaf.path} is {one.dtype} {[*one.shape]}, not {two.dtype} {[*two.shape]}"
            )
        scale = max(1.0, float(two.double().abs().max())) if two.numel() and two.dtype is torch.bfloat16 else 1.0
        if one.numel():
            apart = (
                (one.double() - two.double())
                .abs()
                .nan_to_num(nan=0.0 if bool((one.isnan() == two.isnan()).all()) else math.inf)
            )
            worst = max(worst, float(apart.max()) / scale)
    if worst <= tolerance:
        return Answer(kind, "ok", worst)
    return Answer(kind, "wrong", worst, f"{worst:.1e} apart")


def _as_original(kind: Kind, fast: nn.Module, asked: dict[str, Any], error: Exception) -> Answer:
    said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    try:
        _run(kind, fast, asked)
    except Exception:
        return Answer(kind.name, "as original", reason=said)
    return Answer(kind.name, "wrong", reason=f"answers where the original raises {said}")


def _run(kind: Kind, model: nn.Module, asked: dict[str, Any]) -> Any:
    asked = copy.deepcopy(asked)  # a call may change its arguments
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a router may draw in train()
        if not kind.positional:
            return model(**asked)
        parameters = forward_signature(original(model)).parameters
        last = max(k for k, name in enumerate(parameters) if name in asked)
        if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in list(parameters.values())[: last + 1]):
            return model(**asked)
        return model(*[asked.get(n, p.default) for n, p in list(parameters.items())[: last + 1]])


def _tolerance(model: nn.Module) -> float:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return 1e-5 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps * 4  # of the largest value, a few roundings


# --- the kinds --------------------------------------------------------------------------------------------------------


def _takes(model: nn.Module, *names: str) -> bool:
    return all(name in forward_signature(original(model)).parameters for name in names)


def _same(model: nn.Module, given: dict[str, Any]) -> dict[str, Any] | None:
    return dict(given)


def _flag(name: str, value: bool) -> Make:
    def make(model: nn.Module, given: dict[str, Any]) -> dict[str, Any] | None:
        if _takes(model, name):
            return given | {name: value}
        known = (
            hasattr(model, "config") and hasattr(model.config, name) and "kwargs" in forward_signature(model).parameters
        )
        return given | {name: value} if known else None

    return make


def _labels(model: nn.Module, given: dict[str, Any]) -> dict[str, Any] | None:
    return given | {"labels": given["input_ids"].clone()} if _takes(model, "labels") and "input_ids" in given else None


def _padding(model: nn.Module, given: dict[str, Any]) -> dict[str, Any] | None:
    if not _takes(model, "attention_mask") or "input_ids" not in given:
        return None
    mask = torch.ones_like(given["input_ids"])
    mask[1, -3:] = 0
    return given | {"attention_mask": mask}


def _embedded(model: nn.Module, given: dict[str, Any]) -> dict[str, Any] | None:
    if not _takes(model, "inputs_embeds") or "input_ids" not in given or "pixel_values" in given:
        return None
    table = original(model).get_input_embeddings()  # type: ignore[operator]
    rest = {n: v for n, v in given.items() if n != "input_ids"}
    with torch.no_grad():
        return rest | {"inputs_embeds": table(given["input_ids"]).detach()}


def _longer(model: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """Three in the batch, and sequences four longer."""

    def grown(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        value = torch.cat([value, value[:1]])
        whole = not value.is_floating_point() and value.ndim == 2
        rows = value.ndim == 3 and name in ("x", "src", "tgt", "encoder_hidden_states")
        if name == "input_values" and value.ndim == 2:
            return torch.cat([value, value], 1)
        return torch.cat([value, value[:, -4:]], 1) if whole or rows else value

    return {n: grown(n, v) for n, v in given.items()}


def _alone(model: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    return {n: v[:1] if isinstance(v, Tensor) and v.ndim else v for n, v in given.items()}


def _larger_image(model: nn.Module, given: dict[str, Any]) -> dict[str, Any] | None:
    images = {n: v for n, v in given.items() if isinstance(v, Tensor) and v.ndim == 4}
    if not images:
        return None
    larger = {n: torch.cat([torch.cat([v, v[:, :, :, ::2]], 3), torch.cat([v, v[:, :, :, ::2]], 3)[:, :, ::2]], 2)
              for n, v in images.items()}  # fmt: skip
    flag = {"interpolate_pos_encoding": True} if _takes(model, "interpolate_pos_encoding") else {}
    return given | larger | flag


def _longer_decoder(model: nn.Module, given: dict[str, Any]) -> dict[str, Any] | None:
    ids = given.get("decoder_input_ids")
    return None if ids is None else given | {"decoder_input_ids": torch.cat([ids, ids[:, :2]], 1)}


def _in_bf16(model: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    return {n: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in given.items()}


KINDS: tuple[Kind, ...] = (
    Kind("call", _same),
    Kind("positional", _same, positional=True),
    Kind("batch 1", _alone),
    Kind("longer", _longer),
    Kind("image", _larger_image),
    Kind("padding", _padding),
    Kind("labels", _labels),
    Kind("embeds", _embedded),
    Kind("decoder", _longer_decoder),
    Kind("cache", _flag("use_cache", True)),
    Kind("no cache", _flag("use_cache", False)),
    Kind("hidden", _flag("output_hidden_states", True)),
    Kind("tuple", _flag("return_dict", False)),
    Kind("weights", _flag("output_attentions", True)),
    Kind("train", _same, before=nn.Module.train),
    Kind("bf16", _in_bf16, before=lambda m: m.eval().bfloat16()),
)
