"""Further models of the zoo that see or hear: images, detection, sound, series."""

from __future__ import annotations

from typing import Any

import torch

from .zoo_family import EAGER, IMAGE, TEXT, WIDTH, Family, hf, ids, normal, pixels, speech


def images() -> list[Family]:
    return [*_images(), *_pairs(), *_sound()]


def _images() -> list[Family]:
    biased = IMAGE | {"use_relative_position_bias": True}
    stages: dict[str, Any] = dict(
        num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[16, 32], strides=[4, 2], num_attention_heads=[1, 2]
    )
    stages |= dict(mlp_ratios=[2, 2])
    overlapping = stages | dict(image_size=32, sr_ratios=[4, 2], patch_sizes=[7, 3])
    units: dict[str, Any] = dict(image_size=[32, 32], patch_size=[3, 3], patch_stride=[4, 4], patch_padding=[1, 1])
    units |= dict(embed_dim=16, depths=[1, 1], num_heads=[1, 2], masked_unit_size=[2, 2], query_stride=[2, 2])
    units |= dict(masked_unit_attention=[True, False], num_query_pool=1)
    windows: dict[str, Any] = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8, mlp_dim=48
    )
    windows |= dict(output_channels=16, window_size=2, global_attn_indexes=[1])
    decomposed = IMAGE | dict(pretrain_image_size=32, window_size=2, window_block_indices=[0])
    decomposed |= dict(use_relative_position_embeddings=True)
    latents = dict(num_latents=6, d_latents=32, d_model=24, num_blocks=1, num_self_attends_per_block=2)
    latents |= dict(num_self_attention_heads=4, num_cross_attention_heads=2)
    return [
        hf("beit", "BeitModel", "BeitConfig", biased, pixels, 2),
        hf("yolos", "YolosModel", "YolosConfig", IMAGE | {"image_size": [32, 32]}, pixels, 2),
        hf("pvt_v2", "PvtV2Model", "PvtV2Config", overlapping, pixels, 2, EAGER),
        hf("hiera", "HieraModel", "HieraConfig", units, pixels, 2, EAGER),
        hf("dinov3", "DINOv3ViTModel", "DINOv3ViTConfig", IMAGE | {"num_register_tokens": 2}, pixels, 2),
        hf("vitdet", "VitDetModel", "VitDetConfig", decomposed, pixels, 2, EAGER),
        hf("sam_vision", "SamVisionModel", "SamVisionConfig", windows, pixels, 2),
        hf("perceiver", "PerceiverModel", "PerceiverConfig", latents, lambda: {"inputs": normal(2, 9, 24)}, 3, EAGER),
        _detr("detr", "Detr"),
        _detr("conditional_detr", "ConditionalDetr"),
    ]


def _detr(name: str, model: str) -> Family:
    backbone = dict(model_type="resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    settings: dict[str, Any] = dict(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None)
    settings |= dict(backbone_config=backbone, d_model=32, encoder_layers=1, decoder_layers=1, num_queries=5)
    settings |= dict(encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32)
    seen = lambda: pixels() | {"pixel_mask": torch.ones(2, 32, 32)}
    return hf(name, f"{model}Model", f"{model}Config", settings, seen, 3, EAGER)


def _pairs() -> list[Family]:
    pair: dict[str, Any] = dict(text_config=TEXT | {"projection_dim": 32, "eos_token_id": 2}, vision_config=IMAGE)
    pair |= dict(projection_dim=32)
    paired = lambda: pixels() | {"input_ids": ids()}
    return [
        hf("owlvit", "OwlViTModel", "OwlViTConfig", pair, paired, 4),
        hf("blip", "BlipModel", "BlipConfig", pair | {"image_text_hidden_size": 32}, paired, 4, EAGER),
    ]


def _sound() -> list[Family]:
    plain = {k: v for k, v in WIDTH.items() if k != "vocab_size"}
    spectrum = plain | dict(patch_size=4, frequency_stride=4, time_stride=4, max_length=24, num_mel_bins=8)
    conformer = WIDTH | dict(feature_projection_input_dim=16, conv_depthwise_kernel_size=3)
    series = dict(num_input_channels=3, context_length=16, patch_length=4, patch_stride=4, d_model=32)
    series |= dict(num_attention_heads=4, num_hidden_layers=2, ffn_dim=48)
    wave = lambda: {"input_values": normal(2, 800)}
    return [
        hf("hubert", "HubertModel", "HubertConfig", speech(), wave, 2),
        hf("wavlm", "WavLMModel", "WavLMConfig", speech() | {"num_buckets": 16}, wave, 2, EAGER),
        hf("wav2vec2_bert", "Wav2Vec2BertModel", "Wav2Vec2BertConfig", conformer,
           lambda: {"input_features": normal(2, 20, 16)}, 2),
        hf("ast", "ASTModel", "ASTConfig", spectrum, lambda: {"input_values": normal(2, 24, 8)}, 2),
        hf("patchtst", "PatchTSTModel", "PatchTSTConfig", series, lambda: {"past_values": normal(2, 16, 3)}, 2),
    ]  # fmt: skip
