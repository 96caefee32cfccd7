"""Operators that only move values: where the axes of their output lie in their input, and the other way round."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..nodes import op_name
from .axes import Group, Groups, cut, extents, fresh, leaves, quotient, regroup

VIEWS = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as"})
VIEWS |= {"reshape_as", "_reshape_alias"}
KEEPING = frozenset({"contiguous", "clone", "alias", "detach", "lift_fresh_copy", "lift_fresh", "detach_"})
CASTS = frozenset({"to", "_to_copy", "type_as", "float", "half", "bfloat16"})
TURNS = frozenset(
    {"transpose", "permute", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "mT", "numpy_T", "adjoint"}
)
SIZES = frozenset({"sym_size", "sym_numel", "sym_stride", "_assert_tensor_metadata"})


def tensor_of(node: Any) -> Any:
    """The fake tensor of a node; None where it is no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def data_users(node: fx.Node) -> list[fx.Node]:
    """Users that read the values, not only the sizes."""
    return [u for u in node.users if op_name(u) not in SIZES]


def is_cast(node: fx.Node) -> bool:
    """A change between floating dtypes, or none at all."""
    if op_name(node) not in CASTS:
        return False
    before, after = tensor_of(node.args[0]), tensor_of(node)
    return before.dtype == after.dtype or (before.is_floating_point() and after.is_floating_point())


def is_upcast(node: fx.Node) -> bool:
    return is_cast(node) and tensor_of(node.args[0]).dtype.itemsize < tensor_of(node).dtype.itemsize


def back(node: fx.Node, groups: Groups) -> tuple[fx.Node, Groups] | None:
    """Through one layout operator towards its input; None where the node is something else."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    if tensor_of(source) is None or tensor_of(node) is None:
        return None
    found = _back(node, source, groups)  # type: ignore[arg-type]
    return None if found is None else (source, found)  # type: ignore[return-value]


def _back(node: fx.Node, source: fx.Node, groups: Groups) -> Groups | None:
    name, shape = op_name(node), extents(tensor_of(source))
    if name in KEEPING or is_cast(node):
        return groups
    if name in VIEWS:
        return regroup(groups, shape)
    if name in TURNS:
        order = turned(node, len(groups))
        return None if order is None else tuple(groups[order.index(d)] for d in range(len(order)))
    if name in ("expand", "expand_as"):
        kept = groups[len(groups) - len(shape) :]
        return tuple(cut(group, size) for group, size in zip(kept, shape))
    if name == "slice" and shape == extents(tensor_of(node)):
        return groups
    if name in ("repeat", "repeat_interleave", "tile"):
        return _repeated(node, name, shape, groups)
    return None


def _repeated(node: fx.Node, name: str, shape: tuple[Any, ...], groups: Groups) -> Groups | None:
    """Copies are an axis that the input does not have: outside for repeat, inside for repeat_interleave."""
    if name == "repeat_interleave" and not (isinstance(node.args[1], int) and argument(node, 2, "dim") is not None):
        return None
    kept: list[Group] = []
    out = extents(tensor_of(node))[len(groups) - len(shape) :]
    for group, size, whole in zip(groups[len(groups) - len(shape) :], shape, out):
        if size == whole:
            kept.append(group)
        elif size == 1:
            kept.append(())
        else:
            copies = quotient(whole, size)
            order = (size, copies) if name == "repeat_interleave" else (copies, size)
            parts = regroup((group,), order) if copies is not None else None
            if parts is None:
                return None
            kept.append(parts[0 if name == "repeat_interleave" else 1])
    return tuple(kept)


def turned(node: fx.Node, rank: int) -> list[int] | None:
    """Which input dimension each output dimension is."""
    name, order = op_name(node), list(range(rank))
    given: tuple[Any, ...] = node.args
    if name == "permute":
        return [d % rank for d in given[1]]
    if name in ("t", "mT", "numpy_T", "adjoint"):
        if rank < 2:
            return order
        if name == "numpy_T":
            return order[::-1]
        return [*order[:-2], order[-1], order[-2]]
    if name in ("movedim", "moveaxis"):
        if not (isinstance(given[1], int) and isinstance(given[2], int)):
            return None
        moved = order.pop(given[1] % rank)
        order.insert(given[2] % rank, moved)
        return order
    a, b = given[1] % rank, given[2] % rank
    order[a], order[b] = order[b], order[a]
    return order


def is_idle(node: fx.Node) -> bool:
    """Nobody reads it, and running it does nothing else; dropout that is off is random for torch.fx, not here."""
    if node.users or node.op != "call_function":
        return False
    off = {
        "dropout": lambda n: not n.args[2],
        "scaled_dot_product_attention": lambda n: not argument(n, 4, "dropout_p", 0),
    }
    return off.get(op_name(node), lambda n: not n.is_impure())(node)


def erase_idle(graph: fx.Graph) -> None:
    for node in reversed(graph.nodes):
        if is_idle(node):
            graph.erase_node(node)


def ahead(node: fx.Node, groups: Groups) -> Groups | None:
    """Through one layout operator towards its output, from the groups of its first input."""
    name, shape = op_name(node), extents(tensor_of(node)) if tensor_of(node) is not None else ()
    if name in KEEPING or is_cast(node):
        return groups
    if name in VIEWS:
        return regroup(groups, shape)
    if name in TURNS:
        order = turned(node, len(groups))
        return None if order is None else tuple(groups[d] for d in order)
    if name in ("expand", "expand_as"):
        padded: Groups = ((),) * (len(shape) - len(groups)) + groups
        return tuple(group if leaves(group) or size == 1 else fresh(size) for group, size in zip(padded, shape))
    if name == "slice" and shape == extents(tensor_of(node.args[0])):
        return groups
    return None
