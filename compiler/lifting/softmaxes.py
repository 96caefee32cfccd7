"""Softmax however it is written: the op, exp(log_softmax), exp(x - logsumexp), exp(x - max) over its own sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from ..ports import op_name
from .index_paths import SAME, shape_of
from .reading import plain_name

NEGLIGIBLE = 1e-6  # added to a sum of exponentials against division by zero; anything larger is another normaliser


@dataclass(frozen=True)
class Softmax:
    """node = softmax of `scores` over `axis`."""

    node: fx.Node
    scores: fx.Node
    axis: int
    inside: tuple[fx.Node, ...] = ()  # nodes of a hand-written one, which belong to it


def as_softmax(node: fx.Node) -> Softmax | None:
    called = op_name(node)
    if called in ("softmax", "_softmax", "_safe_softmax"):
        return _made(node, node.args[0], node.args[1])
    if called == "exp":
        source = _bare(node.args[0])
        if op_name(source) in ("log_softmax", "_log_softmax"):
            return _made(node, source.args[0], source.args[1], (source,))
        if op_name(source) == "sub" and op_name(_bare(source.args[1])) == "logsumexp":
            total = _bare(source.args[1])
            if total.args[0] is source.args[0]:
                return _made(node, total.args[0], _only(total.args[1]), (source, total))
    if called in ("div", "true_divide", "mul"):
        return _over_its_sum(node)
    return None


def almost_softmax(node: fx.Node) -> str:
    """Why exponentials over their sum are no softmax; "" for anything else."""
    if op_name(node) not in ("div", "true_divide") or len(node.args) < 2 or as_softmax(node) is not None:
        return ""
    top, bottom = _bare(node.args[0]), _bare(node.args[1])
    changed = bottom
    while op_name(changed) in ("add", "clamp", "clamp_min", "pow", "sqrt"):
        changed = _bare(changed.args[0])
    if op_name(top) == "exp" and op_name(changed) == "sum" and _bare(changed.args[0]) is top and changed is not bottom:
        return f"the sum of the exponentials is changed by %{bottom.name}: another normaliser"
    return ""


def _over_its_sum(node: fx.Node) -> Softmax | None:
    top, bottom = node.args[:2]
    turned: tuple[fx.Node, ...] = ()
    if op_name(node) == "mul":
        bottom = _bare(bottom)
        if op_name(bottom) != "reciprocal":
            return None
        turned, bottom = (bottom,), bottom.args[0]
    top, bottom = _bare(top), _bare(bottom)
    clamped = (bottom,) if op_name(bottom) in ("add", "clamp", "clamp_min") else ()
    if clamped:
        if not isinstance(bottom.args[1], float) or abs(bottom.args[1]) > NEGLIGIBLE:
            return None
        bottom = _bare(bottom.args[0])
    if op_name(top) != "exp" or op_name(bottom) != "sum":
        return None
    again = _bare(bottom.args[0])  # the same exponentials, or once more of the same scores
    if again is not top and not (op_name(again) == "exp" and again.args[0] is top.args[0]):
        return None
    axes = bottom.args[1] if len(bottom.args) > 1 else None
    return _made(node, top.args[0], _only(axes), (top, again, bottom, *clamped, *turned))


def _made(node: fx.Node, scores: Any, axis: Any, inside: tuple[fx.Node, ...] = ()) -> Softmax | None:
    if not isinstance(scores, fx.Node) or not isinstance(axis, int) or not shape_of(scores):
        return None
    return Softmax(node, scores, axis % len(shape_of(scores)), inside)


def _only(axes: Any) -> Any:
    return axes[0] if isinstance(axes, list | tuple) and len(axes) == 1 else axes


def _bare(node: Any) -> Any:
    while isinstance(node, fx.Node) and (plain_name(node) in SAME or op_name(node) in ("expand", "unsqueeze")):
        node = node.args[0]
    return node
