"""What may be done to a group, as values: permute, scale, turn pairs, rotate, mix; average and low rank where it fits.

x' = T x where a space is written, and T^-T on what reads it, so that every product y = W x stays what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..refusal import Refused
from .groups import Group


class Rewrite:
    """A T for every block of a group. Entries come as (blocks, repeats, size, width * everything else), in float64."""

    needs: ClassVar[str] = ""  # the action that a group must allow
    own_dual: ClassVar[bool] = False  # T^-T = T: a weight that both writes and reads the space can take it
    exact: ClassVar[bool] = True

    def fits(self, group: Group) -> None:
        """Refuses a group of other sizes, or one whose structure the values would break."""

    def act(self, x: Tensor, *, dual: bool) -> Tensor:
        raise Refused(f"{type(self).__name__} does not say how", fits="define it")

    def inverse(self) -> Rewrite:
        raise Refused(f"{self} has no inverse", fits="the weights as they were")


@dataclass(frozen=True)
class Permute(Rewrite):
    """Unit c of the result is unit order[c]; one order for all blocks, or one for each."""

    orders: tuple[tuple[int, ...], ...]
    needs = "permute"
    own_dual = True

    @staticmethod
    def of(*orders: Sequence[int]) -> Permute:
        return Permute(tuple(tuple(int(c) for c in order) for order in orders))

    def fits(self, group: Group) -> None:
        _blocks(self, len(self.orders), group)
        if any(sorted(order) != list(range(group.size)) for order in self.orders):
            raise Refused("not an order of its units", where=group.where, fits=f"each of 0..{group.size - 1} once")

    def act(self, x: Tensor, *, dual: bool) -> Tensor:
        order = torch.tensor(self.orders, device=x.device).expand(x.shape[0], -1)
        return x.gather(2, order[:, None, :, None].expand_as(x))

    def inverse(self) -> Permute:
        return Permute.of(*(torch.tensor(order).argsort().tolist() for order in self.orders))

    def __str__(self) -> str:
        return "permute"


@dataclass(frozen=True, eq=False)
class Scale(Rewrite):
    """x' = factors x, (size,) or (blocks, size), none of them zero."""

    factors: Tensor
    needs = "scale"

    def fits(self, group: Group) -> None:
        factors = self.factors.reshape(-1, self.factors.shape[-1])
        _blocks(self, factors.shape[0], group)
        if factors.shape[1] != group.size or not bool((factors.isfinite() & (factors != 0)).all()):
            raise Refused(
                f"factors {tuple(factors.shape)}", where=group.where, fits=f"{group.size} finite ones, no zeros"
            )
        if group.partners and not torch.equal(factors, factors[:, list(group.partners)]):
            fits = "one factor for both channels that RoPE turns together"
            raise Refused("factors that differ within a pair", where=group.where, fits=fits)

    def act(self, x: Tensor, *, dual: bool) -> Tensor:
        f = self.factors.to(x).reshape(-1, 1, self.factors.shape[-1], 1)
        return x / f if dual else x * f

    def inverse(self) -> Scale:
        return Scale(1 / self.factors.double())

    def __str__(self) -> str:
        return "scale"


@dataclass(frozen=True, eq=False)
class Turn(Rewrite):
    """Pairs of channels that RoPE turns together, turned by an angle of their own: angles (size,) or (blocks, size)."""

    angles: Tensor
    partners: tuple[int, ...]
    needs = "scale"
    own_dual = True

    def fits(self, group: Group) -> None:
        angles = self.angles.reshape(-1, self.angles.shape[-1])
        _blocks(self, angles.shape[0], group)
        if group.partners != self.partners or not torch.equal(angles, angles[:, list(self.partners)]):
            raise Refused("angles of other pairs", where=group.where, fits="one angle for both channels of a RoPE pair")

    def act(self, x: Tensor, *, dual: bool) -> Tensor:
        angle = self.angles.to(x).reshape(-1, 1, len(self.partners), 1)
        sign = torch.tensor([-1.0 if c < p else 1.0 for c, p in enumerate(self.partners)]).to(x)[:, None]
        return angle.cos() * x + sign * angle.sin() * x[:, :, list(self.partners)]

    def inverse(self) -> Turn:
        return Turn(-self.angles, self.partners)

    def __str__(self) -> str:
        return "turn"


