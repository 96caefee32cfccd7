"""`qlinear` as Triton: products with codes as they are stored, scales behind the products; int4, int8, two levels.

Codes of 4 and 8 bits are exact in every type that a matrix unit multiplies. So a group's part of a row is

    sum_k x_k (c_k s - z) = s (x . c) - z sum_k x_k

and weights are never made whole: with whole numbers on both sides every sum is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ...compiler.primitives.operator import Groups
from ...compiler.primitives.qlinear import qlinear_meaning
from ...compiler.primitives.qlinear_spec import BLOCK, QLinearSpec
from .arguments import Arguments
from .attend import listed
from .blocks import Blocks, padded
from .launching import UnfitError, launched, precision, target, unfit
from .skeleton import filled, text_of

_HALF = BLOCK // 2  # inputs that lie in one half of the bytes: of one group each
_NARROW = {torch.float16: ("tl.float16", 65504.0), torch.bfloat16: ("tl.bfloat16", 3.3895313892515355e38)}


@dataclass(frozen=True)
class QLinear:
    """What a kernel of one spec is made of."""

    text: str

    @cached_property
    def spec(self) -> QLinearSpec:
        return QLinearSpec.of(self.text)

    @property
    def nibbles(self) -> bool:
        return self.spec.format != "int8"

    @property
    def scaled(self) -> bool:
        return self.spec.format != "int4"

    @cached_property
    def flags(self) -> dict[str, bool]:
        return {"NIBBLES": self.nibbles, "GROUPED": self.nibbles, "WHOLE": bool(self.spec.activations),
                "SCALED": self.scaled, "BIAS": self.spec.bias}  # fmt: skip

    @cached_property
    def source(self) -> str:
        """The whole module."""
        exact = self.spec.activations and self.scaled
        scales = ["ROWS"] if self.spec.activations else []
        scales += ["SCALE"] if self.scaled else []
        scales += ["WIDTH", "ZERO"] if self.nibbles else []
        said = {
            "scales": listed([*scales, *(["BIAS_OF"] if self.spec.bias else [])]),
            "groups": "WIDTH, ZERO, of_group, wanted, " if self.nibbles else "",
            "given": "WIDTH, ZERO, of_group, wanted, " if self.nibbles else "",
            "sizes": "GROUP: tl.constexpr, GROUPS: tl.constexpr, " if self.nibbles else "",
            "kind": "tl.int32" if exact else "tl.float32",
            "low": "of_group = n * GROUPS + first // GROUP",
            # the last block may have no second half: its inputs are 0
            "high": f"of_group = n * GROUPS + tl.minimum((first + {_HALF}) // GROUP, GROUPS - 1)",
        }
        return "".join([text_of("functions"), filled("qlinear_step", self.flags, said),
                        filled("qlinear", self.flags, said)])  # fmt: skip


@lru_cache(maxsize=8)
def rounding(like: torch.dtype) -> str:
    """The module that rounds rows, their scales to the type of the weights' scales."""
    narrowed: list[str] = []
    if like in _NARROW:
        word, most = _NARROW[like]
        narrowed = [f"scale = tl.minimum(scale, {most!r}).to({word}).to(tl.float32)"]
    return text_of("functions") + filled("qlinear_rounded", {}, {"narrowed": narrowed})


def refuses(groups: Groups, text: str) -> str | None:
    """Why a call is not handed to the kernel."""
    (x,), tensors = groups
    spec = QLinearSpec.of(text)
    reason = unfit(groups)
    if reason:
        return reason
    if any(t.dtype == torch.float64 for t in tensors):
        return "scales of float64"
    if not x.numel() or not tensors[0].numel():
        return "no rows"
    if spec.format != "int8" and spec.group % _HALF:
        return f"groups of {spec.group}, no multiple of {_HALF}"
    return None


def shown(text: str) -> str:
    return QLinear(text).source.removeprefix(text_of("functions")).lstrip()


def run(groups: Groups, text: str) -> list[Tensor]:
    """One launch, with rows that are rounded one more; by the plain meaning where no block fits a device."""
    (x,), tensors = groups
    try:
        return [_run(x, [t.contiguous() for t in tensors], QLinear(text))]
    except UnfitError:
        return qlinear_meaning(groups, text)


def _run(x: Tensor, tensors: list[Tensor], kernel: QLinear) -> Tensor:
    spec = kernel.spec
    K, N = spec.inputs, tensors[0].shape[0]
    flat = x.reshape(-1, K).contiguous()
    T, y = flat.shape[0], x.new_empty(*x.shape[:-1], N)
    given: Arguments = {"Y": y, "T": T, "N": N, "CODES": tensors[0], "BYTES": tensors[0].shape[1], "K": K}
    given["PRECISION"] = "ieee" if spec.activations else precision(x)
    if spec.activations:
        flat, given["ROWS"] = _rounded(flat, tensors[1].dtype)
    given |= {"SCALE": tensors[1]} if kernel.scaled else {}
    if kernel.nibbles:
        width, zero = tensors[2 if kernel.scaled else 1], tensors[3 if kernel.scaled else 2]
        given |= {"WIDTH": width, "ZERO": zero, "GROUP": spec.group or K, "GROUPS": spec.groups}
    given |= {"BIAS_OF": tensors[-1]} if spec.bias else {}
    blocks, depth = qlinear_blocks(T, spec, flat.element_size() * 8, target(x))
    given |= {"X": flat, "BM": blocks.rows, "BN": blocks.keys, "BK": depth, "STAGES": blocks.stages,
              "num_warps": blocks.warps, "num_stages": blocks.stages}  # fmt: skip
    launched(kernel.source, "qlinear", (-(-T // blocks.rows), -(-N // blocks.keys)), given)
    return y


def _rounded(x: Tensor, like: torch.dtype) -> tuple[Tensor, Tensor]:
    T, K = x.shape
    whole, scale = x.new_empty(T, K, dtype=torch.int8), x.new_empty(T, dtype=torch.float32)
    given: Arguments = {"X": x, "WHOLE": whole, "ROWS": scale, "T": T, "K": K, "BM": 4}
    launched(rounding(like), "rounded", (-(-T // 4),), given | {"BK": min(1024, padded(K)), "num_warps": 4})
    return whole, scale


def qlinear_blocks(rows: int, spec: QLinearSpec, bits: int, target: str) -> tuple[Blocks, int]:
    """Rows and outputs of a block, and the inputs of a step: of one group, or of one for each half."""
    depth = 128 if spec.group % 128 == 0 and bits <= 16 else 64
    tall = min(128, padded(rows))
    if bits == 32:
        return Blocks(min(tall, 64), 64, 4, 2), 64
    if target.startswith("hip"):
        return Blocks(tall, 64, 4, 1), depth
    wide = 128 if tall >= 64 and spec.format == "int8" else 64  # a product that is scaled by group is held twice
    return Blocks(tall, wide, 8 if tall == 128 else 4, 3), depth
