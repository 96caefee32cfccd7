"""What a family of the zoo is, how tiny seeded ones are built, and the inputs that they run on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .vision_ops import declare_missing_vision_ops

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
BOTH = ("sdpa", "eager")
EAGER = ("eager",)
PLAIN = ("plain",)


@dataclass(frozen=True)
class Family:
    """A family of models: how to build a tiny one (seeded, offline), inputs that it runs on, its attentions."""

    name: str
    build: Callable[
        [str], nn.Module
    ]  # "sdpa": torch's fused op, "eager": written out, "plain": as the module is written
    inputs: Callable[[], Inputs]
    spellings: tuple[str, ...]
    sites: int


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """The same weights at every call, none of them zero or one: a bias that starts at zero must show."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.is_floating_point():
                    weight.add_(torch.randn_like(weight), alpha=0.02)
    return model


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def ids(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 90, (batch, length), generator=generator())


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator())


WIDTH: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
)
GROUPED = WIDTH | {"num_key_value_heads": 2}
GPT2: dict[str, Any] = dict(n_embd=64, n_layer=2, n_head=4, vocab_size=100, n_positions=64)
FALCON: dict[str, Any] = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
IMAGE = {k: v for k, v in WIDTH.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 8}
TEXT = WIDTH | {"max_position_embeddings": 32}


def hf(
    name: str, model: str, config: str, settings: dict[str, Any], inputs: Callable[[], dict[str, Any]], sites: int,
    spellings: tuple[str, ...] = BOTH,
) -> Family:  # fmt: skip
    def build(spelling: str) -> nn.Module:
        declare_missing_vision_ops()
        import transformers

        made = getattr(transformers, config)(**settings)
        made._attn_implementation = spelling
        return seeded(lambda: getattr(transformers, model)(made))

    return Family(name, build, lambda: ((), inputs()), spellings, sites)


def decoder(
    name: str, model: str, settings: dict[str, Any], config: str = "", spellings: tuple[str, ...] = BOTH
) -> Family:
    return hf(name, f"{model}ForCausalLM", config or f"{model}Config", settings, causal_ids, 2, spellings)


def timm(
    name: str, model: str, sites: int, spellings: tuple[str, ...] = BOTH, size: int = 32, **settings: Any
) -> Family:
    def build(spelling: str) -> nn.Module:
        declare_missing_vision_ops()
        import timm
        from timm.layers import set_fused_attn, use_fused_attn

        before = use_fused_attn()
        set_fused_attn(spelling == "sdpa")
        try:
            return seeded(lambda: timm.create_model(model, pretrained=False, num_classes=5, **settings))
        finally:
            set_fused_attn(bool(before))

    return Family(name, build, lambda: ((normal(2, 3, size, size),), {}), spellings, sites)


def causal_ids() -> dict[str, Any]:
    return {"input_ids": ids(), "use_cache": False}


def plain_ids() -> dict[str, Any]:
    return {"input_ids": ids()}


def padded_ids() -> dict[str, Any]:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": ids(), "attention_mask": mask}


def pixels() -> dict[str, Any]:
    return {"pixel_values": normal(2, 3, 32, 32)}


def speech() -> dict[str, Any]:
    convolutions = dict(conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 8), num_conv_pos_embeddings=8)
    return WIDTH | convolutions | {"num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 2}
