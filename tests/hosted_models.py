"""What the tests of hosting share: a tiny llama, a plain net, a host that rewrites nothing, weights compared."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from reattend.compiler.capture import Captured, capture
from reattend.compiler.signature import Call

CONFIG = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 60,
    "num_hidden_layers": 1,
}


def identity(model: nn.Module, call: Call) -> Captured:
    return capture(model, call.args, call.kwargs)


def llama() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**CONFIG, num_key_value_heads=2, use_cache=False, pad_token_id=0)).eval()


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(1, 60, (batch, length))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.drop(self.norm(self.first(x))) * scale


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(
        now[n].dtype is t.dtype and torch.equal(now[n], t) for n, t in before.items()
    )
