"""One small problem that a mechanism is asked about: a site, its tensors, the mechanism's own, all deterministic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .from_seed import from_seed
from .mechanism import Mechanism
from .place import Place, run, stand, stand_alone, started
from .problem import hidden, problem
from .refusal import Refused
from .site import Grid

HEADS, DIM = 6, 8
MADE = ("q", "k", "v", "x", "x_kv", "o", "q_nope", "k_nope", "key_padding", "bias")  # ports that a case can make
PLACED = ("core", "gate", "region", "insert")  # parts whose forward stands at one place
GRIDS = {1: Grid(1, 1), 7: Grid(2, 3, 1), 8: Grid(2, 4), 33: Grid(4, 8, 1)}  # by number of tokens


@dataclass(frozen=True)
class Case:
    mechanism: Mechanism
    pattern: str = "noncausal-self"
    n: int = 7
    m: int = 7
    grid: Grid | None = None
    kv_heads: int = HEADS
    batch: int = 2
    dtype: torch.dtype = torch.float32
    heads: int = HEADS
    dim: int = DIM

    def __str__(self) -> str:
        grid = f" grid={self.grid.h}x{self.grid.w}+{self.grid.prefix}" if self.grid else ""
        groups = f" kv={self.kv_heads}" if self.grouped else ""
        sizes = f"B={self.batch} H={self.heads}{groups} N={self.n} M={self.m} D={self.dim}{grid}"
        return f"{self.mechanism!r} on {self.pattern} {sizes}"

    @property
    def width(self) -> int:
        return self.heads * self.dim

    @property
    def grouped(self) -> bool:
        return self.kv_heads != self.heads

    @property
    def alone(self) -> bool:
        """A region or inserted mechanism sees x only."""
        return self.mechanism.part in ("region", "insert")

    def tensors(self) -> dict[str, Tensor]:
        """Normal tensors for every port that the mechanism may ask for."""
        x = hidden(self.n, width=self.width, batch=self.batch, dtype=self.dtype)
        if self.alone:
            return {"x": x}
        q, k, v = problem(
            self.n, self.m, heads=self.heads, kv_heads=self.kv_heads, dim=self.dim, batch=self.batch, dtype=self.dtype
        )
        x_kv = (
            x if self.pattern.endswith("self") else hidden(self.m, width=self.width, batch=self.batch, dtype=self.dtype)
        )
        made = {"q": q, "k": k, "v": v, "x": x, "x_kv": x_kv, "q_nope": q, "k_nope": k}
        if self.mechanism.part == "gate":
            made["o"] = problem(self.n, heads=self.heads, dim=self.dim, batch=self.batch, dtype=self.dtype, seed=2)[0]
        asked = {"q", "k", "v", *sum(self.mechanism.wanted_ports(), ())}
        return {port: tensor for port, tensor in made.items() if port in asked}

    def place(self, tensors: Mapping[str, Tensor], mask: Tensor | None = None, bias: Tensor | None = None) -> Place:
        causal = self.pattern.startswith("causal")
        if self.alone:
            return stand_alone(tensors["x"], self.heads, causal=causal, grid=self.grid, key_padding=mask)
        rest = {port: tensor for port, tensor in tensors.items() if port not in ("q", "k", "v")}
        q, k, v = (tensors[port] for port in "qkv")
        found = stand(q, k, v, ports=rest, causal=causal, grid=self.grid, mask=mask, bias=bias)
        return replace(found, site=replace(found.site, pattern=self.pattern))

    def own(self) -> dict[str, Tensor]:
        """The mechanism's learned tensors, all normal: none of them at a start that hides what it does."""
        site = self.place(self.tensors()).site
        draw = torch.Generator().manual_seed(3)
        made = started(self.mechanism.buffers(site), torch.empty(0, dtype=self.dtype))
        for name, declared in self.mechanism.params(site).items():
            made[name] = 0.5 * torch.randn(declared.shape, generator=draw, dtype=torch.float64).to(self.dtype)
        return made

    def answer(
        self,
        tensors: Mapping[str, Tensor] | None = None,
        own: Mapping[str, Tensor] | None = None,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        seed: int = 4,
    ) -> Tensor:
        """What the mechanism gives; deterministic also where it draws."""
        tensors = self.tensors() if tensors is None else tensors
        own = self.own() if own is None else own
        with from_seed(seed):
            answer = run(self.mechanism, self.place(tensors, mask, bias), own)[0]
        if not isinstance(answer, Tensor):
            raise Refused(f"forward gives a {type(answer).__name__}", fits="a tensor, or (tensor, Aux(...))")
        return answer

    def refused(self) -> str | None:
        """Why the mechanism does not stand here; None where it does."""
        missing = [port for port in self.mechanism.wanted_ports()[0] if port not in MADE]
        if missing:
            return f"needs the port {', '.join(missing)}"
        return self.mechanism.refuses(self.place(self.tensors()).site)

    def smaller(self) -> Iterator[Case]:
        """The same problem with one size less, the largest steps first; not all of them need be possible."""
        for batch in _less(self.batch):
            yield replace(self, batch=batch)
        if self.grid:
            yield replace(self, grid=None)
            yield from (replace(self, n=n, m=n, grid=GRIDS[n]) for n in GRIDS if n < self.n)
        else:
            beyond = self.m - self.n
            yield from (replace(self, n=n, m=n + beyond) for n in _less(self.n))
            yield from (replace(self, m=self.m - less) for less in (beyond, 1) if 0 < less <= beyond)
        if self.grouped:
            yield replace(self, kv_heads=self.heads)
        else:
            yield from (replace(self, heads=heads, kv_heads=heads) for heads in _less(self.heads))
        yield from (replace(self, heads=2 * self.kv_heads) for _ in range(1) if self.heads > 2 * self.kv_heads)
        yield from (replace(self, heads=2, kv_heads=1) for _ in range(1) if self.grouped and self.heads > 2)
        yield from (replace(self, dim=dim) for dim in _less(self.dim))

    @property
    def stands(self) -> bool:
        return _stands(self)

    def leading(self, port: str) -> int:
        """The axis of tokens of a port."""
        return 1 if port.startswith("x") else 2


def cases(
    mechanism: Mechanism, *, sizes: tuple[int, ...] = (1, 7, 33), only: Callable[[Case], bool] = lambda case: True
) -> Iterator[Case]:
    """The problems on which a mechanism stands, smallest first; whole-model mechanisms stand on none."""
    for n in sizes if mechanism.part in PLACED else ():
        for pattern in ("causal-self", "noncausal-self", "noncausal-cross"):
            for grid in (None, GRIDS.get(n)) if n in GRIDS else (None,):
                for kv_heads in (HEADS, HEADS // 3):
                    m = n + 2 if pattern.endswith("cross") else n
                    case = Case(mechanism, pattern, n, m, grid, kv_heads)
                    if only(case) and not (case.alone and (kv_heads != HEADS or m != n)) and _stands(case):
                        yield case


def _less(size: int) -> tuple[int, ...]:
    """Smaller sizes to try: 1, the half, one less."""
    return tuple(sorted({1, size // 2, size - 1} - {0, size}))


def _stands(case: Case) -> bool:
    try:
        return case.refused() is None
    except Refused:
        return False
