"""Token merging: similar tokens of an encoder are merged between attention and MLP (ToMe, arXiv 2210.09461).

    u = metric / |metric|;  A = even, B = odd positions;  each a in A points to its most similar b in B
    the r best-matched tokens of A join their b:   x' = P(x * size) / size',   size' = P size,   P in {0,1}^(N-r x N)
    next layer: softmax(q k^T * scale + log size_j) v       (proportional attention)

The metric is the mean of the keys over heads. Lengths depend on the layer alone, so the graph stays static.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx

from ...compiler.mechanism import Limit, Mechanism, register
from ...compiler.nodes import args_of
from ...compiler.primitives.attend_spec import AttendSpec
from ...compiler.program import Program
from ...compiler.refusal import Refused, nearest
from ...compiler.surgery import block_end, carry_lengths, insert, residual_add
from ...compiler.symbol_text import parse
from .bipartite import Plan, match, match_at_random, match_every, merge, sources, unmerge

ALGORITHMS = ("bipartite", "kth", "random")


@register("tome_like")
@dataclass(frozen=True)
class TomeLike(Mechanism):
    r: int | tuple[int, ...] = 0  # tokens removed per layer, or a list (padded with zeros)
    r_inflect: float = 0.0  # -1 linearly decreasing, 0 constant, +1 increasing
    class_token: bool = True  # row 0 is protected
    distill_token: bool = False  # row 1 is protected
    prop_attn: bool = True  # proportional attention, for models that were not trained with merging
    unmerge: bool = False  # give every original token its row back after the last site
    trace_source: bool = False  # fast.traces() has which original tokens are in each row, after every merge
    algorithm: str = "bipartite"  # | kth: every stride-th token stays | random: r random tokens join others
    stride: int = 2  # of kth

    part = "model"
    kind = "approximate"
    paper = "arXiv 2210.09461"
    judged = ({"r": 8},)

    def schedule(self, layers: int) -> tuple[int, ...]:
        """Tokens to remove after each layer."""
        if isinstance(self.r, tuple | list):
            return (*self.r, *(0 for _ in range(layers - len(self.r))))[:layers]
        low = int(self.r * (1 - self.r_inflect))
        step = (2 * self.r - 2 * low) / (layers - 1) if layers > 1 else 0.0
        return tuple(int(low + step * layer) for layer in range(layers))

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise Refused(f"algorithm {self.algorithm!r}", where="tome_like", fits=nearest(self.algorithm, ALGORITHMS))
        if self.algorithm != "bipartite" and (self.class_token or self.distill_token):
            fits = "class_token: false and distill_token: false, or algorithm: bipartite"
            raise Refused(f"{self.algorithm} protects no token", where="tome_like", fits=fits)
        if self.stride < 2:
            raise Refused(f"stride={self.stride}", where="tome_like", fits="2 or more")

    def apply(self, program: Program, paths: Sequence[str]) -> None:
        protected = int(self.class_token) + int(self.distill_token)
        size: fx.Node | None = None
        stream: fx.Node | None = None
        plans: list[tuple[fx.Node, int]] = []
        source: fx.Node | None = None
        for path, wanted in zip(paths, self.schedule(len(paths))):
            ports, length = program.ports[path], _tokens(program, path)
            if size is not None and self.prop_attn:
                _weigh_keys(ports.attend, size)
            r = self._removed(wanted, length, protected)
            if r <= 0:
                continue
            add = residual_add(program, path)
            inputs = {"k": ports.nodes["k"], "x": add} | ({"size": size} if size is not None else {})
            rows, merged, size = insert(add.next, lambda r=r, **t: self._step(r, **t), inputs, like=add)
            if self.trace_source:
                source = _traced(program, path, rows, length - r, source, behind=merged)
            order = {node: position for position, node in enumerate(program.graph.graph.nodes)}
            later = partial(_comes_later, order=order, than=merged)
            add.replace_all_uses_with(merged, delete_user_cb=later)
            plans.append((rows, length - r))
            stream = merged
            carry_lengths(program, merged, length, length - r)
        if self.unmerge and stream is not None:
            _unmerge_at_end(program, stream, plans)

    def _removed(self, wanted: int, length: int, protected: int) -> int:
        if self.algorithm == "kth" and wanted > 0:
            return length - length // self.stride
        return min(wanted, (length - protected) // 2)

    def _plan(self, metric: Tensor, r: int) -> Plan:
        if self.algorithm == "kth":
            return match_every(metric, self.stride)
        if self.algorithm == "random":
            return match_at_random(metric, r, torch.rand(metric.shape[:2], device=metric.device))
        return match(metric, r, class_token=self.class_token, distill_token=self.distill_token)

    def _step(self, r: int, k: Tensor, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        plan = self._plan(k.mean(1), r)
        merged, grown = merge(plan, x, torch.ones_like(x[..., :1]) if size is None else size)
        return plan.rows, merged, grown

    def limits(self) -> Iterable[Limit]:
        x = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
        ones = torch.ones(2, 9, 1)
        plan = match(x, 3, class_token=True, distill_token=False)
        yield Limit("sizes sum to the number of tokens", lambda: merge(plan, x, ones)[1].sum(1), lambda: ones.sum(1))
        yield Limit("a constant stays", lambda: merge(plan, ones, ones)[0], lambda: torch.ones(2, 6, 1))
        yield Limit("the class token stays first", lambda: merge(plan, x, ones)[0][:, 0], lambda: x[:, 0])


def _traced(
    program: Program, path: str, rows: fx.Node, total: int, before: fx.Node | None, *, behind: fx.Node
) -> fx.Node:
    """Which tokens of the beginning are in each row now, as a named trace."""
    inputs = {"rows": rows} | ({"before": before} if before is not None else {})

    def members(rows: Tensor, before: Tensor | None = None) -> Tensor:
        return sources(Plan(rows, total), before)

    (source,) = insert(behind.next, members, inputs, like=behind)
    program.traces.append((f"{path}.source", source))
    return source


def _tokens(program: Program, path: str) -> int:
    """How many tokens a site has, which must be known and of a kind that may be merged."""
    site, length = program.site(path), program.ports[path].nodes["k"].meta["val"].shape[2]
    if site.causal or not site.self_attention:
        raise Refused(f"tome_like merges tokens of noncausal self-attention, this is {site.pattern}", where=path)
    if not isinstance(length, int):
        raise Refused(f"{length} tokens", where=path, fits="a static number of tokens (an image encoder)")
    return length


def _weigh_keys(attend: fx.Node, size: fx.Node) -> None:
    """score + log(size of key j)."""
    (logs,) = insert(attend, lambda size: size.squeeze(-1).log(), {"size": size}, like=attend)
    tables = list(args_of(attend)[2])
    spec = AttendSpec.of(str(attend.args[3]))
    score = spec.score_expr + parse(f"t{len(tables)}[b, j]")
    attend.args = (attend.args[0], attend.args[1], [*tables, logs], replace(spec, score=score.text, empty="").text)


def _comes_later(user: fx.Node, *, order: Mapping[fx.Node, int], than: fx.Node) -> bool:
    """Users of the residual stream behind the merge read the merged one; those before it stay."""
    return order[user] > order[than]


def _unmerge_at_end(program: Program, stream: fx.Node, plans: Sequence[tuple[fx.Node, int]]) -> None:
    """Behind the last block every original token gets its row back, through all merges in reverse."""
    end = block_end(stream)
    rows = {f"rows_{k}": node for k, (node, _) in enumerate(plans)}
    counts = [count for _, count in plans]

    def restore(x: Tensor, **rows: Tensor) -> Tensor:
        for k in reversed(range(len(counts))):
            x = unmerge(Plan(rows[f"rows_{k}"], counts[k]), x)
        return x

    (restored,) = insert(end.next, restore, {"x": end, **rows}, like=end)
    order = {node: position for position, node in enumerate(program.graph.graph.nodes)}
    end.replace_all_uses_with(restored, delete_user_cb=partial(_comes_later, order=order, than=restored))
    carry_lengths(program, restored, counts[-1], restored.meta["val"].shape[1])
