"""`scaled_dot_product_attention` as a place: mask, scale, causality, grouped heads and dropout said as expressions."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..nodes import op_name
from ..symbols import TRUE, Expr, build, const, name
from .axes import Axis, Group, Groups, cut, extent, extents, fresh, fresh_groups, leaves
from .layout import tensor_of
from .near import Unraised
from .place import Operand, Place
from .scores import unexpanded
from .weights import DRAWN

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def is_sdpa(node: fx.Node) -> bool:
    return op_name(node) == "scaled_dot_product_attention"


def place_of_sdpa(node: fx.Node) -> Place:
    """The op's own definition, term by term."""
    given: dict[str, Any] = {**dict(zip(_NAMES, node.args)), **node.kwargs}
    q, k, v = (given[n] for n in _NAMES[:3])
    q_groups = fresh_groups(tensor_of(q))
    *outer, i, d = q_groups
    j = fresh(tensor_of(k).shape[-2])
    k_outer, e = outer_of(k, outer, given), fresh(tensor_of(v).shape[-1])
    v_outer = outer_of(v, outer, given)
    size = tensor_of(q).shape[-1]
    scale = given.get("scale")
    score: Expr = name("s") * (float(extent(size)) ** -0.5 if scale is None else float(scale))
    keep, tables = TRUE, {}
    mask = given.get("attn_mask")
    if given.get("is_causal"):
        keep = name("j") <= name("i")
    if mask is not None:
        shape: Groups = (*outer, i, j)
        sizes = extents(tensor_of(mask))
        aligned = tuple(cut(g, s) for s, g in zip(sizes, shape[len(shape) - len(sizes) :]))
        tables["@0"] = unexpanded(mask, aligned)
        if tensor_of(mask).dtype == torch.bool:
            keep = keep & name("@0")
        else:
            score = score + name("@0")
    p = float(given.get("dropout_p") or 0.0)
    after = None
    if p > 0.0:
        scaled = build("truediv", name("w"), 1.0 - p) if p < 1.0 else const(0.0)
        after = build("where", build("lt", name(DRAWN), 1.0 - p), scaled, 0.0)
    heads = outer[-1] if len(outer) > 1 else None
    return Place(
        node, (*outer, i, e), Operand(q, q_groups), Operand(k, (*k_outer, j, d)), Operand(v, (*v_outer, j, e)),
        i, j, d, e, tuple(outer), score, keep, after, heads=heads, leaves=tables,
    )  # fmt: skip


def outer_of(node: fx.Node, outer: list[Group], given: dict[str, Any]) -> Groups:
    """The batch and head axes of keys or values: equal, broadcast, or groups of heads."""
    found: list[Group] = []
    sizes = extents(tensor_of(node))[:-2]
    wanted = outer[len(outer) - len(sizes) :]
    for place, (size, group) in enumerate(zip(sizes, wanted)):
        whole = 1
        for axis in leaves(group):
            whole = whole * axis.size
        if size == whole:
            found.append(group)
        elif size == 1:
            found.append(())
        elif given.get("enable_gqa") and place == len(sizes) - 1:
            found.append(_grouped(node, group, size))
        else:
            raise Unraised(node, f"dimension {place} of %{node.name} does not broadcast")
    return tuple(found)


def _grouped(node: fx.Node, group: Group, size: Any) -> Group:
    axes = leaves(group)
    if len(axes) == 1:  # the first of keys and values takes the heads apart
        axes[0].parts = (Axis(size), Axis(axes[0].size // size))
        return axes[0].parts[:1]
    if axes[0].size == size:
        return axes[:1]
    raise Unraised(node, "keys and values are grouped differently")
