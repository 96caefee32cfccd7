"""Facts about each raised attention: from its node, its spec and its ports to a `Site`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .nodes import op_name
from .ports import ATTEND, Ports, find_ports, is_padding
from .primitives.attend_spec import CAUSAL, AttendSpec
from .same_rows import same_rows
from .site import Grid, Site
from .symbol_text import parse
from .symbols import Expr, name

MAX_PREFIX = 8  # class, distillation and register tokens in front of a grid


def describe(graph_module: fx.GraphModule, prefix: str = "") -> tuple[tuple[Site, ...], dict[str, Ports]]:
    """The sites of a raised graph in order, and the ports of each; every attend node learns its site's path.

    prefix: where the graph's module stands in the whole model, if it is a part of one.
    """
    nodes = [n for n in graph_module.graph.nodes if n.target is ATTEND]
    paths = _paths(nodes, prefix)
    images = [n for n in graph_module.graph.nodes if op_name(n) in ("conv2d", "convolution", "_convolution")]
    order = {n: k for k, n in enumerate(graph_module.graph.nodes)}
    sites, ports = [], {}
    for index, (node, path) in enumerate(zip(nodes, paths)):
        found = find_ports(node)
        before = [n for n in images if order[n] < order[node]]
        sites.append(_site(node, path, index, found, before))
        ports[path] = found
        node.meta["site"] = path
    return tuple(sites), ports


def _paths(nodes: Sequence[fx.Node], prefix: str) -> list[str]:
    plain = [".".join(part for part in (prefix, module_path(n)) if part) for n in nodes]
    many = Counter(plain)
    seen: Counter[str] = Counter()
    paths = []
    for path in plain:
        paths.append(f"{path}#{seen[path]}" if many[path] > 1 else path)
        seen[path] += 1
    return paths


def module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def _site(node: fx.Node, path: str, index: int, ports: Ports, images: Sequence[fx.Node]) -> Site:
    spec = AttendSpec.of(str(node.args[3]))
    q, k, v = (ports.nodes[n].meta["val"] for n in "qkv")
    x, x_kv = ports.nodes.get("x"), ports.nodes.get("x_kv")
    apart = x is not None and x_kv is not None and x is not x_kv
    cross = apart and not same_rows(x, x_kv, behind_past=spec.align == "end")  # type: ignore[arg-type]
    if spec.align == "start" and not _same_size(q.shape[2], k.shape[2]):
        cross = True  # rows behind a past count from its end; of others positions say nothing
    for port, rows in (("x", q), ("x_kv", k)):
        if port in ports.nodes and not _rows_alike(ports.nodes[port].meta["val"], rows):
            del ports.nodes[port]  # tokens before samples, or a feature map: not what mechanisms are promised
    return Site(
        path=path,
        index=index,
        heads=int(q.shape[1]),
        kv_heads=int(k.shape[1]),
        dim=int(q.shape[-1]),
        v_dim=int(v.shape[-1]),
        scale=float(spec.scale if spec.scale is not None else q.shape[-1] ** -0.5),
        pattern=f"{'causal' if spec.is_causal else 'noncausal'}-{'cross' if cross else 'self'}",
        mask=spec.keep,
        features=features(spec) | ({"rope"} if ports.rope else frozenset()),
        pairs=ports.pairs,
        grid=_grid(q.shape[2], images),
        weights=tuple(sorted(ports.weights.items())),
        ports=tuple(n for n in ports.nodes if n != "o") + ("o",) + (("y",) if ports.projected is not None else ()),
        queries=str(q.shape[2]),
        keys=str(k.shape[2]),
        window=_window(spec),
        width=int(ports.nodes["x"].meta["val"].shape[-1]) if "x" in ports.nodes else 0,
    )


def _rows_alike(x: torch.Tensor, heads: torch.Tensor) -> bool:
    """Whether x is (B, N, C) beside (B, H, N, D)."""
    return x.ndim == 3 and _same_size(x.shape[0], heads.shape[0]) and _same_size(x.shape[1], heads.shape[2])


def _same_size(a: Any, b: Any) -> bool:
    """Equal as written, or in the example where one is a formula: (256 * s0) // 64 may be 4 * s0."""
    if str(a) == str(b):
        return True
    one, other = (size if isinstance(size, int) else size.node.hint for size in (a, b))
    return one == other and not (str(a).isidentifier() and str(b).isidentifier())


def features(spec: AttendSpec) -> frozenset[str]:
    """What a score and mask have besides scale and causality."""
    found: set[str] = set()
    score = spec.score_expr
    if any(e.op == "lookup" or (e.op == "name" and e.args[0] in ("i", "j", "h")) for e in score.walk()):
        found.add("bias")
    if any(map(_bends, score.walk())):
        found.add("softcap")
    if spec.sink:
        found.add("sinks")
    if any(e.op == "lookup" for e in _weight(spec.after).walk()):
        found.add("dropout")
    elif spec.after:
        found.add("mask")
    for condition in spec.conjuncts:
        if any(e.op == "lookup" for e in condition.walk()):
            sides = [a.names & {"i", "j"} for a in condition.args] if condition.op == "eq" else []
            document = sides in ([{"i"}, {"j"}], [{"j"}, {"i"}])
            found.add("padding" if is_padding(condition) else "packed" if document else "mask")
        elif condition.text != CAUSAL:
            found.add("mask" if _offset(condition) is None else "window")
    return frozenset(found)


def _bends(e: Expr) -> bool:
    """Something on the way of the score that is not linear in it."""
    inside = ["s" in a.names for a in e.args if isinstance(a, Expr)]
    if e.op in ("add", "sub"):
        return False
    if e.op in ("truediv", "where"):  # a numerator; what is chosen between
        return inside[1 if e.op == "truediv" else 0]
    return sum(inside) > (1 if e.op == "mul" else 0)


def _weight(text: str) -> Expr:
    """What becomes of a weight; itself where nothing is said."""
    return parse(text) if text else name("w")


def _offset(condition: Expr) -> int | None:
    """w where the condition is i <= j + w, a window of w + 1 keys back."""
    if condition.op != "le" or condition.args[0].text != "i":
        return None
    right = condition.args[1]
    if right.op == "add" and right.args[0].text == "j" and right.args[1].op == "const":
        return int(right.args[1].args[0])
    return None


def _window(spec: AttendSpec) -> int | None:
    offsets = [w for w in map(_offset, spec.conjuncts) if w is not None]
    return min(offsets) + 1 if offsets else None


def _grid(count: Any, images: Sequence[fx.Node]) -> Grid | None:
    """The grid of a site's tokens, from the last feature map in front of it whose size fits."""
    if not images or not isinstance(count, int):
        return None
    for node in reversed(images):
        shape = node.meta["val"].shape
        if len(shape) == 4 and isinstance(shape[2], int) and isinstance(shape[3], int):
            prefix = count - shape[2] * shape[3]
            if 0 <= prefix <= MAX_PREFIX and shape[2] * shape[3] > 1:
                return Grid(shape[2], shape[3], prefix)
    side = round(count**0.5)
    return Grid(side, side) if side * side == count and side > 1 else None
