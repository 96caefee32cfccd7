"""A causal scan over all keys in a captured graph becomes one over the new ones, from a state to a state.

Between the joined keys and the scan every row is made of its own row alone (`row_by_row.py`), so the same nodes over
the new rows give the new rows. What else has a row for every key, such as a padding mask, is cut to the new ones; that
it still says of the others what it said when they came is asked of a digest that travels beside the state.
"""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from .grown import Entered, joined, put, without_whole_slices
from .nodes import op_name
from .ports import aten
from .primitives.same_past import digest, same_past_op
from .primitives.scan import scan_op
from .primitives.scan_meaning import scan_shapes
from .primitives.scan_spec import ScanSpec
from .refusal import Refused
from .row_by_row import keeps_rows, row_dim, said

_SIZES = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
_FITS = "one causal scan over all keys in order; DynamicCache() for this model"


@dataclass(frozen=True)
class Carried:
    """A layer whose keys became a state: the joined keys and values that it gave back, the state behind this call."""

    layer: Entered
    cats: tuple[fx.Node, fx.Node]
    sizes: tuple[int, ...]  # of a sequence's state
    dtype: torch.dtype
    after: fx.Node
    told: fx.Node | None  # what has a number for every key (B, M)


def carry(layer: Entered) -> Carried:
    """The layer's scan made one over its new rows; its placeholders are now the state and what it was told."""
    cats = joined(layer, layer.keys), joined(layer, layer.values)
    for cat in cats:
        without_whole_slices(cat)
    rows = said(cats[0].meta["val"].shape[2])
    scan = _only_scan(layer, cats, rows)
    spec = ScanSpec.of(str(scan.args[3]))
    if not spec.causal or spec.state or spec.documents or spec.outputs != ("o",):
        raise Refused(f"a scan {spec.text}", where=layer.path, fits=_FITS)
    q, new = _queries(layer, scan), _NewRows(layer, cats, rows, scan)
    given: Any = scan.args
    with new.fake_mode, torch.no_grad():
        kv, tables = [new.of(n) for n in given[1]], [new.of(n) for n in given[2]]
        text = replace(spec, state=f"t{len(tables)}", outputs=("o", "state")).text
        o, after = _scanned(scan, q, kv, [*tables, layer.keys], text)
    _enters_as(layer, after.meta["val"])
    for read in [u for output in scan.users for u in output.users]:
        read.replace_all_uses_with(o)
    state: Tensor = after.meta["val"]
    return Carried(layer, cats, tuple(map(int, state.shape[1:])), state.dtype, after, new.told)


def tell(output: fx.Node, carried: Sequence[Carried]) -> dict[str, fx.Node]:
    """What each state was told of its keys, this call's included, by layer; asked once for layers told the same."""
    groups: dict[fx.Node | None, list[Carried]] = {}
    for one in carried:
        groups.setdefault(one.told, []).append(one)
    found: dict[str, fx.Node] = {}
    for told, those in groups.items():
        first = those[0]
        inputs: dict[str, Any] = {"q": first.cats[0].args[0][1]}  # type: ignore[index]
        if told is not None:
            inputs["told"] = _by_sequence(output, told)
        inputs["length"] = first.layer.length
        asked, now = put(output, _digest, inputs, like=first.after)
        with output.graph.inserting_before(output):
            held = [one.layer.values for one in those]
            call = output.graph.call_function(same_past_op.op, (now, asked, held, first.layer.path))
            same = output.graph.call_function(operator.getitem, (call, 0))
        found |= {one.layer.path: same for one in those}
    return found


def _by_sequence(output: fx.Node, told: fx.Node) -> fx.Node:
    """(M,) as (1, M)."""
    if told.meta["val"].ndim == 2:
        return told
    with output.graph.inserting_before(output):
        return output.graph.call_function(aten.unsqueeze.default, (told, 0))


