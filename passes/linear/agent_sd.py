"""Agent attention without training, for diffusion: agents are queries merged by similarity (arXiv 2312.08874)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from ...compiler.functional import attention
from ...compiler.mechanism import Limit, Mechanism, register
from ...compiler.on_grid import off_grid
from ...compiler.primitives.attend import attend
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Grid, Site


@register("agent_sd")
@dataclass(frozen=True)
class AgentSD(Mechanism):
    """o = softmax_A(scale^k_scale2 q aᵀ) softmax_M(scale a kᵀ) v + k_shortcut v.

    >>> q, k, v = problem(64)
    >>> attention(q, k, v, "agent_sd", grid=(8, 8), sx=2, sy=2, agent_ratio=0.7).shape
    torch.Size([2, 4, 64, 8])

    The agents are given by the port `agents` (B, H, A, D), or made here: in every cell of sy x sx tokens the first is a
    target, the agent_ratio * N other tokens most similar to a target (cosine of x, else of q) are averaged into it, the
    rest and the targets are the agents. Merging q is merging the hidden state first, W_q being linear.
    Where 2 A < N does not hold, and in cross-attention, plain softmax attention stands.
    """

    k_scale2: float = 0.3
    k_shortcut: float = 0.075
    agent_ratio: float = 0.95
    sx: int = 4
    sy: int = 4

    part = "core"
    kind = "approximate"
    honours = frozenset[str]()
    paper = "arXiv 2312.08874"
    tries = ({}, {"sx": 2, "sy": 2, "agent_ratio": 0.7})

    def __post_init__(self) -> None:
        if not 0 < self.agent_ratio < 1 or self.sx < 1 or self.sy < 1:
            found = f"agent_ratio={self.agent_ratio}, sx={self.sx}, sy={self.sy}"
            raise Refused(found, where="agent_sd", fits="0 < agent_ratio < 1, sx and sy >= 1")

    def fits(self, site: Site) -> str | None:
        if site.causal:
            return f"agent_sd is noncausal, this site is {site.pattern}"
        made_here = site.self_attention and "agents" not in site.ports
        return off_grid(site, "agent_sd", prefix=False) if made_here else None

    def forward(
        self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor, agents: Tensor | None = None, x: Tensor | None = None
    ) -> Tensor:
        if not site.self_attention:
            return attend(q, k, v, site=site)
        a = self._merged(site.grid, q, x) if agents is None else agents
        tokens = site.grid.h * site.grid.w if site.grid else int(site.queries) if site.queries.isdigit() else None
        if tokens is not None and 2 * a.shape[2] >= tokens:
            return attend(q, k, v, site=site)
        collected = attend(a, k, v, scale=site.scale)
        o = attend(q, a, collected, scale=site.scale**self.k_scale2)
        return o + self.k_shortcut * v.repeat_interleave(q.shape[1] // v.shape[1], 1)

    def _merged(self, grid: Grid, q: Tensor, x: Tensor | None) -> Tensor:
        """One token per unmerged source and per target (B, H, A, D); all sizes follow from the grid."""
        sources, targets = _sources_and_targets(grid, min(self.sx, grid.w), min(self.sy, grid.h), q.device)
        merged = min(sources.shape[0], int(grid.h * grid.w * self.agent_ratio))
        metric = normalize(q.transpose(1, 2).flatten(2) if x is None else x, dim=-1)
        best, target = (metric[:, sources] @ metric[:, targets].mT).max(-1)  # (B, sources)
        order = best.sort(dim=-1, descending=True, stable=True).indices
        moved, kept = order[:, :merged], order[:, merged:]
        into = one_hot(target.gather(1, moved), targets.shape[0]).to(q.dtype)  # (B, merged, targets)
        count = 1 + into.sum(1)[:, None, :, None]
        means = (q[:, :, targets] + into.mT[:, None] @ _rows(q[:, :, sources], moved)) / count
        return torch.cat((_rows(q[:, :, sources], kept), means), 2)

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(64)
        plain = AgentSD(1.0, 0.0, 0.01)
        yield Limit("too many agents leave softmax attention", lambda: attention(q, k, v, plain, grid=(8, 8)),
                    lambda: attention(q, k, v, "softmax"))  # fmt: skip
        a = q[:, :, ::8]
        yield Limit("the shortcut is linear in v",
                    lambda: attention(q, k, v, AgentSD(k_shortcut=0.5), ports={"agents": a})
                    - attention(q, k, v, AgentSD(k_shortcut=0.25), ports={"agents": a}), lambda: 0.25 * v)  # fmt: skip


def _rows(t: Tensor, rows: Tensor) -> Tensor:
    """t (B, H, N, D) at rows (B, R), the same in all heads."""
    return t.gather(2, rows[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3]))


def _sources_and_targets(grid: Grid, sx: int, sy: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token numbers of a grid: the first token of every whole cell is a target, all others are sources."""
    rows, columns = grid.h // sy, grid.w // sx
    y = torch.arange(grid.h, device=device)[:, None]
    x = torch.arange(grid.w, device=device)
    target = (y % sy == 0) & (y // sy < rows) & (x % sx == 0) & (x // sx < columns)
    order = target.flatten().to(torch.uint8).sort(stable=True).indices
    return order[: grid.h * grid.w - rows * columns], order[grid.h * grid.w - rows * columns :]
