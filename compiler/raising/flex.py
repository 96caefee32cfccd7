"""`flex_attention` as a place: its score and mask functions are graphs over one score, read here as expressions."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from ..nodes import higher_order_name, op_name
from ..regions import mapped
from ..symbols import FUNCTIONS, Expr, as_expr, build, const, name
from .axes import Group, fresh, fresh_groups
from .layout import CASTS, KEEPING, argument, erase_idle, tensor_of
from .near import Unraised
from .place import Operand, Place
from .sdpa import outer_of

_ASKED = ("b", "h", "i", "j")  # what a mask function is called with; a score function has the score in front
_MADE = {"new_ones": 1, "ones": 1, "ones_like": 1, "new_zeros": 0, "zeros": 0, "zeros_like": 0}
_FILLED = {"full": 1, "new_full": 2, "full_like": 1, "scalar_tensor": 0}  # where the number stands
_BINARY = {"add": "add", "sub": "sub", "mul": "mul", "div": "truediv", "remainder": "mod", "floor_divide": "floordiv"}
_BINARY |= {n: n for n in ("pow", "maximum", "minimum", "le", "lt", "eq", "ne")} | {"true_divide": "truediv"}
_BINARY |= {n: n.rpartition("_")[2].strip("_") for n in ("logical_and", "bitwise_and", "logical_or", "bitwise_or")}
_BINARY |= {"__and__": "and", "__or__": "or", "rsub": "sub"}
_TURNED = {"ge": "le", "gt": "lt"}  # a >= b is b <= a
_NEGATED = ("logical_not", "bitwise_not")


def is_flex(node: fx.Node) -> bool:
    """The output of a flex_attention."""
    inner = node.args[0] if node.target is operator.getitem else None
    return isinstance(inner, fx.Node) and higher_order_name(inner) == "flex_attention" and node.args[1:] == (0,)


def place_of_flex(node: fx.Node) -> Place:
    """The operator's own definition: softmax over the keys that the mask keeps of what the score function says."""
    flex: Any = node.args[0]
    others = [u for u in flex.users if u is not node]
    if others:
        raise Unraised(others[0], "flex_attention's normaliser is read too")
    q, k, v, score_graph, blocks, scale, _, score_extra, mask_extra = flex.args[:9]
    q_groups = fresh_groups(tensor_of(q))
    *outer, i, d = q_groups
    j, e = fresh(tensor_of(k).shape[-2]), fresh(tensor_of(v).shape[-1])
    shared = {"enable_gqa": True}
    k_outer, v_outer = (outer_of(t, outer, shared) for t in (k, v))
    tables: dict[str, tuple[Any, Any]] = {}
    said = _Function(node, tables)
    score = said.read(score_graph, [name("s") * scale, *map(name, _ASKED)], score_extra)
    keep = said.read(blocks[-1], [*map(name, _ASKED)], mask_extra)
    if score.op == "where" and score.args[2].op == "const" and score.args[2].args[0] == -math.inf:
        keep, score = keep & score.args[0], score.args[1]
    heads: Group = outer[-1]
    return Place(
        node, (*outer, i, e), Operand(q, q_groups), Operand(k, (*k_outer, j, d)), Operand(v, (*v_outer, j, e)),
        i, j, d, e, tuple(outer), score, keep, heads=heads, leaves=tables,
    )  # fmt: skip


def erase_block_masks(graph: fx.Graph) -> None:
    """Block masks, made by torch.vmap, that nobody reads any more."""
    for nodes in reversed(mapped(graph)):
        inside = set(nodes)
        if all(user in inside for node in nodes if not node._erased for user in node.users):
            for node in reversed([n for n in nodes if not n._erased]):
                graph.erase_node(node)
            erase_idle(graph)


def _held(node: fx.Node) -> Any:
    module: Any = node.graph.owning_module
    return getattr(module, str(node.target), None)


def _number(module: fx.GraphModule, node: fx.Node) -> Expr | None:
    """A constant of one element."""
    value = getattr(module, str(node.target), None)
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not hasattr(value, "fake_mode"):
        return const(value.item())
    return None


class _Function:
    """A traced function of single numbers, run on expressions; a tensor that it looks up becomes a table."""

    def __init__(self, at: fx.Node, tables: dict[str, tuple[Any, Any]]) -> None:
        self.at, self.tables = at, tables

    def read(self, held: Any, given: list[Expr], extra: tuple[Any, ...]) -> Expr:
        module = _held(held)
        values: dict[fx.Node, Any] = {}
        placeholders = iter([*given, *extra])
        for node in module.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(placeholders)
            elif node.op == "get_attr":
                values[node] = _number(module, node)
            elif node.op == "output":
                result = node.args[0]
                return as_expr(values[result[0] if isinstance(result, list | tuple) else result])
            else:
                values[node] = self._step(node, values)
        raise Unraised(self.at, "a function of flex_attention gives nothing")

    def _step(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        kind = op_name(node)
        args: list[Any] = list(fx.node.map_arg(node.args, lambda n: values.get(n)))
        if kind in CASTS | KEEPING:
            return args[0]
        if kind in _MADE or kind in _FILLED:
            number = _MADE[kind] if kind in _MADE else args[_FILLED[kind]]
            return const(bool(number) if tensor_of(node).dtype == torch.bool else number)
        if kind == "index":
            return self._lookup(args[0], args[1])
        if "flat_apply" in str(node.target) and "ModIndex" in str(args[2]):  # an index, with a gradient of its own
            return self._lookup(args[3], args[4:])
        if any(isinstance(a, fx.Node) or a is None for a in args) or node.kwargs.get("alpha", 1) != 1:
            return self._unknown(node)
        if kind in _BINARY:
            rounding = argument(node, 2, "rounding_mode") if kind == "div" else None
            if rounding == "trunc":
                return self._unknown(node)
            first, second = args[1::-1] if kind == "rsub" else args[:2]
            return build("floordiv" if rounding == "floor" else _BINARY[kind], as_expr(first), as_expr(second))
        if kind in _TURNED:
            return build(_TURNED[kind], as_expr(args[1]), as_expr(args[0]))
        if kind in _NEGATED:
            return build("not", args[0])
        if kind == "neg":
            return build("mul", args[0], -1)
        return build(kind, *map(as_expr, args)) if kind in FUNCTIONS else self._unknown(node)

    def _lookup(self, table: Any, indices: list[Expr]) -> Expr:
        """The word that stands for one entry of a tensor of the graph."""
        inside = {n for e in indices for n in e.names if n.startswith("@")}
        if not isinstance(table, fx.Node) or inside or len(indices) != tensor_of(table).ndim:
            raise Unraised(self.at, "a function of flex_attention looks up what is itself looked up or only in part")
        word = f"@{len(self.tables)}"
        self.tables[word] = (table, tuple(indices))
        return name(word)

    def _unknown(self, node: fx.Node) -> Any:
        raise Unraised(self.at, f"a function of flex_attention computes {op_name(node) or node.target}")
