"""What an operation and a site cost: FLOPs and bytes, from specs and sizes alone; nothing is run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from .nodes import op_name
from .primitives.attend_spec import AttendSpec
from .primitives.attend_stored import widths
from .raising.einsums import terms_of
from .symbol_eval import evaluate

SAMPLES = 257  # query and key positions at which a predicate is sampled to estimate how much of it is kept


@dataclass(frozen=True)
class Cost:
    flops: float = 0.0
    bytes: float = 0.0  # inputs and outputs of every operation, each once
    products: float = 0.0  # of the flops, those of matrix products, convolutions and attention

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.products + other.products)

    def __str__(self) -> str:
        return f"{human(self.flops)}FLOP {human(self.bytes)}B"


def human(value: float) -> str:
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g} "


@lru_cache(maxsize=1024)
def density(text: str, n: int, m: int) -> float:
    """The share of (i, j) that a predicate keeps, tables taken as keeping all; sampled, never N x M."""
    spec = AttendSpec.of(text)
    conditions = [c for c in spec.conjuncts if not any(e.op == "lookup" for e in c.walk())]
    if not conditions or n == 0 or m == 0:
        return 1.0
    offset = m - n if spec.align == "end" else 0
    rows = torch.linspace(0, n - 1, min(n, SAMPLES)).round().long() + offset
    keys = torch.linspace(0, m - 1, min(m, SAMPLES)).round().long()
    if m > SAMPLES and spec.conjuncts:
        return _band_density(conditions, rows, m)
    names = _names(rows, keys, n, m)
    kept = torch.ones(len(rows), len(keys), dtype=torch.bool)
    for condition in conditions:
        kept = kept & evaluate(condition, names, {}).reshape(-1, kept.shape[0], kept.shape[1])[0]
    return kept.double().mean().item()


def _band_density(conditions: Iterable[Any], rows: Tensor, m: int) -> float:
    """Row by row over all keys: a thin band falls between sampled keys."""
    keys, kept = torch.arange(m), 0.0
    for row in rows:
        names = _names(row.view(1), keys, 1, m)
        inside = torch.ones(m, dtype=torch.bool)
        for condition in conditions:
            inside = inside & evaluate(condition, names, {}).reshape(-1, m)[0]
        kept += inside.double().mean().item()
    return kept / len(rows)


def _names(rows: Tensor, keys: Tensor, n: int, m: int) -> dict[str, Any]:
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.long)
    return {"b": zero, "h": zero, "i": rows.view(1, 1, -1, 1), "j": keys.view(1, 1, 1, -1), "N": n, "M": m}


def node_cost(node: fx.Node) -> Cost:
    """FLOPs of products, and the bytes that any operation reads and writes, at the example's sizes."""
    value = node.meta.get("val")
    if node.op not in ("call_function", "call_module") or value is None or op_name(node) in _FREE:
        return Cost()
    outputs = [t for t in (value if isinstance(value, list | tuple) else [value]) if isinstance(t, Tensor)]
    inputs = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    moved = float(sum(_bytes(t) for t in (*inputs, *outputs)))
    products = _products(node, inputs, outputs)
    if products is None:  # one for every element that is written
        return Cost(float(sum(prod(sizes(t)) for t in outputs)), moved)
    return Cost(products, moved, products)


_FREE = frozenset({"view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "select", "t",
                   "sym_size", "alias", "detach", "unbind", "split", "chunk", "split_with_sizes"})  # fmt: skip


def sizes(tensor: Tensor) -> tuple[int, ...]:
    """A shape with symbols at the example's values; a size that only the data tell counts as 1."""
    return tuple(_number(s) for s in tensor.shape)


def _number(size: Any) -> int:
    return int(size) if isinstance(size, int) else int(size.node.hint or 1)


def _bytes(tensor: Tensor) -> int:
    return prod(sizes(tensor)) * tensor.element_size()


def _products(node: fx.Node, inputs: list[Tensor], outputs: list[Tensor]) -> float | None:
    name = op_name(node)
    if name == "attend":
        q, kv = node.args[0].meta["val"], [n.meta["val"] for n in node.args[1]]  # type: ignore[union-attr]
        (b, h, n, d), text = sizes(q), str(node.args[3])
        total = 0.0
        wide = widths(kv, AttendSpec.of(text))
        for k, of_v in zip(kv[::2], wide[1::2], strict=True):
            m = sizes(k)[2]
            total += 2.0 * b * h * n * m * (d + _number(of_v)) * density(text, n, m)
        return total
    if name == "scan":
        q, v = inputs[0], inputs[2]
        return 4.0 * prod(sizes(q)) * sizes(v)[-1]
    if name == "chosen":
        return 2.0 * prod(sizes(outputs[0])) * sizes(inputs[0])[-1]
    if name == "qlinear":
        return 2.0 * prod(sizes(outputs[0])) * sizes(inputs[0])[-1]
    if name == "einsum":
        return _einsum(node)
    if name in ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm") and len(inputs) >= 2:
        left = inputs[1] if name in ("addmm", "baddbmm") else inputs[0]
        return 2.0 * prod(sizes(outputs[0])) * sizes(left)[-1]
    if name in ("conv2d", "conv1d", "convolution") and len(inputs) >= 2:
        return 2.0 * prod(sizes(outputs[0])) * prod(sizes(inputs[1])[1:])
    return None


def _einsum(node: fx.Node) -> float | None:
    """Pair by pair from the left, as torch does it: a label is summed once neither the rest nor the result needs it."""
    found = terms_of(node)
    if found is None or len(found[0]) < 2:
        return None
    terms, out = found
    wide = {
        label: size for term in terms for label, size in zip(term.labels, sizes(term.node.meta["val"])) if size != 1
    }
    total, held = 0.0, set(terms[0].labels)
    for index, term in enumerate(terms[1:], 2):
        held |= set(term.labels)
        total += 2.0 * prod(wide.get(label, 1) for label in held)
        held &= set(out).union(*(later.labels for later in terms[index:]))
    return total


def graph_cost(graph: fx.GraphModule) -> Cost:
    total = Cost()
    for node in graph.graph.nodes:
        total = total + node_cost(node)
    return total


def site_costs(graph: fx.GraphModule) -> Mapping[str, Cost]:
    """The cost of the nodes that belong to each site."""
    found: dict[str, Cost] = {}
    for node in graph.graph.nodes:
        if "site" in node.meta:
            found[node.meta["site"]] = found.get(node.meta["site"], Cost()) + node_cost(node)
    return found
