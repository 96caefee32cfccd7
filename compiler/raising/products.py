"""Every way to multiply two tensors and sum over shared axes: operands and output with labelled dimensions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..nodes import args_of, op_name
from .axes import Groups, cut, extents, fresh
from .einsums import terms_of
from .layout import argument, tensor_of

Labels = tuple[str, ...]


@dataclass(frozen=True)
class Product:
    """out[labels] = scale * sum over labels that are not in out of left[labels] * right[labels], plus `bias`."""

    node: fx.Node  # whose value the product is
    operands: tuple[fx.Node, fx.Node]
    labels: tuple[Labels, Labels]
    out: Labels
    scale: float = 1.0
    bias: fx.Node | None = None
    bias_scale: float = 1.0
    inside: tuple[fx.Node, ...] = ()  # nodes between the operands and the product

    @property
    def summed(self) -> frozenset[str]:
        return frozenset((*self.labels[0], *self.labels[1])) - frozenset(self.out)

    def free(self, side: int) -> list[str]:
        """Labels of the output that only this operand has, in the output's order."""
        if op_name(self.node) not in ("einsum", "sum"):
            return ["nm"[side]]
        present = [
            {label for label, size in zip(labels, extents(tensor_of(node))) if size != 1}
            for node, labels in zip(self.operands, self.labels)
        ]
        return [label for label in self.out if label in present[side] and label not in present[1 - side]]

    def operand_groups(self, out: Groups) -> tuple[Groups, Groups]:
        """The axes of both operands from those of the output; axes that are summed are new."""
        known = dict(zip(self.out, out))
        for node, labels in zip(self.operands, self.labels):
            for label, size in zip(labels, tensor_of(node).shape):
                if label in self.summed and not known.get(label):
                    known[label] = fresh(size)
        left, right = (
            tuple(cut(known[label], size) for label, size in zip(labels, extents(tensor_of(node))))
            for node, labels in zip(self.operands, self.labels)
        )
        return left, right


def product_of(node: fx.Node) -> Product | None:
    """The product that a node computes; None where it computes something else."""
    name = op_name(node)
    if name in ("matmul", "bmm", "mm"):
        return _matmul(node, node.args[0], node.args[1])
    if name in ("baddbmm", "addmm"):
        found = _matmul(node, node.args[1], node.args[2])
        if found is None:
            return None
        beta, alpha = (float(node.kwargs.get(k, 1)) for k in ("beta", "alpha"))  # type: ignore[arg-type]
        bias = node.args[0] if beta else None
        return Product(node, found.operands, found.labels, found.out, alpha, bias, beta)  # type: ignore[arg-type]
    if name == "linear":
        return _linear(node)
    if name == "einsum":
        return _einsum(node)
    if name == "sum":
        return _multiply_and_sum(node)
    return None


def _matmul(node: fx.Node, left: object, right: object) -> Product | None:
    a, b = tensor_of(left), tensor_of(right)
    if a is None or b is None or a.ndim < 2 or b.ndim < 2:
        return None
    rank = max(a.ndim, b.ndim)
    batch = tuple(f"b{d}" for d in range(rank - 2))
    first = (*batch[rank - a.ndim :], "n", "x")
    second = (*batch[rank - b.ndim :], "x", "m")
    return Product(node, (left, right), (first, second), (*batch, "n", "m"))  # type: ignore[arg-type]


def _linear(node: fx.Node) -> Product | None:
    """F.linear(q, k) on activations; a projection by weights is no product of two tensors."""
    source, weight = node.args[:2]
    a, b = tensor_of(source), tensor_of(weight)
    if argument(node, 2, "bias") is not None or weight.op == "get_attr" or a.ndim < 2 or b.ndim != 2:  # type: ignore[union-attr]
        return None
    batch = tuple(f"b{d}" for d in range(a.ndim - 2))
    return Product(node, (source, weight), ((*batch, "n", "x"), ("m", "x")), (*batch, "n", "m"))  # type: ignore[arg-type]


def _einsum(node: fx.Node) -> Product | None:
    found = terms_of(node)
    if found is None or len(found[0]) != 2:
        return None
    (left, right), out = found
    return Product(node, (left.node, right.node), (left.labels, right.labels), out)


def _multiply_and_sum(node: fx.Node) -> Product | None:
    """(a * b).sum(dim) over one dimension, operands broadcast against each other."""
    times, dims = node.args[0], argument(node, 1, "dim")
    if op_name(times) != "mul" or not isinstance(dims, list | tuple) or len(dims) != 1:
        return None
    left, right = args_of(times)[:2]
    if tensor_of(left) is None or tensor_of(right) is None or len(times.users) != 1:  # type: ignore[union-attr]
        return None
    rank = tensor_of(times).ndim
    names = tuple(f"a{d}" for d in range(rank))
    summed = dims[0] % rank
    keep = bool(argument(node, 2, "keepdim", False))
    out = tuple("one" if d == summed else n for d, n in enumerate(names) if keep or d != summed)
    labels = tuple(names[rank - tensor_of(o).ndim :] for o in (left, right))
    return Product(node, (left, right), labels, out, inside=(times,))  # type: ignore[arg-type]
