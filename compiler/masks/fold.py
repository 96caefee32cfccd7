"""The pass: every attention's mask tensors become a predicate over (b, h, i, j) plus the small tensors it looks up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..primitives.attend_spec import AttendSpec, keep_text
from ..symbol_text import parse
from ..symbols import FALSE, TRUE, Expr, build, const
from .aliases import nodes_written_in_place, structure_keys
from .arithmetic import pushed, truth
from .documents import counted, starts
from .emptiness import has_finite_fill, never_empty
from .erasing import erase_unused
from .evaluation import Side, disagreement, spec_exprs
from .families import Families
from .frame import Frame
from .index_space import I, simplify_indices
from .last_row import place_last_rows
from .operators import OPERATORS
from .reading import Reader, backward_slice, dtype, is_dense, is_tensor, leaf_name
from .splitting import split


@dataclass(frozen=True)
class MaskVerdict:
    """What became of one attention's mask."""

    site_node: str
    keep: str  # the predicate now; "" keeps everything
    leftovers: tuple[str, ...]  # lookups of tensors that remain, as the texts name them
    proof: str  # "symbolic", "evaluated" or "kept as tensor"
    reason: str  # what stayed a tensor and why; "" where nothing needs saying
    sizes: tuple[str, ...]  # at which the graph's mask and the predicate were compared


@dataclass(frozen=True)
class Folded:
    """One finding, usable at every attention with the same mask."""

    spec: str
    tables: tuple[fx.Node, ...]
    verdict: MaskVerdict


def fold_masks(graph_module: fx.GraphModule) -> tuple[MaskVerdict, ...]:
    """Replace the mask tensors of all attentions in the graph, in place, and drop what computed them."""
    written = nodes_written_in_place(graph_module.graph)
    keys = structure_keys(graph_module.graph)
    done: dict[Any, Folded] = {}
    verdicts: list[MaskVerdict] = []
    replaced: list[fx.Node] = []
    for node in list(graph_module.graph.nodes):
        if node.target is not torch.ops.reattend.attend.default or not node.args[2]:
            continue
        q, kv, tables, text = node.args
        key = (text, tuple(keys[t] for t in tables), _sizes(q), _sizes(kv[0]))
        if key not in done:
            done[key] = _Site(graph_module, node, written).fold()
        found = done[key]
        verdicts.append(replace(found.verdict, site_node=node.name))
        if found.spec != text or found.tables != tuple(tables):
            replaced.extend(tables)
            node.args = (q, kv, list(found.tables), found.spec)
    if replaced:
        erase_unused(graph_module.graph, replaced)
        graph_module.recompile()
    place_last_rows(graph_module.graph)
    return tuple(verdicts)


def _sizes(node: fx.Node) -> tuple[str, ...]:
    return tuple(str(s) for s in node.meta["val"].shape[:3])


