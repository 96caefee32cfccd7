"""The search for spans of MoA: what each head loses by them, measured, and the best choice of rules, by HiGHS.

    influence   how the loss changes, to first order, if one weight of a head is taken away; summed over blocks
    rules       a grid of (alpha, beta)
    tables      for each length, head and rule: the influence outside of the rule's mask, and the tokens it keeps
    choose      one rule for every head: the least loss within a density at every length; all plans that none beats
    recipe      a plan as an ordinary recipe

>>> rules = grid([256, 512], [1024], betas=3, interval=256)
>>> rules[0], rules[-1]
((256.0, 0.0), (0.0, 1.0))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ...compiler.capture import Captured, capture
from ...compiler.held_out import as_batch
from ...compiler.pipeline import raise_program
from ...compiler.primitives.attend import attend
from ...compiler.primitives.rows import repeat_heads
from ...compiler.program import Program, Store
from ...compiler.refusal import Refused
from ...compiler.signature import Call, forward_signature
from ...compiler.taps import stream

Rule = tuple[float, float]
Loss = Callable[[Any], Tensor]  # from a model's output to a number


@dataclass(frozen=True)
class Plan:
    """One rule per head, as (layers, heads) numbers of rules, and its summed influence at each profile length."""

    choice: Tensor
    losses: tuple[float, ...]


def influence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, *, take_abs: bool = True) -> Tensor:
    """-E_ij (B, H, N, N): to first order the loss added if weight ij is taken away and its row normalised again.

    g is the gradient of the loss by the attention's output; E_ij = P_ij (G_ij - sum_k G_ik P_ik) / (1 - P_ij + eps),
    G = g v^T. The first row, which cannot be normalised again, is P G.
    """
    k, v = repeat_heads(k, q), repeat_heads(v, q)
    weights: Tensor = attend(q, k, v, causal=True, scale=scale, outputs=("weights",))
    by_weight = g.to(weights.dtype) @ v.to(weights.dtype).mT
    mean = (by_weight * weights).sum(-1, keepdim=True)
    found = weights * (by_weight - mean) / (1 - weights + torch.finfo(weights.dtype).eps)
    found = -torch.cat((weights[..., :1, :] * by_weight[..., :1, :], found[..., 1:, :]), -2).tril()
    return found.abs() if take_abs else found


def profile(
    model: nn.Module, calls: Iterable[Any], loss: Loss, *, block_size: int = 64, take_abs: bool = True
) -> dict[str, Tensor]:
    """The mean influence (key heads, blocks, blocks) at every causal site, of calls of one length.

    Heads that share keys share a rule: the largest influence among them counts. One pass forwards and backwards a call.
    """
    totals: dict[str, Tensor] = {}
    samples = 0
    for given in calls:
        args, kwargs = as_batch(given)
        call = Call.of(forward_signature(model), args, kwargs)
        captured = capture(model, args, kwargs, dynamic=False)
        program, _ = raise_program(captured, Store())
        paths = [s.path for s in program.sites if s.pattern == "causal-self"]
        if not paths:
            raise Refused("no causal self-attention", where="moa_search", fits="a language model")
        held = _ports(program, paths, captured, call, loss)
        for path in paths:
            site, (q, k, v, g) = program.site(path), held[path]
            found = _blocks(influence(q, k, v, g, site.scale, take_abs=take_abs), block_size)
            found = found.unflatten(1, (site.kv_heads, -1)).amax(2).sum(0)
            totals[path] = totals[path] + found if path in totals else found
        samples += q.shape[0]
    return {path: total / samples for path, total in totals.items()}


def _ports(
    program: Program, paths: Sequence[str], captured: Captured, call: Call, loss: Loss
) -> dict[str, tuple[Tensor, ...]]:
    """q, k, v and the gradient of the loss by the output, at every site."""
    seen: dict[str, Tensor] = {}
    taps = {f"{path}\0{port}": program.ports[path].nodes[port] for path in paths for port in ("q", "k", "v", "o")}
    with torch.enable_grad():
        flat = stream(program.graph, captured.inputs(call), taps, seen.__setitem__)
        value = loss(captured.result(call, flat))
        outputs = [seen[f"{path}\0o"] for path in paths]
        if not value.requires_grad:
            raise Refused("a loss without a gradient", where="moa_search", fits="parameters that require gradients")
        gradients = torch.autograd.grad(value, outputs)
    return {
        path: (*(seen[f"{path}\0{port}"].detach() for port in ("q", "k", "v")), g)
        for path, g in zip(paths, gradients, strict=True)
    }


def _blocks(found: Tensor, size: int) -> Tensor:
    """(B, H, N, N) summed over blocks, in float32; what does not fill a block at the end is left out."""
    count = found.shape[-1] // size
    if not count:
        raise Refused(f"{found.shape[-1]} tokens", where="moa_search", fits=f"at least one block of {size}")
    found = found[..., : count * size, : count * size].float()
    return found.unflatten(-1, (count, size)).unflatten(-3, (count, size)).sum((-3, -1))


def weighed(found: Tensor, *, by_head: bool = False, by_layer: bool = False, together: bool = False) -> Tensor:
    """The influence (heads, blocks, blocks) of a layer, as shares of each head's or the layer's, summed over heads."""
    for asked, axes in ((by_head, (-1, -2)), (by_layer, (-1, -2, -3))):
        if asked:
            total = found.sum(axes, keepdim=True)
            found = found / torch.where(total == 0, 1.0, total)  # a head without any keeps none
    return found.sum(0, keepdim=True) if together else found


def grid(
    profiled: Sequence[int], extended: Sequence[int] = (), *, betas: int = 9, interval: int = 1024
) -> tuple[Rule, ...]:
    """Rules whose span fits every length, the shortest at the greatest length first."""
    least, middle, most = min(*profiled, *extended, max(profiled)), max(profiled), max(*profiled, *extended, 0)
    alphas = torch.linspace(-least, middle, (middle + least) // interval + 1, dtype=torch.float64).tolist()
    both = product(alphas, torch.linspace(0, 1, betas, dtype=torch.float64).tolist())
    kept = [(a, b) for a, b in both if a + b * middle <= middle and a + b * most <= most and a + b * least > 0]
    return tuple(sorted(kept, key=lambda rule: rule[0] + rule[1] * most))


def layout(rule: Rule, blocks: int, size: int) -> Tensor:
    """The mask of a rule in blocks: a band that holds the diagonal, and the first block beside it."""
    width = max(int(rule[0] // size + rule[1] * blocks), 1)
    i, j = torch.arange(blocks)[:, None], torch.arange(blocks)
    return ((i - j < width) | (j == 0)) & (j <= i)


def tables(found: Tensor, rules: Sequence[Rule], size: int) -> Tensor:
    """(heads, rules): the influence (heads, blocks, blocks) outside of each rule's mask."""
    outside = torch.stack([~layout(rule, found.shape[-1], size) for rule in rules])
    return torch.einsum("hij,rij->hr", found.double().tril(), outside.double())


