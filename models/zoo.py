"""Small random models of every family, in every spelling of attention that the family has: one table of values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import zoo_plain
from .vision_ops import declare_missing_vision_ops
from .zoo_family import (
    BOTH,
    EAGER,
    FALCON,
    GPT2,
    GROUPED,
    IMAGE,
    PLAIN,
    TEXT,
    WIDTH,
    Family,
    Inputs,
    causal_ids,
    decoder,
    hf,
    ids,
    normal,
    padded_ids,
    pixels,
    plain_ids,
    seeded,
    speech,
    timm,
)
from .zoo_images import images
from .zoo_language import language


def zoo() -> dict[str, Family]:
    """Every family by name. Nothing is imported or built before `build` is called."""
    families = [*_decoders(), *_encoders(), *_two_sided(), *_images(), *_timm_models(), *_torch_models(), *_diffusers()]
    families += [*language(), *images()]
    return {family.name: family for family in families}


# --- transformers -----------------------------------------------------------------------------------------------------


def _decoders() -> list[Family]:
    moe = GROUPED | {"num_experts_per_tok": 2, "head_dim": 16}
    return [
        decoder("llama", "Llama", GROUPED),
        decoder("qwen2", "Qwen2", GROUPED),
        decoder("qwen3", "Qwen3", GROUPED | {"head_dim": 16}),
        decoder("mistral", "Mistral", GROUPED | {"sliding_window": 4}),
        decoder("gemma2", "Gemma2", GROUPED | {"head_dim": 16, "sliding_window": 4}, spellings=EAGER),
        decoder("gemma3", "Gemma3", GROUPED | {"head_dim": 16, "sliding_window": 4}, "Gemma3TextConfig"),
        hf("gpt2", "GPT2LMHeadModel", "GPT2Config", GPT2, causal_ids, 2),
        decoder("gpt_neox", "GPTNeoX", WIDTH),
        decoder("phi", "Phi", WIDTH),
        decoder("phi3", "Phi3", GROUPED | {"pad_token_id": 0}),
        decoder("opt", "OPT", FALCON | {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 32}),
        decoder("bloom", "Bloom", dict(hidden_size=64, n_layer=2, n_head=4, vocab_size=100), spellings=EAGER),
        decoder("falcon", "Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
        decoder("falcon_7b", "Falcon", FALCON),
        decoder("falcon_alibi", "Falcon", FALCON | {"alibi": True}),
        decoder("mixtral", "Mixtral", GROUPED | {"num_local_experts": 4}),
        decoder("qwen3_moe", "Qwen3Moe", moe | {"num_experts": 4, "moe_intermediate_size": 32}),
        decoder("gpt_oss", "GptOss", moe | {"num_local_experts": 4, "sliding_window": 4}, spellings=EAGER),
        decoder("olmo2", "Olmo2", GROUPED),
    ]


def _encoders() -> list[Family]:
    deberta = TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    distil = dict(dim=64, hidden_dim=96, n_layers=2, n_heads=4, vocab_size=100)
    modern = WIDTH | {"pad_token_id": 0, "local_attention": 4, "global_attn_every_n_layers": 2}
    return [
        hf("bert", "BertModel", "BertConfig", TEXT, plain_ids, 2),
        hf("bert_padded", "BertModel", "BertConfig", TEXT, padded_ids, 2),
        hf("albert", "AlbertModel", "AlbertConfig", TEXT | {"embedding_size": 32}, plain_ids, 2),
        hf("roberta", "RobertaModel", "RobertaConfig", TEXT, plain_ids, 2),
        hf("distilbert", "DistilBertModel", "DistilBertConfig", distil, plain_ids, 2),
        hf("deberta_v2", "DebertaV2Model", "DebertaV2Config", deberta, padded_ids, 2, EAGER),
        hf("modernbert", "ModernBertModel", "ModernBertConfig", modern, padded_ids, 2),
        hf("wav2vec2", "Wav2Vec2Model", "Wav2Vec2Config", speech(), lambda: {"input_values": normal(2, 800)}, 2),
    ]


def _two_sided() -> list[Family]:
    layers = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
    feed: dict[str, Any] = dict(d_model=64, encoder_ffn_dim=96, decoder_ffn_dim=96, vocab_size=100, **layers)
    sound = feed | dict(num_mel_bins=8, max_source_positions=16, max_target_positions=16, pad_token_id=0)
    sound |= dict(bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None)
    text = dict(d_model=64, d_ff=96, num_layers=2, num_heads=4, d_kv=16, vocab_size=100)

    def both() -> dict[str, Any]:
        return {"input_ids": ids(), "decoder_input_ids": ids(2, 5), "use_cache": False}

    def heard() -> dict[str, Any]:
        return {"input_features": normal(2, 8, 32), "decoder_input_ids": ids(2, 5), "use_cache": False}

    return [
        hf("t5", "T5Model", "T5Config", text, both, 6),
        hf("bart", "BartModel", "BartConfig", feed | {"max_position_embeddings": 32}, both, 6),
        hf("whisper", "WhisperModel", "WhisperConfig", sound, heard, 6),
    ]


def _images() -> list[Family]:
    stages = dict(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    reduced = dict(num_encoder_blocks=2, depths=[1, 1], sr_ratios=[4, 2], hidden_sizes=[16, 32], patch_sizes=[7, 3])
    reduced |= dict(strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2])
    pair = dict(text_config=TEXT | {"projection_dim": 32, "eos_token_id": 2}, vision_config=IMAGE)

    def paired() -> dict[str, Any]:
        return pixels() | {"input_ids": ids()}

    return [
        hf("vit", "ViTModel", "ViTConfig", IMAGE, pixels, 2),
        hf("deit", "DeiTModel", "DeiTConfig", IMAGE, pixels, 2),
        hf("dinov2", "Dinov2Model", "Dinov2Config", IMAGE, pixels, 2),
        hf("swin", "SwinModel", "SwinConfig", stages, pixels, 4),
        hf("swinv2", "Swinv2Model", "Swinv2Config", stages, pixels, 4, EAGER),
        hf("segformer", "SegformerModel", "SegformerConfig", reduced, pixels, 2),
        hf("clip", "CLIPModel", "CLIPConfig", pair | {"projection_dim": 32}, paired, 4),
        hf("siglip", "SiglipModel", "SiglipConfig", pair, paired, 5),
        _llava(),
    ]


def _llava() -> Family:
    def build(spelling: str) -> nn.Module:
        declare_missing_vision_ops()
        import transformers

        vision = transformers.CLIPVisionConfig(**IMAGE | {"num_hidden_layers": 3})
        config = transformers.LlavaConfig(
            vision_config=vision, text_config=transformers.LlamaConfig(**GROUPED), image_token_index=99
        )
        config._attn_implementation = spelling
        return seeded(lambda: transformers.LlavaForConditionalGeneration(config))

    def inputs() -> Inputs:
        tokens = torch.cat([torch.full((2, 16), 99), ids()], 1)  # 32 / 8 = 4 x 4 patches
        return (), {"input_ids": tokens, "use_cache": False} | pixels()

    return Family("llava", build, inputs, BOTH, 4)  # two of the vision tower's three layers, and two of text


# --- timm -------------------------------------------------------------------------------------------------------------


def _timm_models() -> list[Family]:
    plain: dict[str, Any] = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)
    windows: dict[str, Any] = dict(
        img_size=32, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4
    )
    return [
        timm("timm_vit", "vit_tiny_patch16_224", 2, **plain),
        timm("timm_deit3", "deit3_small_patch16_224", 2, **plain),
        timm("timm_eva", "eva02_tiny_patch14_224", 2, **plain),
        timm("timm_swin", "swin_tiny_patch4_window7_224", 4, **windows),
        timm("timm_swinv2", "swinv2_tiny_window8_256", 4, EAGER, **windows),
        timm("timm_maxvit", "maxvit_rmlp_pico_rw_256", 4, size=64, img_size=64, depths=(1, 1), embed_dim=(32, 64)),
        timm("timm_coatnet", "coatnet_rmlp_nano_rw_224", 2, size=64, img_size=64, depths=(1, 1, 1, 1),
              embed_dim=(32, 32, 32, 64)),
        timm("timm_mvitv2", "mvitv2_tiny", 10, EAGER, img_size=32),
        timm("timm_levit", "levit_128s", 3, EAGER, size=64, img_size=64, embed_dim=(32, 48), num_heads=(2, 3),
              depth=(1, 1)),
        timm("timm_convnext", "convnext_atto", 0, PLAIN),
        timm("timm_efficientvit", "efficientvit_b0", 0, PLAIN),
    ]  # fmt: skip


# --- torch.nn and modules by hand -------------------------------------------------------------------------------------


def _torch_models() -> list[Family]:
    def one(name: str, make: Callable[[str], nn.Module], sites: int, spellings: tuple[str, ...] = PLAIN) -> Family:
        return Family(name, lambda s: seeded(lambda: make(s)), lambda: ((normal(2, 9, 32),), {}), spellings, sites)

    def layer() -> nn.TransformerEncoderLayer:
        return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

    def pair() -> Inputs:
        return (normal(2, 9, 32), normal(2, 5, 32)), {}

    def transformer(_: str) -> nn.Module:
        return seeded(lambda: nn.Transformer(32, 4, 1, 2, 64, batch_first=True))

    return [
        one("mha", lambda s: zoo_plain.SelfAttention(weights=s == "eager"), 1, BOTH),
        one("encoder_layer", lambda _: layer(), 1),
        one("encoder", lambda _: nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False), 2),
        Family("transformer", transformer, pair, PLAIN, 5),
        one("nanogpt", lambda s: zoo_plain.NanoGPT(fused=s == "sdpa"), 2, BOTH),
        one("einsum", lambda _: zoo_plain.EinsumAttention(), 1),
        one("einops", lambda _: zoo_plain.EinopsAttention(), 1),
    ]


# --- diffusers --------------------------------------------------------------------------------------------------------


def _diffusion(
    name: str, model: str, settings: dict[str, Any], inputs: Callable[[], dict[str, Any]], sites: int
) -> Family:
    def build(spelling: str) -> nn.Module:
        declare_missing_vision_ops()
        import diffusers
        from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

        made: Any = seeded(lambda: getattr(diffusers, model)(**settings))
        for module in made.modules():
            if hasattr(module, "set_processor"):
                module.set_processor(AttnProcessor2_0() if spelling == "sdpa" else AttnProcessor())
        return made

    return Family(name, build, lambda: ((), inputs() | {"return_dict": False}), BOTH, sites)


def _diffusers() -> list[Family]:
    dit = dict(num_attention_heads=4, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2)
    dit |= dict(num_embeds_ada_norm=10)
    unet: dict[str, Any] = dict(sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=24)
    unet |= dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8, attention_head_dim=8)
    unet |= dict(up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))

    def labelled() -> dict[str, Any]:
        return {
            "hidden_states": normal(2, 4, 8, 8),
            "timestep": torch.tensor([3, 7]),
            "class_labels": torch.tensor([1, 4]),
        }

    def described() -> dict[str, Any]:
        states = {"encoder_hidden_states": normal(2, 5, 24)}
        return {"sample": normal(2, 4, 16, 16), "timestep": torch.tensor(3)} | states

    return [
        _diffusion("dit", "DiTTransformer2DModel", dit, labelled, 2),
        _diffusion("unet", "UNet2DConditionModel", unet, described, 8),
    ]
