"""Attention without a softmax's sink: sigmoid or elu weights, virtual sink keys, kernel weights (arXiv 2410.10781)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import elu, linear

from ...compiler.functional import attention
from ...compiler.live import KEPT
from ...compiler.mechanism import Limit, Mechanism, Param, register
from ...compiler.primitives.attend import Segment, attend
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.starts import normal, uniform
from ...compiler.symbols import table

SIMILARITIES = ("softmax", "sigmoid", "elu")
SINKS = ("none", "k_bias", "kv_bias", "v_bias", "off_by_one", "logit")
KERNELS = (None, "linear", "elu", "mlp")
NORMALISED = (False, True, "position", "sqrt_position")


@register("sigmoid")
@dataclass(frozen=True)
class Sigmoid(Mechanism):
    """w_ij = g(scale * q_i . k_j + bias), o_i = sum_j w_ij v_j: rows need not sum to 1, no key must take the rest.

    >>> q, k, v = problem()
    >>> plain = torch.sigmoid(q @ k.mT * 8**-0.5 - 2.0) @ v
    >>> torch.allclose(attention(q, k, v, "sigmoid", bias=-2.0), plain, atol=1e-6)
    True

    sim        g: sigmoid, elu (elu + 1), or softmax (for the sinks alone).
    normalize  divide by the row's sum + eps; "position" and "sqrt_position" divide by i + 1 and its root instead.
    bias       a number, or "-ln(M)" for as many keys as there are; `length` fixes M to a training length.
    sink       k_bias: one more key k_sink, of value 0, that every query sees; kv_bias: of value v_sink; v_bias: v_sink
               added to every output; off_by_one: a key of logit 0, value 0; logit: of a learned logit z_sink per head.
    kernel     w_ij = scale * phi(q_i) . phi(k_j) instead of sim, phi the identity, elu + 1, or one MLP for q, k and all
               heads; normalize then divides by the sum + eps (elu) or by max(|sum|, 1) (linear, mlp).
    """

    sim: str = "sigmoid"
    normalize: bool | str = False
    eps: float = 1e-8
    bias: float | str = 0.0
    length: int = 0
    softmax_scale: float | None = None
    sink: str = "none"
    kernel: str | None = None

    part = "core"
    kind = "needs recovery"
    honours = KEPT - {"sinks"}
    least = {"length": 0}
    paper = "arXiv 2410.10781"
    tries = (
        {},
        {"sim": "elu", "normalize": True, "bias": -1.0},
        {"bias": "-ln(M)", "normalize": "position"},
        {"sim": "softmax", "sink": "kv_bias"},
        {"sim": "softmax", "sink": "logit", "softmax_scale": 0.2},
        {"kernel": "mlp", "normalize": True},
        {"kernel": "elu", "normalize": True},
    )

    def __post_init__(self) -> None:
        choices: Mapping[str, tuple[Any, ...]] = {
            "sim": SIMILARITIES, "sink": SINKS, "kernel": KERNELS, "normalize": NORMALISED
        }  # fmt: skip
        for knob, known in choices.items():
            if getattr(self, knob) not in known:
                raise Refused(f"{knob}={getattr(self, knob)!r}", where="sigmoid", fits=f"one of {known}")
        if isinstance(self.bias, str) and self.bias != "-ln(M)":
            raise Refused(f"bias={self.bias!r}", where="sigmoid", fits="a number or '-ln(M)'")
        if self.bias and (self.sim == "softmax" or self.kernel):
            raise Refused(f"bias={self.bias!r} without sim sigmoid or elu", where="sigmoid", fits="bias=0")
        if self.sink not in ("none", "v_bias") and (self.kernel or isinstance(self.normalize, str)):
            raise Refused(
                f"sink={self.sink!r} with kernel or a divisor by position", where="sigmoid", fits="sink='none'"
            )
        if self.sink in ("off_by_one", "logit") and self.sim != "softmax":
            raise Refused(f"sink={self.sink!r}, sim={self.sim!r}", where="sigmoid", fits="sim='softmax'")

    def fits(self, site: Site) -> str | None:
        strange = sorted(site.features & {"bias", "softcap"}) if self.kernel else []
        return f"sigmoid: a kernel has no score for {', '.join(strange)} to act on" if strange else None

    def params(self, site: Site) -> Mapping[str, Param]:
        heads, dim = site.heads, site.dim
        own = {}
        if self.sink in ("k_bias", "kv_bias"):
            own["k_sink"] = Param((heads, dim), normal(0.02))
        if self.sink in ("kv_bias", "v_bias"):
            own["v_sink"] = Param((heads, site.v_dim), normal(0.02))
        if self.sink == "logit":
            own["z_sink"] = Param((heads,))
        if self.kernel == "mlp":
            start = uniform(dim)
            own |= {"kernel_w1": Param((dim, dim), start), "kernel_b1": Param((dim,), start)}
            own |= {"kernel_w2": Param((dim, dim), start), "kernel_b2": Param((dim,), start)}
        return own

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        factor = 1.0 if self.softmax_scale is None else self.softmax_scale / site.scale
        after = _divisor(self.normalize)
        if self.kernel is not None:
            o = self._kernel(site, p, q, k, v, factor, after)
        else:
            o = attend(
                q if factor == 1.0 else q * factor, k, v,
                weight=self._weight(k),
                normaliser="softmax" if self.sim == "softmax" else "sum" if self.normalize is True else "none",
                eps=self.eps if self.normalize is True and self.sim != "softmax" else 0.0,
                sink=self._sink_logit(p),
                segments=self._sink_key(p, v),
                after=after,
                site=site,
            )  # fmt: skip
        return o + p.v_sink[:, None] if self.sink == "v_bias" else o

    def _weight(self, k: Tensor) -> Callable[[Any], Any] | None:
        if self.sim == "softmax":
            return None
        bias: Any = self.bias
        if bias == "-ln(M)":
            keys = torch.full((1,), self.length or k.shape[2], dtype=torch.promote_types(k.dtype, torch.float32))
            bias = table(-keys.to(k.device).log())[0]
        return (lambda s: torch.sigmoid(s + bias)) if self.sim == "sigmoid" else (lambda s: elu(s + bias) + 1.0)

    def _sink_logit(self, p: Any) -> Callable[..., Any] | None:
        if self.sink == "off_by_one":
            return lambda: 0.0
        if self.sink != "logit":
            return None
        logit = table(p.z_sink)
        return lambda h: logit[h]

    def _sink_key(self, p: Any, v: Tensor) -> tuple[Segment, ...]:
        """One key that stands beside the sequence: seen by every query, never rotated, in no cache."""
        if self.sink not in ("k_bias", "kv_bias"):
            return ()
        value = p.v_sink if self.sink == "kv_bias" else v.new_zeros((p.k_sink.shape[0], v.shape[3]))
        return (Segment(p.k_sink[None, :, None], value[None, :, None]),)

    def _kernel(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor, factor: float, after: Any) -> Tensor:
        wide = torch.promote_types(v.dtype, torch.float32)  # signed weights cancel: rounding waits until the end
        q, k, v, narrow = self._phi(p, q, wide) * factor, self._phi(p, k, wide), v.to(wide), v.dtype
        if self.normalize is not True or self.kernel == "elu":
            rule = "sum" if self.normalize is True else "none"
            o: Tensor = attend(q, k, v, weight=lambda s: s, normaliser=rule, eps=self.eps, after=after, site=site)
            return o.to(narrow)
        ones = v.new_ones((*v.shape[:3], 1))  # a value of 1 carries the row's sum along
        both = attend(q, k, torch.cat((v, ones), -1), weight=lambda s: s, normaliser="none", site=site)
        return (both[..., :-1] / both[..., -1:].abs().clamp(min=1.0)).to(narrow)

    def _phi(self, p: Any, t: Tensor, wide: torch.dtype) -> Tensor:
        t = t.to(wide)
        if self.kernel == "mlp":
            w1, b1, w2, b2 = (w.to(wide) for w in (p.kernel_w1, p.kernel_b1, p.kernel_w2, p.kernel_b2))
            return linear(torch.relu(linear(t, w1, b1)), w2, b2)
        return elu(t) + 1.0 if self.kernel == "elu" else t

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(7)
        softmax = lambda: attention(q, k, v, "softmax", causal=True)
        far = torch.full((4,), -1e4)
        yield Limit(
            "bias far below 0, normalised, is softmax",
            lambda: attention(q, k, v, Sigmoid(bias=-15.0, normalize=True, eps=0.0), causal=True),
            softmax,
        )
        yield Limit("a sink logit far below 0 is softmax",
                    lambda: attention(q, k, v, Sigmoid("softmax", sink="logit"), params={"z_sink": far}, causal=True),
                    softmax)  # fmt: skip
        yield Limit("off by one halves a single key of score 0",
                    lambda: attention(q, 0 * k[:, :, :1], v[:, :, :1], Sigmoid("softmax", sink="off_by_one"))[:, :, :1],
                    lambda: v[:, :, :1] / 2)  # fmt: skip
        yield Limit("unnormalised weights add over sets of keys", lambda: attention(q, k, v, Sigmoid()),
                    lambda: attention(q, k[:, :, :3], v[:, :, :3], Sigmoid())
                    + attention(q, k[:, :, 3:], v[:, :, 3:], Sigmoid()))  # fmt: skip
        yield Limit("'-ln(M)' is that number", lambda: attention(q, k, v, Sigmoid(bias="-ln(M)")),
                    lambda: attention(q, k, v, Sigmoid(bias=-math.log(7))))  # fmt: skip


def _divisor(normalize: bool | str) -> Callable[[Any, Any], Any] | None:
    match normalize:
        case "position":
            return lambda w, i: w / (i + 1)
        case "sqrt_position":
            return lambda w, i: w / torch.sqrt(i + 1)
    return None
