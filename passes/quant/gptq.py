"""Rounding that makes up for itself: what a column loses, those still to be rounded take over (GPTQ, arXiv 2210.17323).

H = 2 X^T X / n,   U = chol(H^-1),   e_c = (w_c - w^_c) / U_cc,   w_rest <- w_rest - e_c U_c,rest

Columns in descending order of H's diagonal; scales and zeros are those of the weights as they came.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DAMP, BLOCK = 0.01, 128  # of the mean of H's diagonal; columns whose errors are spread at once

Nearest = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # a column (N,) and its number: codes, and what they stand for


def compensated(w: Tensor, gram: Tensor, nearest: Nearest) -> Tensor:
    """The codes (N, K) of weights whose inputs have this Gram matrix X^T X / n (K, K); those never there count as 0."""
    order = gram.diagonal().argsort(descending=True, stable=True)
    left, H = w.double()[:, order], 2 * gram.double()[order][:, order]
    idle = H.diagonal() == 0
    left[:, idle] = 0
    H.diagonal()[idle] = 1
    H.diagonal().add_(DAMP * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    codes = torch.zeros_like(left)
    for start in range(0, left.shape[1], BLOCK):
        stop = min(start + BLOCK, left.shape[1])
        errors = left.new_zeros(left.shape[0], stop - start)
        for c in range(start, stop):
            codes[:, c], value = nearest(left[:, c], int(order[c]))
            error = errors[:, c - start] = (left[:, c] - value) / U[c, c]
            left[:, c + 1 : stop] -= error[:, None] * U[c, c + 1 : stop]
        left[:, stop:] -= errors @ U[start:stop, stop:]
    return codes[:, order.argsort()].to(torch.uint8)
