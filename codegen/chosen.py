"""`chosen` as one product for each matrix: rows sorted by what they chose stand together, and so are its rows.

How many rows a matrix has is read from the numbers, which a traced or captured graph cannot do: there the meaning runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..compiler.primitives.chosen import chosen_op, is_choice
from ..compiler.primitives.operator import Groups, Kernel

NAME = "rows sorted by choice"
_FEW = 16


@dataclass(frozen=True)
class Sorted:
    """Choices in the order of the matrices: where each one came from, and the part that each matrix has."""

    order: Tensor  # (R * K,) numbers of choices, those of no matrix last
    parts: tuple[tuple[int, int, int], ...]  # matrix, first, end
    per_row: int

    @staticmethod
    def of(which: Tensor, w: Tensor) -> Sorted:
        flat = torch.where(is_choice(which, w), which, w.shape[0]).flatten()
        many = torch.bincount(flat, minlength=w.shape[0] + 1).tolist()
        parts, first = [], 0
        for matrix, count in enumerate(many[:-1]):
            if count:
                parts.append((matrix, first, first + count))
            first += count
        return Sorted(flat.argsort(stable=True), tuple(parts), which.shape[1])

    @property
    def end(self) -> int:
        return self.parts[-1][2] if self.parts else 0

    def rows(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each matrix that was chosen and the rows of x that chose it."""
        numbers = self.order // self.per_row
        for matrix, first, end in self.parts:
            yield matrix, x.index_select(0, numbers[first:end])

    def back(self, products: Tensor) -> Tensor:
        """Products in sorted order (R * K, A), put where the choices stood: (R, K, A)."""
        found = products.new_empty(products.shape).index_copy_(0, self.order, products)
        return found.unflatten(0, (-1, self.per_row))

    def empty(self, width: int, like: Tensor) -> Tensor:
        products = like.new_empty(self.order.shape[0], width)
        products[self.end :] = 0
        return products


def refuses(groups: Groups, text: str) -> str | None:
    (x,), (which,), (w,) = groups
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is captured"
    return None if which.numel() and w.numel() else "nothing to multiply"


def run(groups: Groups, text: str) -> list[Tensor]:
    (x,), (which,), (w,) = groups
    by = Sorted.of(which, w)
    products = by.empty(w.shape[2], x)
    for (matrix, rows), (_, first, end) in zip(by.rows(x), by.parts, strict=True):
        if end - first < _FEW:  # a product of few rows is summed in another order: who else chose would be seen
            products[first:end] = torch.mm(pad(rows, (0, 0, 0, _FEW - (end - first))), w[matrix])[: end - first]
        else:
            torch.mm(rows, w[matrix], out=products[first:end])
    return [by.back(products)]


def gradients(
    groups: Groups, text: str, results: Sequence[Tensor], given: Mapping[int, Tensor], wanted: Sequence[int]
) -> list[Tensor | None]:
    """dx[r] = sum_s dy[r, s] w^T, dw[e] = x^T dy over the rows that chose e."""
    (x,), (which,), (w,) = groups
    by = Sorted.of(which, w)
    of_x, of_w = by.empty(w.shape[1], x) if 0 in wanted else None, torch.zeros_like(w) if 2 in wanted else None
    dy = given[0].flatten(0, 1).index_select(0, by.order)
    for (matrix, rows), (_, first, end) in zip(by.rows(x), by.parts, strict=True):
        if of_x is not None:
            torch.mm(dy[first:end], w[matrix].T, out=of_x[first:end])
        if of_w is not None:
            torch.mm(rows.T, dy[first:end], out=of_w[matrix])
    wide = torch.promote_types(x.dtype, torch.float32)
    found = {0: None if of_x is None else by.back(of_x).sum(1, dtype=wide).to(x.dtype), 2: of_w}
    return [found[k] for k in wanted]


for _device in ("cpu", "cuda"):
    chosen_op.kernels.setdefault(_device, []).append(Kernel(NAME, refuses, run, gradients=gradients))
