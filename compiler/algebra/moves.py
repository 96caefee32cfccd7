"""A rewrite at a group: the map of a state dict forward, and the map back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..refusal import Refused
from .groups import Group
from .rewrites import Project, Rewrite, Rotate
from .slots import Slot

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Move:
    """A rewrite at a group; refused where the group does not allow it.

    `forward` and `inverse` give the weights that change, under all of their names; computed in float64, cast back.
    """

    group: Group
    rewrite: Rewrite

    def __post_init__(self) -> None:
        self.group.check(self.rewrite.needs)
        self.rewrite.fits(self.group)

    def forward(self, state: State) -> dict[str, Tensor]:
        if isinstance(self.rewrite, Rotate):
            _absorbed_before(self.group, state)
        work = _Work(state, self.group.where)
        scaled = self.group.scales if self.rewrite.needs == "scale" else ()
        biases = tuple(n.norm.bias for n in self.group.norms)
        for slot in scaled or self.group.writes:
            work.act(slot, self, dual=False)
        for slot in self.group.reads:
            work.act(slot, self, dual=True)
        for slot in self.group.diagonals:
            if self.rewrite.needs == "permute" or slot.weight in biases:
                work.act(slot, self, dual=False)
        return work.changed()

    def inverse(self, state: State) -> dict[str, Tensor]:
        return Move(self.group, self.rewrite.inverse()).forward(state)

    def __str__(self) -> str:
        return f"{self.rewrite} {self.group.kind} of {self.group.where}"


@dataclass(frozen=True, eq=False)
class Absorb:
    """The scales of a stream's norms go into what reads their outputs: y = W (w n + b) = (W w)(n + b / w)."""

    group: Group
    scales: Mapping[str, Tensor]  # of each norm, 1 + w where the model multiplies by that

    @staticmethod
    def of(group: Group, state: State) -> Absorb:
        """The norms that scale by something; one that cannot be absorbed is refused."""
        scales = {}
        for one in group.norms:
            if one.norm.weight:
                scale = state[one.norm.weight].detach().double() + (1.0 - one.norm.neutral)
                if not bool((scale == 1).all()):
                    scales[one.norm.weight] = scale
        return Absorb(group, scales)

    def forward(self, state: State) -> dict[str, Tensor]:
        return self._map(state, back=False)

    def inverse(self, state: State) -> dict[str, Tensor]:
        return self._map(state, back=True)

    def _map(self, state: State, *, back: bool) -> dict[str, Tensor]:
        work = _Work(state, self.group.where)
        others = [work.key(s) for s in self.group.writes]
        for one in self.group.norms:
            norm = one.norm
            if norm.weight not in self.scales:
                continue
            scale = self.scales[norm.weight]
            dead = scale == 0
            shift = state[norm.bias].detach() if norm.bias else torch.zeros(())
            if bool((dead & (shift != 0)).any()) or (back and bool(dead.any())):
                raise Refused(f"{norm.weight} has zeros", where=norm.where, fits="a norm that scales every channel")
            for slot in one.reads:
                if work.key(slot) in others:
                    tied = f"{slot.weight} is tied to a weight that writes to the stream, and {norm.weight} is not one"
                    raise Refused(tied, where=self.group.where, fits=f"untie {slot.weight} first")
                work.scale(slot, 1 / scale if back else scale)
            neutral = torch.full_like(scale, norm.neutral)
            work.write(norm.weight, scale - (1.0 - norm.neutral) if back else neutral)
            if norm.bias:
                work.write(norm.bias, work.read(norm.bias) * (scale if back else torch.where(dead, 1.0, 1 / scale)))
        return work.changed()

    def __str__(self) -> str:
        return f"absorb {len(self.scales)} norms of {self.group.where}"


