"""One eager attention, from the product with V backwards: weights, softmax, scores, the product of Q and K."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..ports import PROJECTIONS, RESHAPING, op_name
from ..symbols import TRUE, Expr, name
from .drawn import drawn
from .empty_rows import always_keeps
from .heads import Layout, Shaping, head_count, layout, without_repeats
from .index_paths import MOVES, SAME, ZERO, Index, same_size, shape_of, source_index
from .products import Operand, Product, as_product
from .reading import READABLE, Reader, Unreadable, broadcast, keep_and_score, plain_name, top_of
from .scaling import unscaled
from .softmaxes import Softmax
from .writing import Reading, stand_in, write

aten = torch.ops.aten
I, J, S, W = name("i"), name("j"), name("s"), name("w")


def products_behind(softmax: Softmax) -> list[fx.Node]:
    """Products that the weights reach through readable operations."""
    found, queue, seen = [], [softmax.node], {softmax.node}
    while queue:
        for user in queue.pop(0).users:
            if user in seen:
                continue
            seen.add(user)
            if as_product(user) is not None:
                found.append(user)
            elif plain_name(user) in READABLE or op_name(user) in SAME:
                queue.append(user)
    return found


def raise_chain(softmax: Softmax, behind: fx.Node) -> fx.Node:
    """Replace one softmax(Q K^T) V by an attend node, which is returned."""
    outer = as_product(behind)
    if not isinstance(outer, Product):
        raise Unreadable(f"%{behind.name}: {outer}")
    if outer.added is not None:
        raise Unreadable(f"%{behind.name} adds to the product with the values")
    tables: list[fx.Node] = []
    weights, values, swapped = _sides(outer, softmax)
    sizes = [shape_of(behind)[a] for a in outer.batch]
    index = _weights_index(weights, len(sizes))
    shaping = Shaping(behind)
    reader = Reader(
        lambda n, at: _ends(n, at, softmax.node, W, places), tables, lambda n: _draw(shaping, n, softmax, values)
    )
    places: list[Index] = []
    after = reader.read(weights.node, index, lambda n: n is softmax.node)
    if not places:
        raise Unreadable(f"the weights do not reach %{behind.name} element by element")
    at = places[0]
    if at[softmax.axis].text not in ("j", "j + 1"):
        axes = [e.text for e in at]
        wanted = axes.index("j") if "j" in axes else "none"
        raise Unreadable(f"softmax over axis {softmax.axis}, the product with the values contracts axis {wanted}")
    score, sink, inner, inner_at = _scores(softmax, at, reader)
    found = _Inner(inner, inner_at)
    grouped = len(sizes) == 3 and _grouped(inner, sizes)
    counted = _heads_of(found, values, sizes[0]) if len(sizes) == 1 else None
    shape = layout(sizes, [*found.batch, *at], counted, grouped=grouped)
    between = [*softmax.inside, *reader.chain, *inner.inside, *outer.inside]
    _not_elsewhere([softmax.node, inner.node, *between], [behind, *reader.dropped])
    q_side, k_side = found.sides
    _tokens_contracted(q_side)
    _computed(k_side, values)
    q = shaping.rows(q_side, [shape.settle(e) for e in found.batch])
    k = shaping.rows(k_side, [shape.settle(e) for e in found.batch])
    v = shaping.rows(replace(values, free=values.contracted, contracted=values.free), shape.values)
    q = _in_every_batch(shaping, q, k, v)
    _whole_scores(q, k, v, shape_of(behind)[outer.columns if swapped else outer.rows], sizes)
    heads = shape_of(q)[1]
    bare_k, bare_v = without_repeats(k, heads), without_repeats(v, heads)
    if same_size(shape_of(bare_k)[1], shape_of(bare_v)[1]):
        k, v = bare_k, bare_v
    elif same_size(shape_of(k)[1], 1) != same_size(shape_of(v)[1], 1):
        raise Unreadable("keys and values have different numbers of heads")
    q, k, factor, settle = unscaled(q, k)
    whole = shape.settle(score).replace({"s": S * factor * inner.factor})
    keep, plain = keep_and_score(whole, lambda kept: always_keeps(kept, tables))
    reading = Reading(q, k, v, plain, "" if keep.text == TRUE.text else keep.text, tables,
                      after="" if after.text == "w" else shape.settle(after).text,
                      sink=shape.settle(sink).text if sink is not None else "")  # fmt: skip
    attend, out = write(shaping, reading)
    settle()
    _replace(shaping, outer, behind, out, shape, swapped)
    for node in (behind, *reader.chain):  # a dropout would be drawn twice
        if not node.users:
            node.graph.erase_node(node)
    return attend


def _draw(shaping: Shaping, dropout: fx.Node, softmax: Softmax, values: Operand) -> fx.Node:
    """The table of a dropout of weights; its sizes are read off the products' other operands."""
    product = next((p for p in map(as_product, _behind(softmax.scores)) if isinstance(p, Product)), None)
    sources = [values.node] if product is None else [product.left.node, product.right.node, values.node]
    return drawn(shaping, shape_of(dropout), dropout.args[1], sources)


