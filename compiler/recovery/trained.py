"""What a recovery moves: the recipe's new tensors, low-rank deltas beside weights, weights themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..ownership import own
from ..refusal import Refused
from ..site import Site

PROJECTIONS = ("q", "k", "v", "o")  # roles of the weights around a site


class Trained:
    """Tensors by name, as an optimizer and a checkpoint see them; the model is changed only inside `applied`."""

    def __init__(self, model: Any, sites: Iterable[Site], train: str, *, rank: int = 8, seed: int = 0) -> None:
        self.model = model
        self.new = dict(model.new_parameters())
        around = _around(model, sites) if train in ("lora", "sites") else {}
        every = {n: p for n, p in model.named_parameters() if n not in self.new} if train == "all" else {}
        self.full = every if train == "all" else around if train == "sites" else {}
        self.deltas = {n: _delta(n, w, rank, seed) for n, w in around.items()} if train == "lora" else {}
        self.tensors: dict[str, nn.Parameter] = {**self.new, **self.full}
        for name, (a, b) in self.deltas.items():
            self.tensors |= {f"{name}|a": a, f"{name}|b": b}
        self.tensors = {n: t for n, t in self.tensors.items() if t.is_floating_point() and t.numel()}
        self._nothing(train, sites)

    def _nothing(self, train: str, sites: Iterable[Site]) -> None:
        if self.tensors:
            return
        places = ", ".join(s.path for s in sites) or "no rewritten site"
        fits = "train: lora, sites or all" if train == "new" else "train: all, or a mechanism with tensors of its own"
        raise Refused(
            f"nothing to train: train={train}, and there is no such tensor at {places}", where="recover", fits=fits
        )

    @property
    def touched(self) -> frozenset[str]:
        """Names of the original's weights that change."""
        return frozenset((*self.full, *self.deltas))

    @property
    def count(self) -> int:
        return sum(t.numel() for t in self.tensors.values())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, only these tensors take gradients; the flags of all parameters are put back."""
        before = [(p, p.requires_grad) for p in self.model.parameters()]
        mine = {id(t) for t in self.tensors.values()}
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in mine)
        try:
            yield
        finally:
            for parameter, flag in before:
                parameter.requires_grad_(flag)
                if id(parameter) in mine:
                    parameter.grad = None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model's weights have their deltas added; the backward pass belongs inside as well."""
        held = [(*_place(self.model, name), name) for name in self.deltas]
        before = [module._parameters[last] for module, last, _ in held]
        for module, last, name in held:
            module._parameters[last] = self._sum(name, module._parameters[last])
        try:
            yield
        finally:
            for (module, last, _), weight in zip(held, before):
                module._parameters[last] = weight

    def _sum(self, name: str, weight: Any) -> Any:
        a, b = self.deltas[name]
        found = weight.detach() + (b @ a).to(weight.dtype)
        # a capture while judging takes parameters only
        return found if torch.is_grad_enabled() else nn.Parameter(found, requires_grad=False)

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(state[name])

    def merge(self) -> None:
        """The deltas become part of the weights; memory that is shared with the original is copied first."""
        with torch.no_grad():
            for name, (a, b) in self.deltas.items():
                module, last = _place(self.model, name)
                weight: Any = module._parameters[last]
                own(weight)
                weight.add_((b @ a).to(weight.dtype))

    def attach(self) -> None:
        """The deltas stay apart, as torch's parametrizations of the weights."""
        for name, (a, b) in self.deltas.items():
            module, last = _place(self.model, name)
            parametrize.register_parametrization(module, last, LowRank(a, b))
            module.train(module.training)  # what is new in it as well

    def digest(self) -> str:
        """Of the weights that change, as they are now."""
        found = hashlib.sha256()
        weights = dict(self.model.named_parameters())
        for name in sorted(self.touched):
            found.update(name.encode())
            found.update(weights[name].detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


class LowRank(nn.Module):
    """W + b a, as torch.nn.utils.parametrize wants it; `remove_parametrizations` merges it."""

    def __init__(self, a: nn.Parameter, b: nn.Parameter) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).to(weight.dtype)


def _around(model: nn.Module, sites: Iterable[Site]) -> dict[str, nn.Parameter]:
    """The matrices of the linears around sites, fused ones once."""
    known = dict(model.named_parameters(remove_duplicate=False))
    names = dict.fromkeys(name for site in sites for role, name in site.weights if role in PROJECTIONS)
    found = {n: known[n] for n in names if n in known and known[n].ndim == 2}
    return {n: p for k, (n, p) in enumerate(found.items()) if all(p is not q for q in list(found.values())[:k])}


def _delta(name: str, weight: nn.Parameter, rank: int, seed: int) -> tuple[nn.Parameter, nn.Parameter]:
    """a (r, in) random by the weight's name and the seed, b (out, r) zero: the sum starts as the weight."""
    drawn = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{name}{seed}".encode()).digest()[:4], "big"))
    width = min(rank, *weight.shape)
    a = torch.randn(width, weight.shape[1], generator=drawn) * weight.shape[1] ** -0.5
    place: dict[str, Any] = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
    return nn.Parameter(a.to(**place)), nn.Parameter(torch.zeros(weight.shape[0], width, **place))


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last