@dataclass(frozen=True, eq=False)
class Rotate(Rewrite):
    """x' = R x, R R^T = 1, (size, size) for all blocks. The norms of a residual stream must be absorbed before."""

    matrix: Tensor
    needs = "rotate"
    own_dual = True

    def fits(self, group: Group) -> None:
        R = self.matrix.double()
        if R.shape != (group.size, group.size) or float((R @ R.T - torch.eye(len(R)).to(R)).abs().max()) > 1e-8:
            raise Refused(f"a matrix {tuple(R.shape)}", where=group.where, fits=f"an orthogonal one of {group.size}")
        if group.keeps_mean and float((R.sum(1) - 1).abs().max()) > 1e-8:
            fits = "a rotation that leaves the vector of ones: rotation(size, keeps_mean=True)"
            raise Refused(
                "LayerNorm takes the mean over channels away, and this moves it", where=group.where, fits=fits
            )

    def act(self, x: Tensor, *, dual: bool) -> Tensor:
        return self.matrix.to(x) @ x

    def inverse(self) -> Rotate:
        return Rotate(self.matrix.T)

    def __str__(self) -> str:
        return "rotate"


@dataclass(frozen=True, eq=False)
class Mix(Rewrite):
    """x' = T x for any T that can be inverted, (size, size) or (blocks, size, size)."""

    matrix: Tensor
    needs = "mix"

    def fits(self, group: Group) -> None:
        T = self.matrix.double().reshape(-1, *self.matrix.shape[-2:])
        _blocks(self, T.shape[0], group)
        if T.shape[1:] != (group.size, group.size) or not bool((torch.linalg.cond(T) < 1e12).all()):
            raise Refused(
                "a matrix that cannot be inverted", where=group.where, fits=f"full rank, {group.size} x {group.size}"
            )

    def act(self, x: Tensor, *, dual: bool) -> Tensor:
        T = self.matrix.to(x).reshape(-1, 1, *self.matrix.shape[-2:])
        return torch.linalg.inv(T).mT @ x if dual else T @ x

    def inverse(self) -> Mix:
        return Mix(torch.linalg.inv(self.matrix.double()))

    def __str__(self) -> str:
        return "mix"


@dataclass(frozen=True)
class Average(Rewrite):
    """Each `size / into` consecutive units of what is written become their mean: exact only where they are equal."""

    into: int
    needs = "permute"
    exact = False

    def fits(self, group: Group) -> None:
        if self.into < 1 or group.size % self.into:
            raise Refused(f"{group.size} into {self.into}", where=group.where, fits=f"a divisor of {group.size}")

    def act(self, x: Tensor, *, dual: bool) -> Tensor:
        if dual:
            return x
        parts = x.unflatten(2, (self.into, -1))
        return parts.mean(3, keepdim=True).expand_as(parts).flatten(2, 3)


@dataclass(frozen=True, eq=False)
class Project(Rewrite):
    """x' = P x where it is written, P P = P; readers stay. Exact where nothing that is read is lost."""

    matrix: Tensor
    needs = "mix"
    exact = False

    def act(self, x: Tensor, *, dual: bool) -> Tensor:
        return x if dual else self.matrix.to(x).reshape(-1, 1, *self.matrix.shape[-2:]) @ x


def _blocks(rewrite: Rewrite, given: int, group: Group) -> None:
    if given not in (1, group.blocks):
        raise Refused(f"{given} blocks for {rewrite}", where=group.where, fits=f"1 or {group.blocks}")