def _digest(*, q: Tensor, length: Tensor, told: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if told is None:  # nothing hides a key
        told = q.new_ones(1, length.shape[0] + q.shape[2])
    return digest(told, length)


# --- the scan ---------------------------------------------------------------------------------------------------------


def _only_scan(layer: Entered, cats: Sequence[fx.Node], rows: str) -> fx.Node:
    """The one scan that the joined keys and values end in; on the way every row is made of its own."""
    found: dict[fx.Node, None] = {}
    ahead, known = list(cats), set(cats)
    while ahead:
        node = ahead.pop()
        for user in [u for u in node.users if u not in known and op_name(u) != "sym_size"]:
            if user.target is scan_op.op:
                found[user] = None
            elif keeps_rows(user, rows):
                known.add(user)
                ahead.append(user)
            elif user.op != "output" or node not in cats:
                what = op_name(user) or user.op
                raise Refused(f"the joined keys are read by {what} (%{user.name})", where=layer.path, fits=_FITS)
    if len(found) != 1:
        raise Refused(f"the joined keys are read by {len(found)} scans", where=layer.path, fits=_FITS)
    return next(iter(found))


def _queries(layer: Entered, scan: fx.Node) -> fx.Node:
    """The new queries: rows of the past were given none, and what they read is left out."""
    q = scan.args[0]
    assert isinstance(q, fx.Node)
    padding: Any = q.args[1] if op_name(q) in ("pad", "constant_pad_nd") else ()
    for output in scan.users:
        without_whole_slices(output)
    cuts = [u for output in scan.users for u in output.users]
    if list(padding)[:2] != [0, 0] or len(padding) != 4 or padding[3] != 0:
        raise Refused("a scan whose queries are not the new ones", where=layer.path, fits=_FITS)
    if not all(op_name(u) == "slice" and u.args[1] in (2, -2) and u.args[2] is padding[2] for u in cuts):
        raise Refused("a scan of which rows of the past are read", where=layer.path, fits=_FITS)
    return q.args[0]  # type: ignore[return-value]


def _enters_as(layer: Entered, state: Tensor) -> None:
    """The placeholders of keys and values are those of the state and of what it was told."""
    layer.keys.meta["val"] = state
    layer.values.meta["val"] = state.new_empty((state.shape[0], 2), dtype=torch.long)


def _scanned(
    scan: fx.Node, q: fx.Node, kv: Sequence[fx.Node], tables: Sequence[fx.Node], text: str
) -> tuple[fx.Node, fx.Node]:
    graph, place = scan.graph, {k: v for k, v in scan.meta.items() if k != "val"}
    groups = [[q.meta["val"]], [n.meta["val"] for n in kv], [n.meta["val"] for n in tables[:-1]]]
    o_val, state_val = scan_shapes(groups, text)
    with graph.inserting_before(scan):
        call = graph.call_function(scan_op.op, (q, list(kv), list(tables), text))
        o, after = (graph.call_function(operator.getitem, (call, k)) for k in (0, 1))
    call.meta = place | {"val": [o_val, state_val]}
    o.meta, after.meta = place | {"val": o_val}, place | {"val": state_val}
    return o, after


# --- the new rows of what has one for every key -----------------------------------------------------------------------


@dataclass
class _NewRows:
    """Nodes of all rows made again over the new ones, in front of the scan."""

    layer: Entered
    cats: tuple[fx.Node, fx.Node]
    rows: str
    scan: fx.Node
    told: fx.Node | None = None
    made: dict[fx.Node, fx.Node] = field(default_factory=dict)

    @property
    def fake_mode(self) -> Any:
        return self.cats[0].meta["val"].fake_mode

    def of(self, node: fx.Node) -> fx.Node:
        if node not in self.made:
            if node in self.cats:
                self.made[node] = node.args[0][1]  # type: ignore[index,assignment]
            elif isinstance(node.meta.get("val"), Tensor):
                self.made[node] = self._tensor(node)
            else:
                self.made[node] = self._number(node)
        return self.made[node]

    def _tensor(self, node: fx.Node) -> fx.Node:
        sources = _sources(node)
        if row_dim(node.meta["val"], self.rows) is None:
            if sources & set(self.cats) or any(n.op == "placeholder" for n in sources):
                self._refuse(
                    f"{op_name(node)} (%{node.name}), which is the same for all keys, is made by each call anew"
                )
            return node
        if keeps_rows(node, self.rows):
            return self._again(node)
        if sources & set(self.cats):
            self._refuse(f"{op_name(node)} (%{node.name}) mixes the rows of keys")
        if any(n.op == "placeholder" for n in sources):
            self._is_told(node)
        return self._cut(node)

    def _again(self, node: fx.Node) -> fx.Node:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.of)
        with self.scan.graph.inserting_before(self.scan):
            made = self.scan.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        given = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        made.meta = dict(node.meta) | {"val": node.target(*given[0], **given[1])}  # type: ignore[operator]
        return made

    def _cut(self, node: fx.Node) -> fx.Node:
        """The new rows of a tensor that no key went into."""
        value: Tensor = node.meta["val"]
        dim, new = row_dim(value, self.rows), self._count()
        sizes = [new if d == dim else size for d, size in enumerate(value.shape)]
        with self.scan.graph.inserting_before(self.scan):
            made = self.scan.graph.call_function(aten.slice.Tensor, (node, dim, self.layer.seen, sys.maxsize))
        made.meta = dict(node.meta) | {"val": value.new_empty(sizes)}
        return made

    def _is_told(self, node: fx.Node) -> None:
        value: Tensor = node.meta["val"]
        plain = value.ndim <= 2 and row_dim(value, self.rows) == value.ndim - 1
        if not plain or value.is_floating_point() or value.is_complex():
            self._refuse(f"a number of every key that is no padding: %{node.name}, {value.dtype} {value.ndim}d")
        if self.told not in (None, node):
            self._refuse(f"both %{node.name} and %{self.told} say something of every key")
        self.told = node

    def _number(self, node: fx.Node) -> fx.Node:
        size = node.meta.get("val")
        if said(size) == self.rows:
            with self.scan.graph.inserting_before(self.scan):
                made = self.scan.graph.call_function(aten.sym_size.int, (self.of(self.cats[0]), 2))
            made.meta = dict(node.meta) | {"val": self._count()}
            return made
        past = said(self.layer.seen.meta["val"])
        if size is None or re.search(rf"\b{past}\b", said(size)):
            self._refuse(f"a size that counts the past, {size} (%{node.name})")
        return node

    def _count(self) -> Any:
        return self.of(self.cats[0]).meta["val"].shape[2]

    def _refuse(self, found: str) -> NoReturn:
        raise Refused(found, where=self.layer.path, fits=_FITS)


def _sources(node: fx.Node) -> set[fx.Node]:
    """A tensor and all tensors that it is made of; sizes alone make nothing."""
    found, ahead = {node}, [node]
    while ahead:
        more = [n for n in ahead.pop().all_input_nodes if n not in found and not isinstance(n.meta.get("val"), _SIZES)]
        found.update(more)
        ahead += more
    return found
