"""What kernels are asked on a GPU, at any size, and who else computes the same: the rows of benchmarks/gpu.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reattend.codegen.triton import launch
from reattend.codegen.used import Call, calls_of
from reattend.compiler.cost import density
from reattend.compiler.primitives.attend import attend
from reattend.compiler.primitives.merge import MergeSpec, merge_meaning
from reattend.compiler.primitives.qlinear_spec import QLinearSpec
from reattend.compiler.primitives.scan import scan
from reattend.compiler.symbols import table

PARTS = 8  # that a merge puts together


@dataclass(frozen=True)
class Sizes:
    batch: int
    heads: int
    tokens: int
    dim: int
    device: str

    @property
    def numbers(self) -> int:
        return self.batch * self.heads * self.tokens * self.dim

    def rows(self, heads: int = 0, tokens: int = 0, dim: int = 0) -> Tensor:
        sizes = self.batch, heads or self.heads, tokens or self.tokens, dim or self.dim
        return torch.randn(sizes, device=self.device, dtype=torch.bfloat16)


Run = Callable[[], Any]  # its result, or results of which the first is compared
Others = Callable[[Call], dict[str, Run]]
NOBODY: Others = lambda call: {}


@dataclass(frozen=True)
class Case:
    """A question to one kernel: the call and its products at some sizes, and others that answer it."""

    name: str
    call: Callable[[Sizes], Call]
    flops: Callable[[Sizes, str], float]
    others: Others = NOBODY
    backwards: Others = NOBODY  # the gradients of others
    learns: tuple[int, ...] = (0, 1, 2)  # the tensors whose gradient is checked and timed


def cases() -> list[Case]:
    """Those that are asked at every length."""
    return [*map(attending, ATTENDS), *map(scanning, SCANS), merging()]


# --- attend

_SLOPES = 2.0 ** -torch.arange(1.0, 17)  # of 16 heads
ATTENDS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "full": {},
    "window 256 and 4 sinks": {"causal": True, "keep": lambda i, j: (i - j < 256) | (j < 4)},
    "softcap": {"causal": True, "score": lambda s: torch.tanh(s / 30) * 30},
    "slopes of heads": {"causal": True, "score": lambda s, h, i, j: s + table(_SLOPES)[h] * (j - i)},
    "sigmoid": {"causal": True, "weight": torch.sigmoid, "normaliser": "none"},
    "relu squared over its sum": {"causal": True, "weight": lambda s: torch.relu(s) ** 2, "normaliser": "sum"},
    "stick-breaking": {"causal": True, "normaliser": "stick"},
}


def attending(name: str) -> Case:
    def call(sizes: Sizes) -> Call:
        few = torch.zeros(1, sizes.heads, 4, sizes.dim)
        (said,) = calls_of(lambda: attend(few, few, few, **ATTENDS[name]))
        q, k, v = (sizes.rows() for _ in range(3))
        return Call("attend", [[q], [k, v], [t.to(sizes.device) for t in said.groups[2]]], said.text)

    def flops(sizes: Sizes, text: str) -> float:
        return 4 * sizes.numbers * sizes.tokens * density(text, sizes.tokens, sizes.tokens)

    return Case(
        name, call, flops, lambda asked: _dense(name, asked) | _flexed(name, asked), lambda asked: _back(name, asked)
    )


def _dense(name: str, asked: Call) -> dict[str, Run]:
    (q,), (k, v), _ = asked.groups
    if name not in ("full", "causal"):
        return {}
    return {"sdpa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=name == "causal")}


def _back(name: str, asked: Call) -> dict[str, Run]:
    if name not in ("full", "causal"):
        return {}
    (q,), (k, v), _ = asked.groups
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=name == "causal")
    return {"sdpa": lambda: torch.autograd.grad(o, (q, k, v), o.detach(), retain_graph=True)}


def _flexed(name: str, asked: Call) -> dict[str, Run]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    (q,), (k, v), _ = asked.groups
    tokens, slopes = q.shape[2], _SLOPES.to(q.device)
    scores: dict[str, Any] = {
        "softcap": lambda s, b, h, i, j: torch.tanh(s / 30) * 30,
        "slopes of heads": lambda s, b, h, i, j: s + slopes[h] * (j - i),
    }
    masks: dict[str, Any] = {"window 256 and 4 sinks": lambda b, h, i, j: (j <= i) & ((i - j < 256) | (j < 4))}
    if name not in ("full", "causal", *scores, *masks):
        return {}
    keep = None if name == "full" else masks.get(name, lambda b, h, i, j: j <= i)
    blocks = None if keep is None else create_block_mask(keep, None, None, tokens, tokens, device=str(q.device))
    compiled = torch.compile(flex_attention, dynamic=False)
    return {"flex": lambda: compiled(q, k, v, score_mod=scores.get(name), block_mask=blocks)}


def one_token() -> Case:
    """It reads many keys: by programs that share them, and by one program each."""

    def call(sizes: Sizes) -> Call:
        q, k, v = sizes.rows(2 * sizes.heads, 1), sizes.rows(), sizes.rows()
        (said,) = calls_of(lambda: attend(*(t[:1, :, :1].cpu() for t in (q, k, v))))
        return Call("attend", [[q], [k, v], []], said.text)

    def others(asked: Call) -> dict[str, Run]:
        (q,), (k, v), _ = asked.groups
        return {
            "not shared": lambda: launch.run(asked.groups, asked.text, shares=1),
            "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        }

    flops = lambda sizes, text: 8.0 * sizes.numbers
    return Case("one token", call, flops, others, learns=())


# --- scan

SCANS: dict[str, dict[str, Any]] = {
    "sums": {},
    "sums over their own": {"feature": lambda x: F.elu(x) + 1, "normaliser": "sum", "eps": 1e-6},
    "decay of heads": {"decay": lambda sizes: (1, sizes.heads, 1, 1)},
    "decay of rows": {"decay": lambda sizes: (sizes.batch, sizes.heads, sizes.tokens, 1)},
    "decay of channels": {"decay": lambda sizes: (sizes.batch, sizes.heads, sizes.tokens, sizes.dim)},
}


def scanning(name: str) -> Case:
    how = dict(SCANS[name])
    shape = how.pop("decay", None)

    def logs(sizes: Sizes) -> list[Tensor]:
        return [] if shape is None else [-torch.rand(shape(sizes), device=sizes.device) / 10]

    def call(sizes: Sizes) -> Call:
        few = replace(sizes, tokens=4, device="cpu")
        given = how | dict(zip(["log_decay"], logs(few)))
        (said,) = calls_of(lambda: scan(*(few.rows() for _ in range(3)), **given))
        q, k, v = (sizes.rows() * sizes.dim**-0.25 for _ in range(3))
        return Call("scan", [[q], [k, v], logs(sizes)], said.text)

    flops = lambda sizes, text: (
        4.0 * sizes.batch * sizes.heads * sizes.tokens * sizes.dim**2
    )  # a state written and read
    return Case(name, call, flops, lambda asked: _fla(name, asked))


def _fla(name: str, asked: Call) -> dict[str, Run]:
    """flash-linear-attention, where it is installed: rows before heads, logarithms of a decay as they are."""
    if find_spec("fla") is None:
        return {}
    q, k, v, *logs = (t.transpose(1, 2).contiguous() for group in asked.groups for t in group)
    chunked: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
        "sums": ("linear_attn", lambda: {"normalize": False}),
        "decay of heads": ("simple_gla", lambda: {"g_gamma": logs[0].flatten()}),
        "decay of rows": ("simple_gla", lambda: {"g": logs[0][..., 0].contiguous()}),
        "decay of channels": ("gla", lambda: {"g": logs[0]}),
    }
    if name not in chunked:
        return {}
    module, how = chunked[name]

    def run() -> Tensor:  # imported here: a version that does not load is a peer that fails
        chunk = getattr(import_module(f"fla.ops.{module}"), f"chunk_{module}")
        return chunk(q, k, v, scale=1.0, **how())[0].transpose(1, 2)

    return {"fla": run}


# --- merge and layers


def merging() -> Case:
    """Parts of attention put together: it is all bytes."""

    def call(sizes: Sizes) -> Call:
        parts = [sizes.rows() for _ in range(PARTS)]
        logs = [torch.randn(p.shape[:3], device=sizes.device) * 3 for p in parts]
        return Call("merge", [parts, logs], MergeSpec("lse").text)

    compiled = torch.compile(merge_meaning, dynamic=False)
    others: Others = lambda asked: {"compiled torch": lambda: compiled(asked.groups, asked.text)}
    return Case(f"merge of {PARTS} parts", call, lambda sizes, text: 0.0, others, learns=())


FORMATS = (("int8", 0), ("qoq", 128), ("int4", 128))


def layer(format: str, group: int) -> Case:
    """A quantized layer of `dim` inputs and outputs. Any codes: the time does not depend on them."""

    def call(sizes: Sizes) -> Call:
        wide = sizes.dim
        spec = QLinearSpec(format, wide, group, "" if format == "int4" else "int8")
        scales: Callable[..., Tensor] = lambda *size: torch.rand(size, device=sizes.device, dtype=torch.float16) * 0.01
        whole: Callable[..., Tensor] = lambda *size: torch.randint(1, 9, size, device=sizes.device, dtype=torch.int8)
        codes = torch.randint(0, 256, (wide, wide // 2), device=sizes.device, dtype=torch.uint8)
        grouped = wide, spec.groups
        tensors = {
            "int8": lambda: [whole(wide, wide), scales(wide)],
            "int4": lambda: [codes, scales(*grouped), scales(*grouped)],
            "qoq": lambda: [codes, scales(wide), whole(*grouped), whole(*grouped)],
        }[format]()
        return Call("qlinear", [[sizes.rows(1)[:, 0].flatten(0, 1)], tensors], spec.text)

    flops = lambda sizes, text: 2.0 * sizes.batch * sizes.tokens * sizes.dim**2
    return Case(f"layer of {format}", call, flops, learns=())


def dense_layer(asked: Call) -> Run:
    """The time of the layer that a quantized one stands for; its numbers are others."""
    (x,), _ = asked.groups
    weight = torch.randn(x.shape[-1], x.shape[-1], device=x.device, dtype=x.dtype)
    return lambda: F.linear(x, weight)
