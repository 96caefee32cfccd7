"""The gradient of `scan` on a GPU: three more scans, and what a decay gathers from rows and columns.

A pair (t, s) meets the factors in (s, t], so that the gradient of log a_r is what all rows t >= r hold together, less
what all keys s >= r do: the pairs behind r are in both. Under a decay of each channel a row holds q dq, a key k dk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ...compiler.primitives.operator import Groups
from ...compiler.primitives.scan_spec import ScanSpec
from ...compiler.symbol_eval import evaluate
from ...compiler.symbol_slope import slope
from ...compiler.symbol_text import parse
from ...compiler.symbols import Expr
from .launch_scan import MOST, Operands, channels, operands, refuses, scanned
from .launching import UnfitError
from .scan import Scan, of_spec

FIRST_TABLE = 3  # of the tensors of a call: q, k, v, then tables


def gradients(
    groups: Groups, text: str, results: Sequence[Tensor], given: Mapping[int, Tensor], wanted: Sequence[int]
) -> Sequence[Tensor | None] | None:
    """Gradients from those of o, state and norm; None where the kernels cannot give what is wanted."""
    spec = ScanSpec.of(text)
    if refuses(groups, text):
        return None
    x = operands(groups, spec)
    tables = {"decay": spec.decay, "state": spec.state}
    places = dict(enumerate("qkv")) | {FIRST_TABLE + int(t[1:]): what for what, t in tables.items() if t}
    names = [places.get(k, "") for k in wanted]
    if why_no_gradient(spec, x, names):
        return None
    up = {spec.outputs[n]: g.float() for n, g in given.items()}
    of = _Gradient(spec, x, dict(zip(spec.outputs, results, strict=False)), up, "decay" in names)
    shapes = [t.shape for group in groups for t in group]
    try:
        return [_summed(of.by(name), shapes[k]) if name else None for name, k in zip(names, wanted, strict=True)]
    except UnfitError:
        return None


def why_no_gradient(spec: ScanSpec, x: Operands, learned: Sequence[str]) -> str | None:
    """Why the gradient is left to the plain meaning; None where the kernels have it."""
    if "decay" in learned and not spec.log_decay:
        return "the gradient of factors, of which one may be 0"
    if x.v.shape[-1] + (spec.normaliser == "sum") > MOST:
        return f"the gradient of values of {x.v.shape[-1]} channels and their sum"
    return None


@dataclass(frozen=True)
class _Gradient:
    spec: ScanSpec
    x: Operands
    known: Mapping[str, Tensor]
    up: Mapping[str, Tensor]  # the gradients of outputs
    exact: bool  # a decay's gradient is a difference of sums: o as it was before it was rounded

    def by(self, name: str) -> Tensor:
        """The gradient of an operand, (B, H, ...)."""
        match name:
            case "q":
                return self._of_rows * self._slope(self.spec.feature_q, self.x.q)
            case "k":
                return self._of_keys * self._slope(self.spec.feature_k, self.x.k)
            case "v":
                return self._of_values["o"][..., : self.x.v.shape[-1]]
            case "state":
                return self._of_start
        return self._of_logs

    # --- rows before they are divided ---------------------------------------------------------------------------------

    @cached_property
    def _made(self) -> Mapping[str, Tensor]:
        needed = ("o", "norm") if self.spec.normaliser == "sum" else ("o",)
        if not self.exact and all(which in self.known for which in needed):
            return self.known
        return scanned(replace(self._forward, outputs=needed), self.x)

    @cached_property
    def _undivided(self) -> tuple[Tensor, Tensor]:
        """The gradients of the undivided rows, with that of their sum as one more column; what each row holds."""
        o = self._made["o"].float()
        g = self.up.get("o", torch.zeros_like(o))
        if self.spec.normaliser == "none":
            return g, (g * o).sum(-1)
        norm = self._made["norm"]
        divisor = torch.where(norm != 0, norm, 1.0)
        g = g / divisor[..., None]
        held = (g * o).sum(-1)
        column = self.up.get("norm", torch.zeros_like(norm)) - torch.where(norm != 0, held, 0.0)
        return torch.cat((g, column[..., None]), -1), held * divisor + column * (norm - self.spec.eps)

    @cached_property
    def _values(self) -> Tensor:
        """v, with a column of ones where rows are divided by their sum."""
        v = self.x.v
        return v if self.spec.normaliser == "none" else torch.cat((v, v.new_ones(*v.shape[:-1], 1)), -1)

    # --- three scans --------------------------------------------------------------------------------------------------

    @cached_property
    def _of_rows(self) -> Tensor:
        kernel = replace(self._asking(self._scan, self.spec.feature_q), of_values=self.spec.feature_k)
        start = None if self.x.start is None else self.x.start.mT
        x = replace(self.x, q=self._undivided[0], k=self._values, v=self.x.k, start=start)
        return scanned(replace(kernel, start=start is not None), x, at=self.x.q)["o"]

    @cached_property
    def _of_keys(self) -> Tensor:
        kernel = replace(self._asking(self._back, self.spec.feature_k), of_values=self.spec.feature_q)
        start = self.up["state"].mT if "state" in self.up else None
        x = replace(self.x, q=self._values, k=self._undivided[0], v=self.x.q, start=start)
        return scanned(kernel, x, at=self.x.k)["o"]

    @cached_property
    def _of_values(self) -> dict[str, Tensor]:
        kernel = replace(self._back, of_rows=self.spec.feature_k, of_keys=self.spec.feature_q)
        kernel = replace(kernel, outputs=("o", "state") if self.spec.state else ("o",))
        x = replace(self.x, q=self.x.k, k=self.x.q, v=self._undivided[0], start=self.up.get("state"))
        return scanned(kernel, x)

    @cached_property
    def _forward(self) -> Scan:
        return of_spec(self.spec, channels(self.x.decay))

    @property
    def _scan(self) -> Scan:
        return replace(self._forward, of_rows="", of_keys="", sum=False, outputs=("o",))

    def _asking(self, kernel: Scan, feature: str) -> Scan:
        """A kernel whose values are of a key's channels, and which of its features takes the slope of a result."""
        return replace(kernel, decay="value") if channels(self.x.decay) else replace(kernel, slope_of=feature)

    def _slope(self, feature: str, x: Tensor) -> Tensor | float:
        """What the kernels left out: a decay of channels gathers gradients of features, not of their arguments."""
        left = channels(self.x.decay) and feature
        return self._every(_valued(slope(parse(feature), "x"), x)) if left else 1.0

    @property
    def _back(self) -> Scan:
        valid = "rows" if self.spec.valid else ""
        return replace(self._scan, backwards=self.spec.causal, valid=valid, start="state" in self.up)

    # --- tables -------------------------------------------------------------------------------------------------------

    @cached_property
    def _of_start(self) -> Tensor:
        """The state that the values' scan ends with, behind the first row; before it, where that row's decay counts."""
        found = self._of_values["state"]
        if self.x.decay is None or self.spec.read == "before":
            return found
        first = self.x.decay[:, :, :1].float()
        first = first.exp() if self.spec.log_decay else first
        if self.x.valid is not None:
            first = torch.where(self.x.valid[:, None, :1, None] != 0, first, 1.0)
        return found * first.mT

    @cached_property
    def _of_logs(self) -> Tensor:
        """(B, H, N, W)."""
        rows, keys = self._gathered
        held = _from_here_on(rows) - (rows if self.spec.read == "before" else 0.0) - _from_here_on(keys)
        if "state" in self.up:
            last = (self.up["state"] * self.known["state"]).sum(-1)
            held = held + (last if channels(self.x.decay) else last.sum(-1, keepdim=True))[:, :, None]
        if self.x.valid is not None:
            held = torch.where(self.x.valid[:, None, :, None] != 0, held, 0.0)
        return held

    @property
    def _gathered(self) -> tuple[Tensor, Tensor]:
        """What rows and keys hold, (B, H, N, W)."""
        if channels(self.x.decay):
            q, k = (
                _valued(parse(self.spec.feature_q or "x"), self.x.q),
                _valued(parse(self.spec.feature_k or "x"), self.x.k),
            )
            return self._every(q) * self._of_rows, self._every(k) * self._of_keys
        return self._undivided[1][..., None], (self._of_values["o"] * self._every(self._values)).sum(-1, keepdim=True)

    def _every(self, t: Tensor) -> Tensor:
        """For every query head."""
        return t.repeat_interleave(self.x.q.shape[1] // t.shape[1], 1)


def _valued(e: Expr, x: Tensor) -> Tensor:
    return torch.as_tensor(evaluate(e, {"x": x.float()}, {})).to(x.device).expand(x.shape)


def _from_here_on(t: Tensor) -> Tensor:
    return t.flip(2).cumsum(2).flip(2)


def _summed(gradient: Tensor, shape: torch.Size) -> Tensor:
    """Over the query heads that share a head, and over what is one for all."""
    if shape[1] not in (1, gradient.shape[1]):
        gradient = gradient.unflatten(1, (shape[1], -1)).sum(2)
    return gradient.sum_to_size(shape)
