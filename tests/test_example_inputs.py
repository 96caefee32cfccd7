"""Inputs are made up where the signature and config say enough, and asked for where they do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from torch import nn

from reattend.compiler.example_inputs import example_inputs
from reattend.compiler.refusal import Refused

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 60,
    "num_hidden_layers": 1,
}
IMAGE: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "image_size": 16,
    "patch_size": 8,
}
SPEECH: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "vocab_size": 60,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
CASES: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)), {"input_ids"}),
    "bert": (lambda: hf.BertModel(hf.BertConfig(**TEXT)), {"input_ids"}),
    "t5": (
        lambda: hf.T5Model(hf.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=60)),
        {"input_ids", "decoder_input_ids"},
    ),
    "vit": (lambda: hf.ViTModel(hf.ViTConfig(**IMAGE)), {"pixel_values"}),
    "clip": (
        lambda: hf.CLIPModel(
            hf.CLIPConfig(text_config=TEXT | {"bos_token_id": 1, "eos_token_id": 2}, vision_config=IMAGE)
        ),
        {"input_ids", "pixel_values"},
    ),
    "llava": (
        lambda: hf.LlavaForConditionalGeneration(
            hf.LlavaConfig(
                text_config=TEXT | {"model_type": "llama"},
                vision_config=IMAGE | {"model_type": "clip_vision_model"},
                image_token_id=59,
                image_seq_length=4,
            )
        ),
        {"input_ids", "pixel_values"},
    ),
    "whisper": (
        lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**SPEECH)),
        {"input_features", "decoder_input_ids"},
    ),
    "wav2vec2": (
        lambda: hf.Wav2Vec2Model(
            hf.Wav2Vec2Config(
                **TEXT,
                conv_dim=(16, 16),
                conv_stride=(5, 2),
                conv_kernel=(10, 3),
                num_feat_extract_layers=2,
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
            )
        ),
        {"input_values"},
    ),
    "timm vit": (lambda: timm.create_model("vit_tiny_patch16_224", depth=1), {"x"}),
}


@pytest.mark.parametrize(("make", "names"), CASES.values(), ids=CASES)
def test_a_known_family_runs_on_made_up_inputs(make: Callable[[], nn.Module], names: set[str]) -> None:
    model = make().eval()
    state = torch.get_rng_state()
    args, kwargs = example_inputs(model)
    assert args == () and set(kwargs) == names
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        model(**kwargs)
    again = example_inputs(model)[1]
    assert all(torch.equal(kwargs[n], again[n]) for n in names)


def test_a_plain_module_is_not_guessed() -> None:
    layer = nn.TransformerEncoderLayer(16, 4)
    with pytest.raises(Refused, match=r"nothing in its signature or config.*forward\(src"):
        example_inputs(layer)


def test_a_guess_that_does_not_run_is_said() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = hf.BertConfig(**TEXT)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("never")

    with pytest.raises(Refused, match=r"tried input_ids \(2, 12\) \(RuntimeError\)"):
        example_inputs(Odd())