class _Site:
    """One attention whose tables are to be read."""

    def __init__(self, graph_module: fx.GraphModule, node: fx.Node, written: frozenset[fx.Node]) -> None:
        self.graph_module, self.node, self.written = graph_module, node, written
        given: Any = node.args
        self.q, self.kv, self.tables, self.text = given
        self.spec = AttendSpec.of(self.text)
        self.frame = Frame.of(self.q.meta["val"].shape[2], self.kv[0].meta["val"].shape[2])
        self.plain = _from_start(self.spec, self.frame)
        self.old = Side(self.spec, tuple((f"t{k}", t) for k, t in enumerate(self.tables)))

    def fold(self) -> Folded:
        if self.spec.more or self.spec.q_positions or self.spec.k_positions:
            return self._kept("its positions are given by tables", ())
        if self.plain.align != "start":
            return self._kept("a sink or an epilogue counts from the end of the keys", ())
        candidates = [n for n, _ in self.old.tables if n in self.old.used]
        reasons: list[str] = []
        for attempt in (candidates, *([c] for c in candidates if len(candidates) > 1)):
            found = self._fold(attempt)
            if isinstance(found, Folded):
                return found
            reasons.append(found)
        return self._kept("; ".join(dict.fromkeys(r for r in reasons if r)), ())

    def _kept(self, reason: str, sizes: tuple[str, ...]) -> Folded:
        verdict = MaskVerdict(self.node.name, self.spec.keep, _leftovers(self.spec), "kept as tensor", reason, sizes)
        return Folded(self.text, tuple(self.tables), verdict)

    def _fold(self, candidates: Sequence[str]) -> Folded | str:
        """The finding with these tables read, or why there is none."""
        families = Families(self.graph_module, self.q, self.kv[0])
        reader = Reader(self.graph_module, self.frame, self.written, OPERATORS)
        new, nodes = self._read(reader, candidates)
        tried = families.recognise([reader.leaves[x] for x in _dense_leaves(new) if x in reader.leaves], reader)
        if tried:
            reader = Reader(self.graph_module, self.frame, self.written, OPERATORS, tried)
            new, nodes = self._read(reader, candidates)
        late = [n.name for n in nodes.values() if n in self.written and n not in self.tables]
        if late:  # at the attention its memory may hold something else than where the mask was computed
            return f"{', '.join(late)} is written in place"
        if new.keep_expr.text == FALSE.text:
            return "it keeps no key"
        if len(_dense_leaves(new)) > len(_dense_leaves(self.spec)):
            return "it is made of several tensors over queries and keys"
        side, tables = _numbered(new, nodes | dict(self.old.tables))
        same_score = side.score == self.spec.score
        if side.text == self.text or (same_score and (set(tables) == set(self.tables) or _all_dense(side))):
            return "; ".join(reader.reasons()) or "nothing to fold"
        cut = [n for x in nodes if (n := reader.leaves.get(x)) is not None and starts(n) is None]
        after = Side(side, tuple((f"t{k}", t) for k, t in enumerate(tables)))
        wrong, sizes = disagreement(self.old, after, cut, self.q, self.kv[0], self.graph_module, families.beyond)
        if wrong:
            return wrong
        proof = "evaluated" if tried else "symbolic"
        verdict = MaskVerdict(self.node.name, side.keep, _leftovers(side), proof, self._remarks(reader, new), sizes)
        return Folded(side.text, tables, verdict)

    def _read(self, reader: Reader, candidates: Sequence[str]) -> tuple[AttendSpec, dict[str, fx.Node]]:
        """The spec with the tables read, in terms of nodes, and the nodes it looks up."""
        nodes = dict(self.old.tables)

        def element(table: str) -> Any:
            def read(*index: Expr) -> Expr:
                e = reader.at(nodes[table], index)
                return truth(e) if dtype(nodes[table]) == torch.bool else e

            return read

        values = {table: element(table) for table in candidates}
        space = self.frame.space
        whole = pushed(self.plain.score_expr.replace(values))
        own = truth(pushed(self.plain.keep_expr.replace(values)))
        low, score = split(whole)
        keep = simplify_indices(counted(own & low, nodes | reader.leaves), space)
        spec = replace(self.plain, keep=keep_text(keep), score=simplify_indices(score, space).text)
        if self.plain.empty_expr is not None:
            whole = pushed(self.plain.empty_expr.replace(values))
        elif own.text != TRUE.text:
            whole = build("where", own, whole, const(-math.inf))
        some = never_empty(keep, space) and not self._may_lower(score, reader, nodes)
        needed = has_finite_fill(whole) and keep.text != TRUE.text and not some
        spec = _aligned(replace(spec, empty=simplify_indices(whole, space).text if needed else ""), self.frame)
        used = {e.args[0] for x in spec_exprs(spec) for e in x.walk() if e.op == "lookup"}
        return spec, {leaf: n for leaf, n in reader.leaves.items() if leaf in used}

    def _may_lower(self, score: Expr, reader: Reader, nodes: dict[str, fx.Node]) -> bool:
        """Whether a bias made of the call's data may take the weight of the keys that are kept."""
        known = nodes | reader.leaves
        biases = [known[e.args[0]] for e in score.walk() if e.op == "lookup" and e.args[0] in known]
        return any(_is_data(n) and not reader.is_learned(n) and dtype(n).is_floating_point for n in biases)

    def _remarks(self, reader: Reader, new: AttendSpec) -> str:
        remarks = [f"{n.name}: {r}" for n, r in reader.explained() if leaf_name(n) in _dense_leaves(new)]
        if new.empty:
            remarks.append("a query may keep no key: there the model's own fill counts")
        return "; ".join(remarks)


