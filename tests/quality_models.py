"""Models for the tests of quality: a llama over bytes and a vision transformer, both tiny and random."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf


def byte_llama() -> Any:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=144, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def vit(classes: int = 24) -> Any:
    torch.manual_seed(0)
    config = hf.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=16,
        id2label={n: str(n) for n in range(classes)}, label2id={str(n): n for n in range(classes)},
    )  # fmt: skip
    return hf.ViTForImageClassification(config).eval()
