"""Retrieval heads see every key, streaming heads the first and the latest; gates tell which (arXiv 2410.10819)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...compiler.functional import attention
from ...compiler.live import KEPT
from ...compiler.mechanism import Aux, Limit, Mechanism, Param, register
from ...compiler.primitives.attend import attend
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.starts import constant
from ...compiler.symbols import table

State = Mapping[str, Tensor]
TIE = 1e-6  # noise under which equal gates are told apart


@register("duo")
@dataclass(frozen=True)
class Duo(Mechanism):
    """o_h = a full_h + (1 - a) stream_h, a = clamp(gate, 0, 1) of h's key head; a streaming head sees the first
    sink_size keys and the recent_size latest, its own among them.

    Trained with all else frozen (lr 0.02, no weight decay, gates clamped before every step) against the model's last
    hidden state on passkeys, with the loss `gates`, reg_weight mean |gate|, whose mean over sites is the paper's; then
    classify(gates_of(model), heads) is a recipe. threshold: no mixing, a head is full where its gate reaches it.

    >>> q, k, v = problem(9, kv_heads=2)
    >>> gate = torch.tensor([1.0, 0.0])
    >>> o = attention(q, k, v, "duo", causal=True, sink_size=1, recent_size=2, params={"gate": gate})
    >>> full, stream = (attention(q, k, v, name, causal=True, **knobs)
    ...                 for name, knobs in (("softmax", {}), ("window", {"sinks": 1, "window": 2})))
    >>> bool((o - torch.cat((full[:, :2], stream[:, 2:]), 1)).abs().max() < 1e-6)
    True

    prompt (the paper's word: prefill): with "full", what one call is given is a prompt, which every head sees whole, as
    in the paper's deployment, and only what comes behind it is streamed. A Decoder keeps all keys of the heads that are
    whole, if in part, and of the others the sink_size first and the recent_size latest. whole_cache: a streaming head
    sees all that is kept and the new tokens up to its own, as in the paper's deployment, one or more too many.

    gate (Hkv,) starts at 1: the model itself. While gates train both streams here are the student's own; the reference
    takes the full one from the teacher's pass over the same tokens.
    """

    sink_size: int = 64
    recent_size: int = 256
    reg_weight: float = 0.05
    threshold: float | None = None
    prompt: Literal["streaming", "full"] = "streaming"
    whole_cache: bool = False

    part = "core"
    kind = "approximate"
    honours = KEPT
    paper = "arXiv 2410.10819"
    also = {"prefill": "prompt"}
    tries = ({"sink_size": 1, "recent_size": 3}, {"sink_size": 0, "recent_size": 2})

    def __post_init__(self) -> None:
        if self.sink_size < 0 or self.recent_size < 1:
            found = f"sink_size={self.sink_size}, recent_size={self.recent_size}"
            raise Refused(found, where="duo", fits="sink_size >= 0, recent_size >= 1")

    def fits(self, site: Site) -> str | None:
        return None if site.pattern == "causal-self" else f"duo is causal self-attention, this site is {site.pattern}"

    def params(self, site: Site) -> Mapping[str, Param]:
        return {"gate": Param((site.kv_heads,), constant(1.0))}

    def near(self, i: Any, j: Any) -> Any:
        return (i - j < self.recent_size) | (j < self.sink_size)

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
        if self.prompt == "full":
            return attend(q, k, v, site=site), Aux(losses={"gates": self.reg_weight * p.gate.abs().mean()})
        gate = p.gate.clamp(0, 1).repeat_interleave(q.shape[1] // k.shape[1])
        if self.threshold is not None:
            whole = table(gate >= self.threshold)
            return attend(q, k, v, keep=lambda h, i, j: self.near(i, j) | (whole[h] != 0), site=site)
        full, stream = attend(q, k, v, site=site), attend(q, k, v, keep=self.near, site=site)
        a = gate[:, None, None].to(full.dtype)
        return a * full + (1 - a) * stream, Aux(losses={"gates": self.reg_weight * p.gate.abs().mean()})

    def state(self, site: Any, q: Tensor) -> State:
        return {"seen": torch.zeros((), dtype=torch.long)}

    def prefill(self, site: Any, p: Any, state: State, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, State]:
        return self._carried(site, p, state, q, k, v, whole=self.prompt == "full" or self.whole_cache)

    def step(self, site: Any, p: Any, state: State, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, State]:
        return self._carried(site, p, state, q, k, v, whole=self.whole_cache)

    def _carried(
        self, site: Any, p: Any, state: State, q: Tensor, k: Tensor, v: Tensor, *, whole: bool
    ) -> tuple[Tensor, State]:
        """Key heads that are whole, if in part, keep all keys; the others their sinks and the latest ones."""
        seen, total, group = int(state["seen"]), int(state["seen"]) + q.shape[2], q.shape[1] // k.shape[1]
        gate = p.gate.clamp(0, 1) if self.threshold is None else (p.gate.clamp(0, 1) >= self.threshold).to(q.dtype)
        parts, order, after = [], [], {"seen": torch.tensor(total)}
        for name, heads in (("full", (gate > 0).nonzero()[:, 0]), ("near", (gate == 0).nonzero()[:, 0])):
            own = (heads[:, None] * group + torch.arange(group, device=q.device)).flatten()
            new = {"k": k[:, heads], "v": v[:, heads], "at": torch.arange(seen, total, device=q.device)}
            held = {
                n: torch.cat((state[f"{name}_{n}"], t), -2 if n != "at" else 0) if seen else t for n, t in new.items()
            }
            if len(heads):
                a = gate[heads].repeat_interleave(group)[:, None, None].to(q.dtype)
                every = whole and (name == "near" or not seen)
                parts.append(self._mixed(site.scale, q[:, own], held, a, seen, whole=every))
                order.append(own)
            left = held["at"] >= (0 if name == "full" else total - self.recent_size)
            left = (left | (held["at"] < self.sink_size)).nonzero()[:, 0]
            after |= {f"{name}_{n}": t.index_select(2 if n != "at" else 0, left) for n, t in held.items()}
        return torch.cat(parts, 1).index_select(1, torch.cat(order).argsort()), after

    def _mixed(
        self, scale: float, q: Tensor, held: Mapping[str, Tensor], a: Tensor, seen: int, *, whole: bool
    ) -> Tensor:
        """Rows from `seen` on over keys that stand at held["at"]."""
        at = table(held["at"])

        def causal(i: Any, j: Any) -> Any:
            return at[j] <= i + seen

        full: Tensor = attend(q, held["k"], held["v"], scale=scale, keep=causal)
        if whole or bool((a == 1).all()):
            return full
        near = lambda i, j: causal(i, j) & self.near(i + seen, at[j])
        return a * full + (1 - a) * attend(q, held["k"], held["v"], scale=scale, keep=near)

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(9)
        shut = {"gate": torch.zeros(4)}
        softmax = lambda: attention(q, k, v, "softmax", causal=True)
        yield Limit("gates of 1 are full attention", lambda: attention(q, k, v, Duo(1, 2), causal=True), softmax)
        yield Limit("gates of 0 are a window with sinks",
                    lambda: attention(q, k, v, Duo(1, 2), causal=True, params=shut),
                    lambda: attention(q, k, v, "window", causal=True, window=2, sinks=1))  # fmt: skip
        yield Limit("sinks and latest keys that are all keys",
                    lambda: attention(q, k, v, Duo(4, 5), causal=True, params=shut), softmax)  # fmt: skip


def gates_of(model: nn.Module) -> dict[str, Tensor]:
    """The gates that a rewritten model has learned, by the path of their site."""
    end = ".reattend.duo.gate"
    return {name.removesuffix(end): gate for name, gate in model.named_parameters() if name.endswith(end)}


def classify(
    gates: Mapping[str, Tensor],
    heads: int,
    *,
    sparsity: float = 0.5,
    threshold: float | None = None,
    sink_size: int = 64,
    recent_size: int = 256,
    seed: int = 0,
    reorder: bool = False,
) -> dict[str, Any]:
    """A recipe in which the streaming heads of every site are windows with sinks, and the others stay.

    gates      by the site's path: (Hkv,) each
    heads      query heads at a site; a key head's query heads go together
    sparsity   the share of all key heads that stream: those below this quantile of all gates, ties told apart by noise
    threshold  instead of sparsity: a head is full where its gate reaches it
    reorder    full heads first, by an exact rewrite of the weights (head_order): each part is one run of heads

    >>> (site,) = classify({"layers.0.attn": torch.tensor([0.9, 0.1])}, 4, sink_size=4, recent_size=64)["sites"]
    >>> site["attention"]
    {'split': {'2,3': {'window': {'window': 64, 'sinks': 4}}, 'rest': 'keep'}}
    """
    _check_gates(gates, heads)
    told_apart = _told_apart(gates, seed)
    least = threshold if threshold is not None else _quantile(torch.cat(list(told_apart.values())), sparsity)
    stream = {"window": {"window": recent_size, "sinks": sink_size}}
    sites, orders = [], []
    for path, gate in told_apart.items():
        order = _full_first(gate, least) if reorder else list(range(len(gate)))
        orders += [[path, order]] if order != sorted(order) else []
        far = _heads_below(gate[order], least, heads)
        wish: Any = stream if len(far) == heads else {"split": {",".join(map(str, far)): stream, "rest": "keep"}}
        sites.append({"match": path, "attention": wish if far else "keep"})
    recipe = {"version": 1, "sites": sites}
    return recipe | ({"passes": [{"head_order": {"orders": orders}}]} if orders else {})


def _check_gates(gates: Mapping[str, Tensor], heads: int) -> None:
    if not gates or any(g.ndim != 1 or heads % len(g) for g in gates.values()):
        shapes = {path: tuple(g.shape) for path, g in gates.items()}
        fits = "one gate per key head, for every site"
        raise Refused(f"gates {shapes} of {heads} heads", where="classify", fits=fits)


def _told_apart(gates: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The gates within 0..1 in float64, with so little noise that only ties are decided by it."""
    draw = torch.Generator().manual_seed(seed)
    return {
        path: g.detach().double().cpu().clamp(0, 1) + TIE * torch.rand(len(g), generator=draw, dtype=torch.float64)
        for path, g in gates.items()
    }


def _full_first(gate: Tensor, least: float) -> list[int]:
    """Key heads whose gate reaches `least`, then the others, each in their order."""
    return sorted(range(len(gate)), key=lambda g: bool(gate[g] < least))


def _heads_below(gate: Tensor, least: float, heads: int) -> list[int]:
    """The query heads of the key heads that stream."""
    return [head for head in range(heads) if gate[head // (heads // len(gate))] < least]


def _quantile(gates: Tensor, sparsity: float) -> float:
    if sparsity <= 0:
        return -1.0
    return float("inf") if sparsity >= 1 else float(torch.quantile(gates, sparsity))
