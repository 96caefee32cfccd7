"""The first hour with an idea of one's own: a mechanism in a notebook cell, checked, then put into three places.

python examples/first_hour_mechanism.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import reattend


@reattend.register("alibi_like")
@dataclass(frozen=True)
class AlibiLike(reattend.Mechanism):
    """A key counts less the further away it is, by a slope that falls from head to head (arXiv 2108.12409)."""

    slope: float = 0.5
    kind = "approximate"
    heads_alike = False  # every head has its own slope
    honours = {"padding", "bias", "mask"}

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reattend.attend(q, k, v, score=lambda s, h, i, j: s - self.slope * abs(i - j) / (h + 1), site=site)


def main(*, everything: bool = True) -> None:
    if everything:
        reattend.check(AlibiLike)

    layer = reattend.Attention("alibi_like", 64, heads=4, causal=True, slope=1.0)
    print(layer(torch.randn(2, 10, 64)).shape, "from a layer of one's own")

    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256)
    name = reattend.attn_implementation("alibi_like", slope=0.1)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), attn_implementation=name).eval()
    print(model(torch.arange(8)[None]).logits.shape, f"from a stock model with attn_implementation={name!r}")

    model.set_attn_implementation("sdpa")
    recipe = {"version": 1, "sites": [{"match": {"layer": "1"}, "attention": {"alibi_like": {"slope": 0.1}}}]}
    print(reattend.optimize(model, recipe, (torch.arange(8)[None],)).report)


if __name__ == "__main__":
    main()
