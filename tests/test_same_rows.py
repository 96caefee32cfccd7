"""Queries and keys that are latents of one hidden state are self-attention; what only looks so stays cross."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

import reattend

CONFIG: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, first_k_dense_replace=2, kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=16, head_dim=8, n_group=1, topk_group=1, vocab_size=60, pad_token_id=0,
    eos_token_id=None,
)  # fmt: skip


class Asks(nn.Module):
    """Attention of what two functions of its input give."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mix = nn.Linear(16, 12), nn.Linear(16, 12), nn.Linear(8, 8)
        self.norm, self.q, self.kv = nn.RMSNorm(12), nn.Linear(12, 16), nn.Linear(12, 32)
        self.layer = nn.TransformerEncoderLayer(16, 4, 16, dropout=0.0, batch_first=True)
        self.asked = nn.Parameter(torch.randn(8, 12))

    def attend(self, x: Tensor, y: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = self.kv(y).unflatten(-1, (2, 4, 4)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Latents(Asks):
    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.norm(self.a(x)), self.b(x)[:, None].squeeze(1) * 2.0)


class Encoded(Asks):
    """Keys of the same input, encoded: each is made of all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.a(x), self.b(self.layer(x)))


class Halves(Asks):
    """Half of the tokens asks the other half."""

    def forward(self, x: Tensor) -> Tensor:
        one, other = x.chunk(2, 1)
        return self.attend(self.a(one), self.b(other))


class Flipped(Asks):
    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.a(x), self.b(x.flip(1)))


class Mixed(Asks):
    """A layer along the tokens (MLP-Mixer)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.a(x), self.b(self.mix(x[:, :8].mT).mT))


class Normed(Asks):
    """A norm over all tokens at once."""

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.a(x), self.b(nn.functional.layer_norm(x, x.shape[1:])))


class Later(Asks):
    """Keys of an earlier layer's hidden state."""

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.a(x + self.layer(x)), self.b(x))


class Learned(Asks):
    """Learned queries and learned keys, both moved by the mean of all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.a(x.mean(1, keepdim=True))
        return self.attend(self.asked + mean, self.asked * 2.0 + mean)


class Memory(Asks):
    """Keys are those of a memory that is given, and the input's own (Perceiver's resampler)."""

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.attend(self.a(x), self.b(torch.cat([memory, x], 1)))


def test_latents_of_one_hidden_state_are_the_same_rows() -> None:
    model, x = Latents().eval(), torch.randn(2, 8, 16)
    assert reattend.sites(model, x)[0].pattern == "noncausal-self"
    wanted = {"version": 1, "sites": [{"match": "*", "attention": {"window": {"window": 2}}}]}
    fast = reattend.optimize(model, wanted, x, measure=False)
    far = torch.cat([x[:, :6] + 1.0, x[:, 6:]], 1)
    far[:, :4] = x[:, :4]  # the sinks
    torch.testing.assert_close(fast(far)[:, 7], fast(x)[:, 7], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [Encoded, Halves, Flipped, Mixed, Normed, Later, Learned, Memory])
def test_what_is_made_of_other_rows_is_cross(kind: type[Asks]) -> None:
    x = torch.randn(2, 16 if kind is Halves else 8, 16)
    sites = reattend.sites(kind().eval(), (x, torch.randn(2, 5, 16)) if kind is Memory else x)
    assert sites[-1].pattern == "noncausal-cross"


@torch.no_grad()
@pytest.mark.parametrize("recipe", [{"window": {"window": 3, "sinks": 1}}, {"linear": {}}], ids=str)
@pytest.mark.parametrize("version", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_latent_attention_of_a_decoder_is_self(version: int, recipe: dict[str, Any]) -> None:
    make, config = [(DeepseekV2ForCausalLM, DeepseekV2Config), (DeepseekV3ForCausalLM, DeepseekV3Config)][version - 2]
    model, ids = make(config(**CONFIG)).eval(), torch.randint(1, 60, (2, 9))
    wanted = {"version": 1, "sites": [{"match": "*", "attention": recipe}]}
    fast = reattend.optimize(model, wanted, {"input_ids": ids, "use_cache": False}, measure=False)
    assert {str(row.site.pattern) for row in fast.report.rows} == {"causal-self"}
    asked = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    plain = fast.generate(input_ids=ids, use_cache=False, **asked)
    assert torch.equal(fast.generate(input_ids=ids, **asked), plain)
