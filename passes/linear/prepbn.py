"""A LayerNorm that turns into a BatchNorm as it trains, then into the Linear behind it (SLAB, arXiv 2405.11582)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from ...compiler.layers import Module, module
from ...compiler.mechanism import Aux, Limit, Mechanism, Param, register
from ...compiler.primitives.rows import as_type, widened
from ...compiler.problem import hidden
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.starts import constant


@register("prepbn")
@dataclass(frozen=True)
class PRepBN(Mechanism):
    """y = lam LN(x) + (1 - lam) (BN(x) + alpha x) in train(), y = BN(x; running statistics) + alpha x in eval().

    lam = r0 iter / total_step; iter starts at total_step and goes down by one with every forward in train(), after
    `warm` forwards of LN alone. BN's statistics are those of a channel over samples and tokens; the running ones follow
    by `momentum`, with the unbiased variance.

    >>> norm, x = module("prepbn", dim=8, total_step=2).train(), torch.randn(2, 5, 8)
    >>> first, _, last = norm(x), norm(x), norm(x)
    >>> torch.allclose(first, torch.nn.functional.layer_norm(x, (8,), eps=1e-6), atol=1e-5)  # lam is 1
    True
    >>> torch.allclose(last, (x - x.mean((0, 1))) / (x.var((0, 1), correction=0) + 1e-5).sqrt() + x, atol=1e-5)
    True

    `replace_norms` puts it in place of a model's LayerNorms, `fold` makes one Linear of a trained one and the next.
    """

    total_step: int = 300000
    warm: int = 0
    r0: float = 1.0
    momentum: float = 0.1
    bn_eps: float = 1e-5
    ln_eps: float = 1e-6

    part = "insert"
    kind = "needs recovery"
    paper = "arXiv 2405.11582"
    taught = True  # what LN has learned counts in train() alone
    tries = ({}, {"bn_eps": 1e-3})

    def __post_init__(self) -> None:
        if self.total_step < 1 or self.warm < 0:
            found = f"total_step={self.total_step}, warm={self.warm}"
            raise Refused(found, where="prepbn", fits="total_step of 1 or more, warm of 0 or more")

    def params(self, site: Site) -> Mapping[str, Param]:
        wide, one = (site.width,), constant(1.0)
        own = {"alpha": Param((1,), one)}
        for name in ("bn", "ln"):
            own |= {f"{name}_weight": Param(wide, one), f"{name}_bias": Param(wide)}
        return own

    def buffers(self, site: Site) -> Mapping[str, Param]:
        wide = (site.width,)
        return {
            "bn_mean": Param(wide, dtype=torch.float32),
            "bn_var": Param(wide, constant(1.0), torch.float32),
            "iter": Param((), constant(self.total_step), torch.long),
            "warm": Param((), constant(self.warm), torch.long),
        }

    def forward(self, site: Any, p: Any, x: Tensor, train: Tensor | None = None) -> Any:
        rows, narrow = widened(x), x.dtype
        if train is None:
            return as_type(self._batch_normed(p, rows, widened(p.bn_mean), widened(p.bn_var)), narrow)
        mean, var = rows.mean((0, 1)), rows.var((0, 1), correction=0)
        lam, early = self.r0 * p.iter / self.total_step, p.warm > 0
        normed = layer_norm(rows, rows.shape[2:], widened(p.ln_weight), widened(p.ln_bias), self.ln_eps)
        y = torch.where(early, normed, lam * normed + (1 - lam) * self._batch_normed(p, rows, mean, var))
        count = rows[..., 0].numel()
        seen = {"bn_mean": mean, "bn_var": var * (count / max(count - 1, 1))}
        after = {name: torch.where(early, getattr(p, name), getattr(p, name).lerp(new.detach().float(), self.momentum))
                 for name, new in seen.items()}  # fmt: skip
        after["iter"] = torch.where(early, p.iter, (p.iter - 1).clamp(min=0))
        after["warm"] = (p.warm - 1).clamp(min=0)
        return as_type(y, narrow), Aux(buffers=after)

    def _batch_normed(self, p: Any, rows: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        slope = widened(p.bn_weight) * (var + self.bn_eps).rsqrt()
        return (rows - mean) * slope + widened(p.bn_bias) + widened(p.alpha) * rows

    def limits(self) -> Iterable[Limit]:
        x = hidden(5)

        def fresh(train: bool, **own: float) -> Tensor:
            norm = module("prepbn", dim=32).train(train)
            for name, value in own.items():
                nn.init.constant_(norm.reattend.get_parameter(name), value)
            found: Tensor = norm(x).detach()
            return found

        yield Limit("it starts as a LayerNorm", lambda: fresh(True),
                    lambda: layer_norm(x, (32,), eps=1e-6))  # fmt: skip
        yield Limit("without alpha, standard statistics leave a token", lambda: fresh(False, alpha=0.0),
                    lambda: x / (1 + 1e-5) ** 0.5)  # fmt: skip
        yield Limit("alpha adds the token", lambda: fresh(False), lambda: x / (1 + 1e-5) ** 0.5 + x)


def replace_norms(model: nn.Module, **knobs: Any) -> nn.Module:
    """Every LayerNorm over the last axis as a prepbn that starts as it was; the model is changed and returned."""
    for path, norm in list(model.named_modules()):
        if not isinstance(norm, nn.LayerNorm) or len(norm.normalized_shape) != 1:
            continue
        new = module("prepbn", dim=norm.normalized_shape[0], **{"ln_eps": norm.eps, **knobs})
        with torch.no_grad():
            for name, was in (("weight", norm.weight), ("bias", norm.bias)):
                for kind in ("ln", "bn") if was is not None else ():
                    new.reattend.get_parameter(f"{kind}_{name}").copy_(was)
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, new.train(norm.training))
    return model


def fold(norm: Module, linear: nn.Linear) -> nn.Linear:
    """linear(norm(x)) of eval() as one Linear: A x + B per channel goes into the weight and the bias.

    >>> norm, linear, x = module("prepbn", dim=4).eval(), torch.nn.Linear(4, 3), torch.randn(2, 5, 4)
    >>> torch.allclose(fold(norm, linear)(x), linear(norm(x)), atol=1e-5)
    True
    """
    own, mechanism = norm.reattend, norm.mechanism
    if not isinstance(mechanism, PRepBN):
        raise Refused(f"a {mechanism.slug}", where="fold", fits="a module('prepbn')")
    tensors = own.tensors
    slope = tensors["bn_weight"] * (tensors["bn_var"] + mechanism.bn_eps).rsqrt()
    scale, shift = slope + tensors["alpha"], tensors["bn_bias"] - slope * tensors["bn_mean"]
    folded = copy.deepcopy(linear)
    with torch.no_grad():
        moved = linear.weight @ shift
        folded.weight.mul_(scale)
        folded.bias = nn.Parameter(moved if linear.bias is None else linear.bias + moved)
    return folded
