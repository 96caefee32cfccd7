"""A swapped decoder gives with a cache, in parts of any length, what it gives without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

import reattend

CONFIG: dict[str, Any] = dict(
    hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=60,
    num_hidden_layers=2, pad_token_id=0, eos_token_id=None,
)  # fmt: skip
NEAR = {"window": {"window": 3, "sinks": 1}}


def gpt_oss() -> Any:
    more = dict(head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=4, attn_implementation="eager")
    model = GptOssForCausalLM(GptOssConfig(**CONFIG | more))
    for name, weight in model.named_parameters():
        if name.endswith("sinks"):
            nn.init.normal_(weight)
    return model.eval()


def swapped(model: nn.Module, recipe: Any, given: Any) -> Any:
    sites = [{"match": "*", "attention": recipe}]
    return reattend.optimize(model, {"version": 1, "sites": sites}, given, measure=False, max_signatures=16)


def in_parts(fast: Any, ids: Tensor, cuts: tuple[int, ...], **more: Any) -> Tensor:
    cache, rows = DynamicCache(config=fast.config), []
    for start, stop in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        mask = {name: value[:, :stop] for name, value in more.items()}
        rows.append(fast(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, **mask).logits)
    return torch.cat(rows, 1)


@torch.no_grad()
def test_positions_count_from_the_past_beside_a_sink() -> None:
    ids = torch.randint(1, 60, (2, 9))
    fast = swapped(gpt_oss(), NEAR, {"input_ids": ids, "use_cache": False})
    whole = fast(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(in_parts(fast, ids, (2, 3, 4, 7, 8)), whole, rtol=0, atol=1e-5)


STATES: dict[str, Any] = {
    "linear": "linear",
    "l2vit": "l2vit",
    "based": {"based": {"feature_dim": 0}},
    "lightning": {"lightning": {"act": "silu_qk"}},
    "aaren": "aaren",
}
AT_ONCE = [("linear", False), ("l2vit", True)]  # the others capture as many graphs anew


@torch.no_grad()
@pytest.mark.parametrize(
    ("mechanism", "padded"),
    [
        pytest.param(name, padded, marks=[] if (name, padded) in AT_ONCE else pytest.mark.slow)
        for name in STATES
        for padded in (False, True)
    ],
)
def test_a_running_state_is_made_of_the_past(mechanism: str, padded: bool) -> None:
    model, ids = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval(), torch.randint(1, 60, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, : 3 * padded] = 0
    more = {"attention_mask": mask} if padded else {}
    fast = swapped(model, STATES[mechanism], {"input_ids": ids, "use_cache": False} | more)
    for _, tensor in fast.new_parameters():  # aaren's query of 0 would take the mean of all keys
        nn.init.normal_(tensor)
    whole = fast(input_ids=ids, use_cache=False, **more).logits
    found = in_parts(fast, ids, (2, 3, 4, 7, 8), **more)
    real = mask.bool()
    torch.testing.assert_close(found[real], whole[real], rtol=0, atol=1e-5)


class ByToken(nn.Module):
    """Takes a mask for a prompt alone: a token after it sees all that came before."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1)
        return self.out(o.transpose(1, 2).flatten(2)), (k, v)


@torch.no_grad()
@pytest.mark.parametrize("recipe", [NEAR, "linear"])
def test_a_token_that_needs_no_mask_stands_behind_the_past(recipe: Any) -> None:
    model, x = ByToken().eval(), torch.randn(2, 9, 16)
    fast = swapped(model, recipe, (x,))
    whole = fast(x)[0]
    found, past = fast(x[:, :5])
    rows = [found]
    for n in range(5, 9):
        row, past = fast(x[:, n : n + 1], past)
        rows.append(row)
    torch.testing.assert_close(torch.cat(rows, 1), whole, rtol=0, atol=1e-5)


@torch.no_grad()
def test_rows_that_count_from_the_first_key_of_a_past_are_refused() -> None:
    model, x = ByToken().eval(), torch.randn(2, 9, 16)
    fast = swapped(model, NEAR, (x,))
    _, past = fast(x[:, :5])
    with pytest.raises(reattend.Refused, match="a window compares positions"):
        fast(x[:, 5:], past)
