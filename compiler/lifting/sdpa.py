"""torch's fused attention op, whose arguments say everything."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..ports import op_name
from ..primitives.attend_spec import CAUSAL
from ..symbols import Expr, name
from .drawn import drawn
from .heads import Shaping, without_repeats
from .index_paths import ZERO, same_size, shape_of
from .reading import Unreadable
from .scaling import unscaled
from .writing import Reading, stand_in, write

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def raise_sdpa(node: fx.Node) -> fx.Node:
    """Replace one aten.scaled_dot_product_attention; returns the attend node."""
    given: dict[str, Any] = dict(zip(_ARGUMENTS, node.args)) | dict(node.kwargs)
    shaping = Shaping(node)
    q, k, v = given["query"], given["key"], given["value"]
    rank = max(len(shape_of(x)) for x in (q, k, v))
    lead = shape_of(q)[:-2]
    q, k, v = (_four(shaping, x, rank) for x in (q, k, v))
    heads = shape_of(q)[1]
    k, v = _same(without_repeats(k, heads), without_repeats(v, heads), k, v)
    scale = given.get("scale")
    q, k, factor, settle = unscaled(q, k)
    score: Expr = name("s") * (factor * float(shape_of(q)[-1] ** -0.5 if scale is None else scale))
    keep = ""
    tables: list[fx.Node] = []
    mask = given.get("attn_mask")
    if given.get("is_causal"):
        keep = CAUSAL
    if mask is not None:
        looked = _lookup(mask, lead)
        tables.append(mask)
        if mask.meta["val"].dtype == torch.bool:
            keep = looked.text if not keep else f"({keep}) & {looked.text}"
        else:
            score = score + looked
    after = ""
    if given.get("dropout_p"):
        tables.append(drawn(shaping, (*shape_of(q)[:-1], shape_of(k)[-2]), given["dropout_p"], [q, k]))
        after = f"t{len(tables) - 1}[b, h, i, j] * w"
    attend, out = write(shaping, Reading(q, k, v, score, keep, tables, after))
    settle()
    if rank == 3:
        out = shaping.call(torch.ops.aten.squeeze.dim, out, 1)
    elif rank == 2:
        out = shaping.call(torch.ops.aten.squeeze.dim, shaping.call(torch.ops.aten.squeeze.dim, out, 0), 0)
    elif rank == 5:
        out = shaping.call(torch.ops.aten.unflatten.int, out, 0, [-1, lead[1]])
    stand_in(node, out)
    node.graph.erase_node(node)
    return attend


def _same(k: fx.Node, v: fx.Node, old_k: fx.Node, old_v: fx.Node) -> tuple[fx.Node, fx.Node]:
    return (k, v) if same_size(shape_of(k)[1], shape_of(v)[1]) else (old_k, old_v)


def _four(shaping: Shaping, node: fx.Node, rank: int) -> fx.Node:
    if rank == 4:
        return node
    if rank == 3:
        return shaping.call(torch.ops.aten.unsqueeze.default, node, 1)
    if rank == 2:
        return shaping.call(
            torch.ops.aten.unsqueeze.default, shaping.call(torch.ops.aten.unsqueeze.default, node, 0), 0
        )
    if rank == 5:
        return shaping.call(torch.ops.aten.flatten.using_ints, node, 0, 1)
    raise Unreadable(f"{op_name(node)} of {rank} axes")


def _lookup(mask: fx.Node, lead: tuple[Any, ...]) -> Expr:
    """The mask at (b, h, i, j), whatever its number of axes."""
    names: list[Expr] = [name("b"), name("h"), name("i"), name("j")]
    if len(lead) == 1:
        names = [name("b"), name("i"), name("j")]
    elif len(lead) == 0:
        names = names[2:]
    elif len(lead) == 3:
        names = [name("b") // lead[1], name("b") % lead[1], *names[1:]]
    shape = shape_of(mask)
    own = names[len(names) - len(shape) :]
    return Expr("lookup", ("t0", *(ZERO if same_size(s, 1) else e for s, e in zip(shape, own))))