def _behind(node: fx.Node) -> list[fx.Node]:
    """A node and what it is computed from, nearest first, as far as readable operations go."""
    found = [node]
    for current in found:
        if as_product(current) is None and plain_name(current) in READABLE | {"cat"}:
            found += [n for n in current.all_input_nodes if n not in found]
    return found


def _sides(outer: Product, softmax: Softmax) -> tuple[Operand, Operand, bool]:
    """The weights' side of the product with V, the values' side, and whether the weights stand on the right."""
    probe = Reader(lambda n, at: None, [])
    if probe.leads(outer.left.node, lambda n: n is softmax.node):
        return outer.left, outer.right, False
    return outer.right, outer.left, True


def _weights_index(weights: Operand, batch: int) -> Index:
    rank = len(shape_of(weights.node))
    at: list[Expr] = [ZERO] * rank
    for k in range(batch):
        axis = weights.batch[k]
        if axis >= 0 and not same_size(shape_of(weights.node)[axis], 1):
            at[axis] = name(f"g{k}")
    at[weights.free], at[weights.contracted] = I, J
    return tuple(at)


def _ends(node: fx.Node, at: Index, end: fx.Node, value: Expr, places: list[Index]) -> Expr | None:
    if node is not end:
        return None
    places.append(at)
    return value


def _scores(softmax: Softmax, at: Index, reader: Reader) -> tuple[Expr, Expr | None, Product, Index]:
    """The score in terms of s, the sink where a column beside the scores is cut off again, the product of Q and K."""
    scores: Any = softmax.scores
    chain: list[fx.Node] = []
    while plain_name(scores) in SAME or _top_taken_off(scores):
        chain.append(scores)
        reader.dropped += _top_taken_off(scores)
        scores = scores.args[0]
    column = None
    if op_name(scores) == "cat" and (int(scores.args[1]) if len(scores.args) > 1 else 0) % len(at) == softmax.axis:
        parts = list(scores.args[0])
        column = next((p for p in parts if same_size(shape_of(p)[softmax.axis], 1)), None)
        rest = [p for p in parts if p is not column]
        if column is None or len(rest) != 1:
            raise Unreadable(f"%{scores.name} joins scores along the keys")
        chain.append(scores)
        at = tuple(J if axis == softmax.axis else e for axis, e in enumerate(at))
        scores = rest[0]
    elif at[softmax.axis].text != "j":
        raise Unreadable("a column of the weights is cut off in front")
    reader.chain += chain
    ends: list[tuple[Product, Index]] = []

    def product_at(node: fx.Node, here: Index) -> Expr | None:
        product = as_product(node)
        if product is None:
            return None
        if isinstance(product, str):
            raise Unreadable(f"%{node.name}: {product}")
        if not ends or ends[0][0].node is not node:
            if ends or not _rows_and_columns(product, here):
                return None
            ends.append((product, here))
        if product.added is None:
            return S
        return S + reader.table(product.added, broadcast(here, product.added)) * product.added_factor

    inner = Reader(product_at, reader.tables)
    inner.chain, inner.dropped = reader.chain, reader.dropped
    score = inner.read(scores, at, lambda n: isinstance(as_product(n), Product))
    if not ends:
        raise Unreadable("no product of queries and keys in front of the softmax")
    sink = None
    if column is not None:
        sink = inner.table(column, tuple(ZERO if e.text == "j" else e for e in at))
    return score, sink, *ends[0]


def _top_taken_off(node: Any) -> tuple[fx.Node, ...]:
    return top_of(node.args[1], node.args[0]) if op_name(node) == "sub" else ()


def _rows_and_columns(product: Product, here: Index) -> bool:
    return {here[product.rows].text, here[product.columns].text} == {"i", "j"}


class _Inner:
    """The product of Q and K, with its queries' side first."""

    def __init__(self, product: Product, at: Index) -> None:
        self.product = product
        self.batch = [at[a] for a in product.batch]
        turned = at[product.rows].text == "j"
        self.sides: tuple[Operand, Operand] = (product.right, product.left) if turned else (product.left, product.right)