def costs(length: int, rules: Sequence[Rule], size: int) -> Tensor:
    """(rules,): the tokens that a head of each rule keeps at a length."""
    blocks = max(length // size, 1)
    rows = [int(layout(rule, blocks, size).sum(-1).max()) for rule in rules]
    return torch.tensor([length * row / blocks for row in rows], dtype=torch.float64)


def choose(
    losses: Tensor,  # (profile lengths, layers, heads, rules)
    kept: Tensor,  # (lengths, rules): tokens kept at the profile and the further lengths
    bounds: Sequence[float],  # the tokens that all heads together may keep, at each length
    *,
    lower_bound_ratio: float = 0.9,
    rules_per_layer_limit: int | None = 2,
    points: int = 5,
) -> list[Plan]:
    """The plans within the bounds that no other found plan beats at every profile length.

    Each length's loss alone gives its range; then it is minimised once more for every combination of intervals, the
    range cut into points - 1, in which the other lengths' losses shall lie.
    """
    program = _Integer(losses, kept, bounds, lower_bound_ratio, rules_per_layer_limit)
    alone = [program.best(goal, []) for goal in range(len(losses))]
    first = [plan for plan in alone if plan is not None]
    if len(first) < len(losses):
        raise Refused("no plan within the bounds", where="moa_search", fits="other densities, or more rules")
    ends = torch.tensor([plan.losses for plan in first], dtype=torch.float64)
    cuts = [
        torch.linspace(float(e.min()), float(e.max()), points, dtype=torch.float64).tolist() for e in ends.unbind(1)
    ]
    plans = list(first)
    for goal in range(len(losses) if len(losses) > 1 else 0):
        others = [n for n in range(len(losses)) if n != goal]
        for picked in product(range(points - 1), repeat=len(others)):
            within = [(n, cuts[n][at], cuts[n][at + 1]) for n, at in zip(others, picked, strict=True)]
            plan = program.best(goal, within)
            plans += [plan] if plan is not None else []
    unique = list({plan.losses: plan for plan in plans}.values())
    return [plan for plan in unique if not any(_beats(other.losses, plan.losses) for other in unique)]


def _beats(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


class _Integer:
    """One binary x per layer, head and rule, and where rules of a layer are counted one z per layer and rule."""

    def __init__(self, losses: Tensor, kept: Tensor, bounds: Sequence[float], ratio: float, limit: int | None) -> None:
        try:
            from scipy import optimize, sparse
        except ImportError:
            fits = "pip install 'reattend[plan]'"
            raise Refused("scipy is not installed", where="moa_search", fits=fits) from None
        self.optimize = optimize
        self.shape = losses.shape[1:]
        layers, heads, rules = self.shape
        count, extra = layers * heads * rules, layers * rules if limit is not None else 0
        self.goals = torch.cat((losses.double().flatten(1), losses.new_zeros(len(losses), extra).double()), 1).numpy()
        one = sparse.kron(sparse.eye(layers * heads), torch.ones(1, rules).numpy())
        some = torch.cat((kept.double().repeat(1, layers * heads), torch.zeros(len(kept), extra)), 1).numpy()
        self.fixed = [
            optimize.LinearConstraint(sparse.hstack([one, sparse.csr_matrix((layers * heads, extra))]), 1, 1),
            optimize.LinearConstraint(some, [ratio * bound for bound in bounds], list(bounds)),
        ]
        if limit is not None:
            shared = sparse.kron(sparse.eye(layers), sparse.kron(torch.ones(heads, 1).numpy(), sparse.eye(rules)))
            self.fixed.append(optimize.LinearConstraint(sparse.hstack([sparse.eye(count), -shared]), -1, 0))
            per_layer = sparse.kron(sparse.eye(layers), torch.ones(1, rules).numpy())
            used = sparse.hstack([sparse.csr_matrix((layers, count)), per_layer])
            self.fixed.append(optimize.LinearConstraint(used, 0, limit))

    def best(self, goal: int, within: Sequence[tuple[int, float, float]]) -> Plan | None:
        """The plan of the least loss at one length, the others within given ends; None where there is none."""
        size = self.goals.shape[1]
        more = [self.optimize.LinearConstraint(self.goals[n], low, high) for n, low, high in within]
        found = self.optimize.milp(
            self.goals[goal],
            constraints=[*self.fixed, *more],
            integrality=[1] * size,
            bounds=self.optimize.Bounds(0, 1),
        )
        if found.x is None:
            return None
        layers, heads, rules = self.shape
        x = torch.from_numpy(found.x)[: layers * heads * rules].view(layers, heads, rules)
        choice = x.argmax(-1)
        losses = torch.from_numpy(self.goals[:, : x.numel()]).view(-1, layers, heads, rules)
        picked = losses.gather(-1, choice.expand(len(losses), -1, -1)[..., None]).sum((1, 2, 3))
        return Plan(choice, tuple(picked.tolist()))


def recipe(plan: Plan, paths: Sequence[str], rules: Sequence[Rule], **knobs: Any) -> dict[str, Any]:
    """A plan as an ordinary recipe: per site the alphas and betas of its heads, and further knobs of moa."""
    sites = []
    for path, numbers in zip(paths, plan.choice.tolist(), strict=True):
        alphas, betas = [rules[n][0] for n in numbers], [rules[n][1] for n in numbers]
        own = {"alpha": alphas, "beta": betas} if len(numbers) > 1 else {"alpha": alphas[0], "beta": betas[0]}
        sites.append({"match": path, "attention": {"moa": {**own, **knobs}}})
    return {"version": 1, "sites": sites}


def moa_search(
    model: nn.Module,
    calibrate: Mapping[int, Iterable[Any]],
    loss: Loss,
    *,
    densities: float | Mapping[int, float] = 0.5,
    extend_lengths: Sequence[int] = (),
    block_size: int = 64,
    num_betas: int = 9,
    alpha_interval: int = 1024,
    lower_bound_ratio: float = 0.9,
    rules_per_layer_limit: int | None = 2,
    points_per_objective: int = 5,
    take_abs: bool = True,
    same_per_layer: bool = False,
    normalize_by_head: bool = False,
    normalize_by_layer: bool = False,
    validate: Callable[[dict[str, Any]], float] | None = None,
    **knobs: Any,
) -> dict[str, Any]:
    """A recipe that gives every head of every causal layer its span.

    calibrate           calls of the model by their length in tokens, the profile lengths.
    loss                of the model's output, to be differentiated: cross-entropy on its own answers, in the paper.
    densities           the share of tokens that heads keep on average, one for all lengths or one for each.
    same_per_layer      one rule for all heads of a layer.
    normalize_by_head   influence is the share of its head's, or by_layer of its layer's.
    validate            a number per recipe, the least is kept: the loss on held-out data at a greater length. Without
                        it the plan of the least sum of losses, each relative to the worst plan's, is kept.
    knobs               further knobs of moa in the recipe: max_new_tokens, min_span, length, ...
    """
    profiled = {
        n: profile(model, calls, loss, block_size=block_size, take_abs=take_abs) for n, calls in calibrate.items()
    }
    lengths = [*profiled, *extend_lengths]
    paths = list(next(iter(profiled.values())))
    rules = grid(list(profiled), extend_lengths, betas=num_betas, interval=alpha_interval)
    how = {"by_head": normalize_by_head, "by_layer": normalize_by_layer, "together": same_per_layer}
    lost = torch.stack(
        [torch.stack([tables(weighed(p[path], **how), rules, block_size) for path in paths]) for p in profiled.values()]
    )
    plans = choose(
        lost,
        torch.stack([costs(n, rules, block_size) for n in lengths]),
        _bounds(densities, lengths, heads=lost.shape[1] * lost.shape[2]),
        lower_bound_ratio=lower_bound_ratio,
        rules_per_layer_limit=rules_per_layer_limit,
        points=points_per_objective,
    )
    recipes = [recipe(plan, paths, rules, block_size=block_size, **knobs) for plan in plans]
    return min(recipes, key=validate) if validate else recipes[least(plans)]


def _bounds(densities: float | Mapping[int, float], lengths: Sequence[int], *, heads: int) -> list[float]:
    """The tokens that all heads together may keep, at each length."""
    return [(densities[n] if isinstance(densities, Mapping) else densities) * n * heads for n in lengths]


def least(plans: Sequence[Plan]) -> int:
    """The plan of the least sum of losses, each relative to the worst plan's."""
    losses = torch.tensor([plan.losses for plan in plans], dtype=torch.float64)
    worst = losses.amax(0)
    return int((losses / torch.where(worst == 0, 1.0, worst)).sum(1).argmin())