class _Work:
    """New values of tensors that may have several names: each is changed once for each of its slots."""

    def __init__(self, state: State, where: str) -> None:
        self.state, self.where = state, where
        self.names: dict[Any, list[str]] = {}
        for name, tensor in state.items():
            self.names.setdefault(_identity(tensor), []).append(name)
        self.values: dict[Any, Tensor] = {}
        self.done: dict[Any, bool] = {}

    def key(self, slot: Slot) -> Any:
        return (_identity(self.state[slot.weight]), slot.axis, slot.digits, slot.offset)

    def read(self, name: str) -> Tensor:
        held = self.state[name]
        return self.values.get(_identity(held), held.detach()).double()

    def write(self, name: str, value: Tensor) -> None:
        self.values[_identity(self.state[name])] = value

    def act(self, slot: Slot, move: Move, *, dual: bool) -> None:
        group, key = move.group, self.key(slot)
        if key in self.done:
            if self.done[key] is not dual and not move.rewrite.own_dual:
                tied = f"{slot.weight} both writes and reads it, being tied"
                raise Refused(tied, where=self.where, fits="untie it, or a permutation or rotation")
            return
        self.done[key] = dual
        weight = self.read(slot.weight)
        entries = slot.take(weight)
        unit = 1 if group.kind != "heads" else slot.count // group.size
        x = entries.reshape(group.blocks, slot.count // (group.blocks * group.size * unit), group.size, -1)
        self.write(slot.weight, slot.put(weight, move.rewrite.act(x, dual=dual).reshape(entries.shape)))

    def scale(self, slot: Slot, factors: Tensor) -> None:
        weight = self.read(slot.weight)
        entries = slot.take(weight)
        by = factors.to(entries.device).reshape(-1, *(1 for _ in entries.shape[1:]))
        self.write(slot.weight, slot.put(weight, entries * by))

    def changed(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for key, value in self.values.items():
            like = self.state[self.names[key][0]]
            cast = value.to(like.dtype).contiguous()
            found |= dict.fromkeys(self.names[key], cast)
        return found


def low_rank(group: Group, state: State, rank: int) -> Move:
    """The best approximation of what passes through a block (W_o W_v, q.k) by `rank` channels; exact from its rank on.

    A = readers (rest, D), B = writers (D, rest):  (A B)_r = A P B,  P = C^-1 U_r U_r^T C,  A = Q C,  C B = U S V^T
    """
    if not 1 <= rank <= group.size:
        raise Refused(f"rank {rank}", where=group.where, fits=f"1 to {group.size}")
    A, B = (_stacked(group, slots, state) for slots in (group.reads, group.writes))
    gram = A @ A.mT  # (blocks, D, D)
    values, vectors = torch.linalg.eigh(gram)
    size = values.clamp(min=0).sqrt()
    live = size > size.amax(-1, keepdim=True) * 1e-10
    C = size[..., None] * vectors.mT
    back = vectors * torch.where(live, 1 / torch.where(live, size, 1.0), 0.0)[:, None]
    U = torch.linalg.svd(C @ B, full_matrices=False).U[..., :rank]
    return Move(group, Project(back @ U @ U.mT @ C))


def _stacked(group: Group, slots: Iterable[Slot], state: State) -> Tensor:
    """(blocks, size, everything): all that writes to a block, or reads from it, side by side."""
    parts = []
    for slot in slots:
        entries = slot.take(state[slot.weight].detach().double())
        parts.append(
            entries.reshape(group.blocks, -1, group.size, math.prod(entries.shape[1:])).movedim(1, 2).flatten(2)
        )
    return torch.cat(parts, -1)


def _absorbed_before(group: Group, state: State) -> None:
    for one in group.norms:
        if one.norm.weight and bool((state[one.norm.weight] != one.norm.neutral).any()):
            fits = "Absorb.of(group, state) before it"
            raise Refused(f"{one.norm.weight} scales channels", where=group.where, fits=fits)


def _identity(tensor: Tensor) -> Any:
    """Names of one tensor are told by its memory; asking for `data_ptr()` would part it from what it is shared with."""
    address = torch._C._data_address(tensor)  # type: ignore[attr-defined]
    return (address, tuple(tensor.shape)) if address else id(tensor)
