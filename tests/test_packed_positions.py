"""Positions that start anew pack several documents into one row: each is attended as if it stood alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_swapped_cache import CONFIG, NEAR, swapped
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import reattend

POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7, 8]])


def model(window: int | None = None) -> Any:
    if window is None:
        return LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    return MistralForCausalLM(MistralConfig(**CONFIG, sliding_window=window)).eval()


@pytest.mark.parametrize("window", [None, 3])
def test_positions_within_a_document_count_like_indices(window: int | None) -> None:
    given = {"input_ids": torch.randint(1, 60, (2, 9)), "position_ids": POSITIONS, "use_cache": False}
    found = reattend.explain(model(window), given)
    for site, spec in zip(found.sites, found.specs, strict=True):
        assert site.pattern == "causal-self" and site.window == window and "mask" not in site.features
        assert "documents" in site.ports and "t1" not in spec


@torch.no_grad()
@pytest.mark.parametrize("mechanism", ["softmax", "linear", NEAR])
def test_documents_of_a_row_are_apart(mechanism: Any) -> None:
    original, ids = model(), torch.randint(1, 60, (2, 9))
    fast = swapped(original, mechanism, {"input_ids": ids, "position_ids": POSITIONS, "use_cache": False})
    packed = fast(input_ids=ids, position_ids=POSITIONS, use_cache=False).logits
    alone = [fast(input_ids=part, position_ids=torch.arange(part.shape[1])[None], use_cache=False).logits[0]
             for part in (ids[:1, :4], ids[:1, 4:], ids[1:])]  # fmt: skip
    if mechanism is not NEAR:  # a window's sinks are the row's first keys
        torch.testing.assert_close(packed[0], torch.cat(alone[:2]), rtol=0, atol=1e-5)
    torch.testing.assert_close(packed[1], alone[2], rtol=0, atol=1e-5)


@torch.no_grad()
def test_generate_without_a_cache_gives_the_same_tokens() -> None:
    ids = torch.randint(1, 60, (2, 5))
    fast = swapped(model(), "linear", {"input_ids": ids, "use_cache": False})
    more = dict(max_new_tokens=6, do_sample=False)
    assert torch.equal(fast.generate(ids, **more), fast.generate(ids, use_cache=False, **more))


class Axes(nn.Module):
    """Text's own positions are the first row of four (Qwen2-VL)."""

    def __init__(self, row: int) -> None:
        super().__init__()
        self.qkv, self.row = nn.Linear(16, 48), row

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        text, own = positions[0], positions[self.row]
        documents = (torch.diff(text, prepend=text[:, :1] - 1, dim=-1) != 1).cumsum(-1)
        keep = (documents[:, :, None] == documents[:, None]) & (own[:, None] <= own[:, :, None])
        o = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None])
        return o.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(("row", "pattern"), [(0, "causal-self"), (1, "noncausal-self")])
def test_a_row_of_positions_counts_like_indices(row: int, pattern: str) -> None:
    original, given = Axes(row).eval(), (torch.randn(2, 9, 16), torch.stack([POSITIONS, POSITIONS.flip(1)]))
    fast = reattend.optimize(original, "exact", given, measure=False)
    assert [r.site.pattern for r in fast.report.rows] == [pattern]
    torch.testing.assert_close(fast(*given), original(*given), rtol=0, atol=1e-5)
