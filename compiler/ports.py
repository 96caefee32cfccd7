"""The tensors around a raised attention, by name: found by walking the graph outward from its node.

x ── W_q ── (norm) ── reshape ── q_nope ── rope(cos, sin) ── q ─┐
x_kv ─ W_k, W_v ─────────────────────────────────────── k, v ─ attend ── o ── reshape ── W_o ── y
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from .nodes import args_of, op_name
from .primitives.attend import attend_op
from .primitives.attend_spec import AttendSpec
from .symbol_eval import evaluate
from .symbols import Expr
from .turning import by_place, turning

aten = torch.ops.aten
ATTEND = attend_op.op

RESHAPING = frozenset(  # the same numbers in another order, shape or type
    {"view", "reshape", "_unsafe_view", "transpose", "permute", "unsqueeze", "squeeze", "slice", "select", "expand"}
    | {"contiguous", "clone", "to", "_to_copy", "alias", "flatten", "unflatten", "split", "chunk", "unbind", "t"}
    | {"split_with_sizes", "movedim", "swapaxes", "detach", "numpy_T", "type_as", "view_as", "reshape_as"}
)
PROJECTIONS = frozenset(
    {"linear", "addmm", "matmul", "mm", "conv2d", "conv1d", "_convolution", "convolution", "qlinear"}
)


@dataclass
class Ports:
    """Nodes by port name, weights by role (q, k, v, o), and the node of the projected output."""

    attend: fx.Node
    nodes: dict[str, fx.Node] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    projected: fx.Node | None = None  # W_o's output, (B, N, C)
    padding: Expr | None = None  # the condition on keys alone: t0[b, j] != 0
    rope: bool = False  # queries or keys are turned by their positions
    pairs: str = ""  # in which pairs of channels, where that is known

    def moved(self, mapped: Mapping[fx.Node, fx.Node]) -> Ports:
        """The same ports in a copy of the graph."""
        nodes = {n: mapped[x] for n, x in self.nodes.items()}
        projected = mapped[self.projected] if self.projected is not None else None
        return replace(self, attend=mapped[self.attend], nodes=nodes, weights=dict(self.weights), projected=projected)


def find_ports(node: fx.Node) -> Ports:
    """Every port that the graph offers around one attend node."""
    q, kv, tables, text = args_of(node)
    k, v = kv[:2]
    spec = AttendSpec.of(str(text))
    ports = Ports(node, {"q": q, "k": k, "v": v})
    for role, start in (("q", q), ("k", k), ("v", v)):
        projection = _projection_behind(start)
        if projection is not None:
            weight = _weight_of(projection)
            if weight:
                ports.weights[role] = weight
            if role == "q":
                ports.nodes["x"] = _input_of(projection)
            if role == "k":
                ports.nodes["x_kv"] = _input_of(projection)
    _read_turning(ports, q, k)
    ports.nodes["o"] = next((u for u in node.users if u.target is not None and u.args[1:] == (0,)), node)
    _follow_output(ports)
    ports.padding = next((c for c in spec.conjuncts if is_padding(c)), None)
    if ports.padding is not None:
        # the table that says it; what a mechanism gets is `real_keys`
        ports.nodes["key_padding"] = tables[int(_tables_in(ports.padding)[0][1:])]
    documents = (documents_of(c) for c in spec.conjuncts)
    ids = next((tables[int(name[1:])] for name in documents if name), None)
    if ids is not None and monotone(ids):
        ports.nodes["documents"] = ids
    return ports


def _read_turning(ports: Ports, q: fx.Node, k: fx.Node) -> None:
    """What was turned by position, and by what; both or neither, so that the two stay of one kind."""
    found = [turning(start) for start in (q, k)]
    known = [f for f in found if f is not None]
    ports.rope = bool(known) or any(by_place(t, _is_projection, t.meta["val"].shape[2]) for t in (q, k))
    for role, turned in zip("qk", found):
        if turned is not None:
            ports.nodes |= {f"{role}_nope": turned.plain, "cos": turned.cos, "sin": turned.sin}
    ports.pairs = known[0].pairs if len({f.pairs for f in known}) == 1 else ""


def documents_of(condition: Expr) -> str:
    """The table of a condition that a query and its key are of one document; "" of any other."""
    if condition.op != "eq" or any(not isinstance(a, Expr) or a.op != "lookup" for a in condition.args):
        return ""
    (one, *here), (other, *there) = (a.args for a in condition.args)
    ends = {here[-1].text, there[-1].text} if here and there else set()
    same = one == other and [x.text for x in here[:-1]] == [x.text for x in there[:-1]]
    return str(one) if same and ends == {"i", "j"} else ""


def monotone(ids: fx.Node) -> bool:
    """Whether ids never come back once they have changed: a running sum of conditions, (B, N)."""
    conditions = ("ne", "eq", "lt", "le", "gt", "ge")
    return op_name(ids) == "cumsum" and op_name(ids.args[0]) in conditions and _rank(ids) == 2


def is_padding(condition: Expr) -> bool:
    """A condition on (b, j) alone that looks one table up: which keys are real."""
    return len(_tables_in(condition)) == 1 and "j" in condition.names and condition.names <= {"b", "j"}


def real_keys(padding: Expr, q: Tensor, k: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
    """The port key_padding (B, M), true where a key is real: the condition on keys alone."""
    batch = torch.arange(q.shape[0], device=q.device).view(-1, 1, 1, 1)
    key = torch.arange(k.shape[2], device=q.device).view(1, 1, 1, -1)
    kept = evaluate(padding, {"b": batch, "j": key}, tables, whole=frozenset({"b", "j"}))
    kept = kept if kept.dtype == torch.bool else kept != 0
    return kept.expand(q.shape[0], 1, 1, k.shape[2]).flatten(0, 2)


def _tables_in(e: Expr) -> list[str]:
    return [x.args[0] for x in e.walk() if x.op == "lookup"]


def _tensor_inputs(node: fx.Node) -> Iterator[fx.Node]:
    for arg in node.args:
        for part in arg if isinstance(arg, list | tuple) else (arg,):
            if isinstance(part, fx.Node) and isinstance(part.meta.get("val"), torch.Tensor | list | tuple):
                yield part


def walk_back(start: fx.Node, stop: Callable[[fx.Node], bool], limit: int = 64) -> fx.Node | None:
    """The first node satisfying `stop` among the data producers of `start`, nearest first."""
    queue, seen = [start], {start}
    while queue and len(seen) < limit:
        node = queue.pop(0)
        if stop(node):
            return node
        for source in _tensor_inputs(node):
            if source not in seen and source.op == "call_function":
                seen.add(source)
                queue.append(source)
    return None


def _projection_behind(start: fx.Node) -> fx.Node | None:
    return walk_back(start, _is_projection)


def _is_projection(node: fx.Node) -> bool:
    return op_name(node) in PROJECTIONS and _weight_of(node) != ""


def _weight_of(node: fx.Node) -> str:
    """The parameter that a projection multiplies with, through views of it; "" where there is none."""
    if op_name(node) == "qlinear":  # named as before it was quantized
        codes: Any = args_of(node)[1][0]
        return f"{str(codes.target).removesuffix('codes')}weight" if codes.op == "get_attr" else ""
    for arg in reversed(list(_tensor_inputs(node))):
        source = arg
        while source.op == "call_function" and op_name(source) in RESHAPING:
            source = next(_tensor_inputs(source), source)
            if source.op != "call_function":
                break
        if source.op == "get_attr" and _rank(source) >= 2:
            return str(source.target)
    return ""


def _rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.ndim if isinstance(value, torch.Tensor) else 0


def _input_of(projection: fx.Node) -> fx.Node:
    """The (B, N, C) hidden state of a projection, in front of a flattening view."""
    source: Any = projection.args[1 if op_name(projection) == "addmm" else 0]
    if _rank(source) == 2 and op_name(source) in ("view", "reshape", "_unsafe_view") and _rank(source.args[0]) == 3:
        source = source.args[0]
    return source


def _follow_output(ports: Ports) -> None:
    """Forward from o through reshapes to W_o."""
    node = ports.nodes["o"]
    for _ in range(12):
        users = list(node.users)
        if len(users) != 1:
            return
        user = users[0]
        if op_name(user) in PROJECTIONS and _weight_of(user):
            ports.weights["o"] = _weight_of(user)
            user = next(iter(user.users)) if op_name(user) == "qlinear" else user  # its one result
            after = list(user.users)
            flat = len(after) == 1 and _rank(user) == 2 and op_name(after[0]) in ("view", "reshape", "_unsafe_view")
            ports.projected = after[0] if flat else user
            return
        if op_name(user) not in RESHAPING and op_name(user) != "dropout":
            return
        node = user