def _grouped(inner: Product, sizes: Sequence[Any]) -> bool:
    """Three batch axes of which the keys lack the last: grouped queries."""
    for side in (inner.left, inner.right):
        if len(side.batch) == 3 and (side.batch[2] < 0 or same_size(shape_of(side.node)[side.batch[2]], 1)):
            return not same_size(sizes[2], 1)
    return False


def _heads_of(found: _Inner, values: Operand, batch: Any) -> int | None:
    for side, feature in ((values, values.free), *((side, side.contracted) for side in found.sides)):
        heads = head_count(side.node, batch, shape_of(side.node)[feature])
        if heads:
            return heads
    return None


def _not_elsewhere(chain: Sequence[fx.Node], known: Sequence[fx.Node]) -> None:
    """Scores and weights must have no other use: a rewrite would leave it behind."""
    inside = {*chain, *known}
    for node in inside - {known[0]}:
        for user in node.users:
            if user in inside or op_name(user) == "sym_size":
                continue
            if plain_name(user) != op_name(user):
                raise Unreadable(f"%{node.name} is changed in place by %{user.name}")
            where = "returned" if user.op == "output" else f"also used by %{user.name}"
            raise Unreadable(f"the scores or weights %{node.name} are {where}")


def _tokens_contracted(side: Operand) -> None:
    """Channel attention multiplies Q and K over the tokens; the feature axis of a projection tells it apart."""
    node: Any = side.node
    at: list[Expr] = [name(f"x{a}") for a in range(len(shape_of(node)))]
    at[side.contracted] = name("c")
    index: Index | None = tuple(at)
    for _ in range(16):
        if op_name(node) in PROJECTIONS and index is not None:
            feature = index[1 if "conv" in op_name(node) else -1]
            if "c" not in feature.names and any("c" in e.names for e in index):
                raise Unreadable("the product of queries and keys contracts the tokens: channel attention")
            return
        same = op_name(node) in ("div", "mul") and _as_wide(node.args[0], node)  # normalised or scaled
        if same:
            node = node.args[0]
            continue
        if plain_name(node) not in RESHAPING | {"mT"} or index is None or not isinstance(node.args[0], fx.Node):
            return
        index, node = source_index(node, index), node.args[0]


def _as_wide(arg: Any, node: fx.Node) -> bool:
    one, other = shape_of(arg), shape_of(node)
    return len(one) == len(other) and all(same_size(a, b) for a, b in zip(one, other))


def _in_every_batch(shaping: Shaping, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node:
    """Learned queries are the same for every example: they take their batch from the keys."""
    wider = next((t for t in (k, v) if not same_size(shape_of(t)[0], 1)), None)
    if wider is None or not same_size(shape_of(q)[0], 1):
        return q
    size = shape_of(wider)[0]
    return shaping.call(aten.expand.default, q, [size if isinstance(size, int) else shaping.size(wider, 0), -1, -1, -1])


def _whole_scores(q: fx.Node, k: fx.Node, v: fx.Node, rows: Any, batch: Sequence[Any]) -> None:
    """Scores that are cut before the softmax have an index formula, and other sizes than the product."""
    b, heads, n, _ = shape_of(q)
    total: Any = 1
    for size in batch:
        total = total * size
    whole = same_size(n, rows) and same_size(shape_of(k)[2], shape_of(v)[2]) and same_size(b * heads, total)
    if not whole or not all(same_size(t, 1) or same_size(t, b) for t in (shape_of(k)[0], shape_of(v)[0])):
        raise Unreadable("only a part of the product of queries and keys is used")


def _computed(keys: Operand, values: Operand) -> None:
    """Keys and values that are both weights are a classifier or a gate over learned slots."""
    bare = []
    for side in (keys, values):
        node: Any = side.node
        while plain_name(node) in MOVES:
            node = node.args[0]
        bare.append(node)
    if all(node.op == "get_attr" for node in bare):
        raise Unreadable(f"keys and values are weights ({bare[0].name}, {bare[1].name}): a gate over learned slots")


def _replace(shaping: Shaping, outer: Product, behind: fx.Node, out: fx.Node, shape: Layout, swapped: bool) -> None:
    """The output back in the layout, order of axes and dtype of the product with V."""
    batch = len(outer.batch)
    rows, columns = (outer.columns, outer.rows) if swapped else (outer.rows, outer.columns)
    ours = [*outer.batch, rows, columns]  # where our axes (batch..., rows, features) stand in the model's output
    order = [ours.index(axis) for axis in range(batch + 2)]
    out = shaping.back(out, shape, order, shape_of(behind))
    wanted = behind.meta["val"].dtype
    if out.meta["val"].dtype != wanted:
        out = shaping.call(torch.ops.aten.to.dtype, out, wanted)
    stand_in(behind, out)