def _is_data(node: fx.Node) -> bool:
    return any(n.op == "placeholder" and is_tensor(n) for n in backward_slice([node]))


def _from_start(spec: AttendSpec, frame: Frame) -> AttendSpec:
    """The same with i counted from the first query, where nothing else in the spec uses i."""
    if spec.align == "start" or _counted_elsewhere(spec):
        return spec
    ahead = {"i": I + (frame.space.keys - frame.space.queries)}
    return replace(_shifted(spec, ahead), align="start")


def _shifted(spec: AttendSpec, index: dict[str, Expr]) -> AttendSpec:
    empty = "" if spec.empty_expr is None else spec.empty_expr.replace(index).text
    keep, score = spec.keep_expr.replace(index), spec.score_expr.replace(index)
    return replace(spec, keep=keep_text(keep), score=score.text, empty=empty)


def _aligned(spec: AttendSpec, frame: Frame) -> AttendSpec:
    """The same with i counted so that the last query stands at the last key, if it is causal so, or shorter."""
    space = frame.space
    if spec.align != "start" or space.queries.text == space.keys.text or _counted_elsewhere(spec):
        return spec
    shift = build("sub", space.keys, space.queries)
    moved = _shifted(spec, {"i": I - shift})
    longer = len(moved.keep) + len(moved.score) >= len(spec.keep) + len(spec.score)
    if longer and not moved.is_causal:
        return spec
    return replace(moved, align="end")


def _counted_elsewhere(spec: AttendSpec) -> bool:
    """Whether a sink or an epilogue counts queries too."""
    return any(text and "i" in parse(text).names for text in (spec.sink, spec.after))


def _dense_leaves(spec: AttendSpec) -> list[str]:
    found = [e.args[0] for x in (spec.keep_expr, spec.score_expr) for e in x.walk() if is_dense(e)]
    return list(dict.fromkeys(found))


def _all_dense(spec: AttendSpec) -> bool:
    """Whether a predicate is nothing but tensors over queries and keys."""
    return bool(spec.conjuncts) and all(c.op == "ne" and any(map(is_dense, c.args)) for c in spec.conjuncts)


def _leftovers(spec: AttendSpec) -> tuple[str, ...]:
    """Lookups of the score, and those of the predicate that need a tensor over queries and keys."""
    biases = [e.text for e in spec.score_expr.walk() if e.op == "lookup"]
    dense = [e.text for e in spec.keep_expr.walk() if is_dense(e)]
    return tuple(dict.fromkeys([*dense, *biases]))


def _numbered(spec: AttendSpec, nodes: dict[str, fx.Node]) -> tuple[AttendSpec, tuple[fx.Node, ...]]:
    """Tables named t0, t1, ... in order of first use, each tensor once."""
    tables: list[fx.Node] = []

    def named(table: str) -> str:
        node = nodes[table]
        if node not in tables:
            tables.append(node)
        return f"t{tables.index(node)}"

    def renamed(text: str) -> str:
        return _renamed(parse(text), named).text if text else text

    fields: dict[str, Any] = {
        f: renamed(getattr(spec, f)) for f in ("keep", "score", "weight", "sink", "after", "empty")
    }
    return replace(spec, **fields), tuple(tables)


def _renamed(e: Expr, named: Callable[[str], str]) -> Expr:
    if e.op == "lookup":
        return Expr("lookup", (named(e.args[0]), *(_renamed(a, named) for a in e.args[1:])))
    if e.op in ("name", "const"):
        return e
    return build(e.op, *(_renamed(a, named) for a in e.args))
