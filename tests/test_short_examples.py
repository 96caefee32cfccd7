"""A model optimized on fewer tokens than one block has runs on many blocks, with the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import reattend


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return x + self.o(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


SHORT: list[dict[str, Any]] = [
    {"cca": {}}, {"cca": {"pool_func": "mean"}}, {"combiner": {"seg_len": 16}},
    {"combiner": {"seg_len": 16, "variant": "axial_rowmajor"}}, {"landmark": {"block_size": 16}},
    {"moa": {"block_size": 16}}, {"s2": {"block_size": 16}}, {"rat": {}}, {"ls": {"local_window": 16}},
]  # fmt: skip


@pytest.mark.parametrize("attention", SHORT, ids=str)
def test_what_was_one_block_is_many(attention: dict[str, Any]) -> None:
    model, longer = Causal().eval(), torch.randn(2, 40, 32)
    recipe = {"version": 1, "target": "eager", "sites": [{"match": "*", "attention": attention}]}
    short, long = (reattend.optimize(model, recipe, x, measure=False) for x in (torch.randn(2, 11, 32), longer))
    long.load_state_dict(short.state_dict())
    with torch.no_grad():
        assert (short(longer) - long(longer)).abs().max() <= 1e-5
