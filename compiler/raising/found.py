"""From a softmax to a place: scores behind it, weights ahead of it, and what tells attention from its kin."""

from __future__ import annotations

from ..symbols import Expr
from .axes import Axis, Group, Groups, all_leaves, leaves
from .empty_rows import may_empty
from .layout import data_users
from .near import Unraised
from .operands import beside_features, is_weight, onward, origin, stages
from .place import Operand, Place
from .scores import Scores, read_scores
from .softmaxes import Softmax
from .weights import Weighted, follow_weights


def place_of(softmax: Softmax) -> Place:
    """Raise Unraised with the reason where the softmax is no attention."""
    scores = read_scores(softmax)
    side = _side_of_keys(softmax, scores)
    q_groups, k_groups = _operands(scores, side)
    _used_only_here(softmax, scores)
    table = dict(scores.leaves)
    weighted = follow_weights(softmax.node, scores.shape, scores.columns, scores.sink_at, table)
    q = Operand(scores.product.operands[1 - side], q_groups)
    k = Operand(scores.product.operands[side], k_groups)
    v = Operand(weighted.values, weighted.value_groups)
    i = _queries(scores, side, weighted)
    d = tuple(a for a in all_leaves(q_groups) if a not in set(all_leaves(scores.out)))
    _no_queries_in_values(weighted, v, i)
    _not_pooling(q, k, i)
    _not_channels(q, i, d)
    known = {*leaves(i), *leaves(scores.columns), *leaves(scores.shape[softmax.dim])}
    outer = tuple(tuple(a for a in leaves(g) if a not in known) for g in scores.shape)
    return Place(weighted.product.node, weighted.out, q, k, v, i, leaves(scores.columns), d, weighted.features, outer,
                 scores.value.expr, scores.value.keep, weighted.after, scores.sink, _when_empty(scores),
                 leaves=table)  # fmt: skip


def _when_empty(scores: Scores) -> Expr | None:
    """A finite fill gives rows that keep nothing equal weights: where there can be such rows it is said as it is."""
    keep = scores.value.keep
    parts = keep.args if keep.op == "and" else (keep,)
    if not any(part.text in scores.finite for part in parts):
        return None
    if len(parts) == 1 and not _may_empty(keep, scores):
        return None
    return scores.value.settled


def _may_empty(part: Expr, scores: Scores) -> bool:
    keeps = part.op != "not"
    masks = [scores.leaves[word] for word in sorted(part.names) if word in scores.leaves]
    return any(may_empty(mask, groups, scores.columns, keeps=keeps) for mask, groups in masks)


def _side_of_keys(softmax: Softmax, scores: Scores) -> int:
    """Which factor of the product has the softmax's axis: the keys."""
    groups = scores.product.operand_groups(scores.out)
    columns = set(leaves(scores.columns))
    having = [side for side in (0, 1) if columns & set(all_leaves(groups[side]))]
    if len(having) == 1 and columns <= set(all_leaves(groups[having[0]])):
        free = {a for label in scores.product.free(having[0]) for a in leaves(_labelled(scores, label))}
        if columns <= free:
            return having[0]
    node = scores.product.node
    raise Unraised(softmax.node, f"softmax over axis {softmax.dim}, the keys of its product %{node.name} are on axis "
                                 f"{_axis_of_keys(scores)}")  # fmt: skip


def _labelled(scores: Scores, label: str) -> Group:
    return scores.out[scores.product.out.index(label)]


def _axis_of_keys(scores: Scores) -> str:
    wanted = [set(leaves(_labelled(scores, label))) for label in scores.product.free(1)]
    found = [d for d, g in enumerate(scores.shape) if any(w & set(leaves(g)) for w in wanted)]
    return " and ".join(map(str, found)) or "none of its own"


def _operands(scores: Scores, side: int) -> tuple[Groups, Groups]:
    groups = scores.product.operand_groups(scores.out)
    return groups[1 - side], groups[side]


def _used_only_here(softmax: Softmax, scores: Scores) -> None:
    inner = scores.chain | {softmax.node}
    for node in sorted(scores.chain):
        if node is softmax.node:
            continue
        for user in data_users(node):
            if user not in inner:
                word = "returned" if user.op == "output" else f"also used by %{user.name}"
                raise Unraised(node, f"the scores are {word}")


def _queries(scores: Scores, side: int, weighted: Weighted) -> Group:
    """The axis that only the queries have; of several, the last that is not one of heads."""
    free = [_labelled(scores, label) for label in scores.product.free(1 - side)]
    if len(free) < 2:
        return leaves(free[0]) if free else ()
    groups = scores.product.operand_groups(scores.out)[1 - side]
    q = scores.product.operands[1 - side]
    d = tuple(a for a in all_leaves(groups) if a not in set(all_leaves(scores.out)))
    behind = origin(q, groups)
    heads = beside_features([s.groups for s in stages(q, groups)] + list(behind.trail if behind else ()), d, ())
    ahead = [g for _, g in onward(weighted.product.node, weighted.out)]
    heads |= beside_features(ahead, weighted.features, leaves(scores.columns))
    rows = [g for g in free if not set(leaves(g)) <= heads]
    return leaves((rows or free)[-1])


def _no_queries_in_values(weighted: Weighted, v: Operand, i: Group) -> None:
    if i and set(leaves(i)) & set(all_leaves(v.groups)):
        raise Unraised(weighted.product.node, f"the values %{v.node.name} differ from query to query")


def _not_pooling(q: Operand, k: Operand, i: Group) -> None:
    if is_weight(stages(k.node, k.groups)):
        raise Unraised(k.node, f"the keys %{k.node.name} are a weight: a gate over learned slots")
    many: set[Axis] = set(all_leaves(k.groups))
    if is_weight(stages(q.node, q.groups)) and not i and not set(all_leaves(q.groups)) - many:
        raise Unraised(q.node, f"the only query %{q.node.name} is a weight: pooling by one learned vector")


def _not_channels(q: Operand, i: Group, d: Group) -> None:
    """Where the queries lie along the features of a projection, and the sum does not, tokens are summed over."""
    behind = origin(q.node, q.groups)
    if behind is None or not i:
        return
    rows, summed = set(leaves(i)), set(leaves(d))
    if rows <= behind.features and not summed & behind.features:
        raise Unraised(q.node, f"the queries are channels of %{behind.node.name}: attention over channels, not tokens")
