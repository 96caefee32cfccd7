"""Small random models of every family, in every spelling of attention that the family has: one table of values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import zoo_plain
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


def zoo() -> dict[str, Family]:
    """Every family by name. Nothing is imported or built before `build` is called."""
    families = [*_decoders(), *_encoders(), *_two_sided(), *_images(), *_timm_models(), *_torch_models(), *_diffusers()]
    return {family.name: family for family in families}


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """The same weights at every call, none of them zero or one: a bias that starts at zero must show."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.is_floating_point():
                    weight.add_(torch.randn_like(weight), alpha=0.02)
    return model


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _ids(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 90, (batch, length), generator=_generator())


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=_generator())


# --- transformers -----------------------------------------------------------------------------------------------------

_WIDTH: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
)
_GROUPED = _WIDTH | {"num_key_value_heads": 2}
_GPT2: dict[str, Any] = dict(n_embd=64, n_layer=2, n_head=4, vocab_size=100, n_positions=64)
_FALCON: dict[str, Any] = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
_IMAGE = {k: v for k, v in _WIDTH.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 8}
_TEXT = _WIDTH | {"max_position_embeddings": 32}


def _hf(
    name: str, model: str, config: str, settings: dict[str, Any], inputs: Callable[[], dict[str, Any]], sites: int,
    spellings: tuple[str, ...] = BOTH,
) -> Family:  # fmt: skip
    def build(spelling: str) -> nn.Module:
        declare_missing_vision_ops()
        import transformers

        made = getattr(transformers, config)(**settings)
        made._attn_implementation = spelling
        return _seeded(lambda: getattr(transformers, model)(made))

    return Family(name, build, lambda: ((), inputs()), spellings, sites)


def _decoder(
    name: str, model: str, settings: dict[str, Any], config: str = "", spellings: tuple[str, ...] = BOTH
) -> Family:
    return _hf(name, f"{model}ForCausalLM", config or f"{model}Config", settings, _causal_ids, 2, spellings)


def _decoders() -> list[Family]:
    moe = _GROUPED | {"num_experts_per_tok": 2, "head_dim": 16}
    return [
        _decoder("llama", "Llama", _GROUPED),
        _decoder("qwen2", "Qwen2", _GROUPED),
        _decoder("qwen3", "Qwen3", _GROUPED | {"head_dim": 16}),
        _decoder("mistral", "Mistral", _GROUPED | {"sliding_window": 4}),
        _decoder("gemma2", "Gemma2", _GROUPED | {"head_dim": 16, "sliding_window": 4}, spellings=EAGER),
        _decoder("gemma3", "Gemma3", _GROUPED | {"head_dim": 16, "sliding_window": 4}, "Gemma3TextConfig"),
        _hf("gpt2", "GPT2LMHeadModel", "GPT2Config", _GPT2, _causal_ids, 2),
        _decoder("gpt_neox", "GPTNeoX", _WIDTH),
        _decoder("phi", "Phi", _WIDTH),
        _decoder("phi3", "Phi3", _GROUPED | {"pad_token_id": 0}),
        _decoder("opt", "OPT", _FALCON | {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 32}),
        _decoder("bloom", "Bloom", dict(hidden_size=64, n_layer=2, n_head=4, vocab_size=100), spellings=EAGER),
        _decoder("falcon", "Falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
        _decoder("falcon_7b", "Falcon", _FALCON),
        _decoder("falcon_alibi", "Falcon", _FALCON | {"alibi": True}),
        _decoder("mixtral", "Mixtral", _GROUPED | {"num_local_experts": 4}),
        _decoder("qwen3_moe", "Qwen3Moe", moe | {"num_experts": 4, "moe_intermediate_size": 32}),
        _decoder("gpt_oss", "GptOss", moe | {"num_local_experts": 4, "sliding_window": 4}, spellings=EAGER),
        _decoder("olmo2", "Olmo2", _GROUPED),
    ]


def _causal_ids() -> dict[str, Any]:
    return {"input_ids": _ids(), "use_cache": False}


def _plain_ids() -> dict[str, Any]:
    return {"input_ids": _ids()}


def _padded_ids() -> dict[str, Any]:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": _ids(), "attention_mask": mask}


def _encoders() -> list[Family]:
    deberta = _TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    distil = dict(dim=64, hidden_dim=96, n_layers=2, n_heads=4, vocab_size=100)
    modern = _WIDTH | {"pad_token_id": 0, "local_attention": 4, "global_attn_every_n_layers": 2}
    return [
        _hf("bert", "BertModel", "BertConfig", _TEXT, _plain_ids, 2),
        _hf("bert_padded", "BertModel", "BertConfig", _TEXT, _padded_ids, 2),
        _hf("albert", "AlbertModel", "AlbertConfig", _TEXT | {"embedding_size": 32}, _plain_ids, 2),
        _hf("roberta", "RobertaModel", "RobertaConfig", _TEXT, _plain_ids, 2),
        _hf("distilbert", "DistilBertModel", "DistilBertConfig", distil, _plain_ids, 2),
        _hf("deberta_v2", "DebertaV2Model", "DebertaV2Config", deberta, _padded_ids, 2, EAGER),
        _hf("modernbert", "ModernBertModel", "ModernBertConfig", modern, _padded_ids, 2),
        _hf("wav2vec2", "Wav2Vec2Model", "Wav2Vec2Config", _speech(), lambda: {"input_values": _normal(2, 800)}, 2),
    ]


def _speech() -> dict[str, Any]:
    convolutions = dict(conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 8), num_conv_pos_embeddings=8)
    return _WIDTH | convolutions | {"num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 2}


def _two_sided() -> list[Family]:
    layers = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
    feed: dict[str, Any] = dict(d_model=64, encoder_ffn_dim=96, decoder_ffn_dim=96, vocab_size=100, **layers)
    sound = feed | dict(num_mel_bins=8, max_source_positions=16, max_target_positions=16, pad_token_id=0)
    sound |= dict(bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None)
    text = dict(d_model=64, d_ff=96, num_layers=2, num_heads=4, d_kv=16, vocab_size=100)

    def both() -> dict[str, Any]:
        return {"input_ids": _ids(), "decoder_input_ids": _ids(2, 5), "use_cache": False}

    def heard() -> dict[str, Any]:
        return {"input_features": _normal(2, 8, 32), "decoder_input_ids": _ids(2, 5), "use_cache": False}

    return [
        _hf("t5", "T5Model", "T5Config", text, both, 6),
        _hf("bart", "BartModel", "BartConfig", feed | {"max_position_embeddings": 32}, both, 6),
        _hf("whisper", "WhisperModel", "WhisperConfig", sound, heard, 6),
    ]


def _pixels() -> dict[str, Any]:
    return {"pixel_values": _normal(2, 3, 32, 32)}


def _images() -> list[Family]:
    stages = dict(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    reduced = dict(num_encoder_blocks=2, depths=[1, 1], sr_ratios=[4, 2], hidden_sizes=[16, 32], patch_sizes=[7, 3])
    reduced |= dict(strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2])
    pair = dict(text_config=_TEXT | {"projection_dim": 32, "eos_token_id": 2}, vision_config=_IMAGE)

    def paired() -> dict[str, Any]:
        return _pixels() | {"input_ids": _ids()}

    return [
        _hf("vit", "ViTModel", "ViTConfig", _IMAGE, _pixels, 2),
        _hf("deit", "DeiTModel", "DeiTConfig", _IMAGE, _pixels, 2),
        _hf("dinov2", "Dinov2Model", "Dinov2Config", _IMAGE, _pixels, 2),
        _hf("swin", "SwinModel", "SwinConfig", stages, _pixels, 4),
        _hf("swinv2", "Swinv2Model", "Swinv2Config", stages, _pixels, 4, EAGER),
        _hf("segformer", "SegformerModel", "SegformerConfig", reduced, _pixels, 2),
        _hf("clip", "CLIPModel", "CLIPConfig", pair | {"projection_dim": 32}, paired, 4),
        _hf("siglip", "SiglipModel", "SiglipConfig", pair, paired, 5),
        _llava(),
    ]


def _llava() -> Family:
    def build(spelling: str) -> nn.Module:
        declare_missing_vision_ops()
        import transformers as hf

        vision = hf.CLIPVisionConfig(**_IMAGE | {"num_hidden_layers": 3})
        config = hf.LlavaConfig(vision_config=vision, text_config=hf.LlamaConfig(**_GROUPED), image_token_index=99)
        config._attn_implementation = spelling
        return _seeded(lambda: hf.LlavaForConditionalGeneration(config))

    def inputs() -> Inputs:
        ids = torch.cat([torch.full((2, 16), 99), _ids()], 1)  # 32 / 8 = 4 x 4 patches
        return (), {"input_ids": ids, "use_cache": False} | _pixels()

    return Family("llava", build, inputs, BOTH, 4)  # two of the vision tower's three layers, and two of text


# --- timm -------------------------------------------------------------------------------------------------------------


def _timm(
    name: str, model: str, sites: int, spellings: tuple[str, ...] = BOTH, size: int = 32, **settings: Any
) -> Family:
    def build(spelling: str) -> nn.Module:
        declare_missing_vision_ops()
        import timm
        from timm.layers import set_fused_attn, use_fused_attn

        before = use_fused_attn()
        set_fused_attn(spelling == "sdpa")
        try:
            return _seeded(lambda: timm.create_model(model, pretrained=False, num_classes=5, **settings))
        finally:
            set_fused_attn(bool(before))

    return Family(name, build, lambda: ((_normal(2, 3, size, size),), {}), spellings, sites)


def _timm_models() -> list[Family]:
    plain: dict[str, Any] = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)
    windows: dict[str, Any] = dict(
        img_size=32, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4
    )
    return [
        _timm("timm_vit", "vit_tiny_patch16_224", 2, **plain),
        _timm("timm_deit3", "deit3_small_patch16_224", 2, **plain),
        _timm("timm_eva", "eva02_tiny_patch14_224", 2, **plain),
        _timm("timm_swin", "swin_tiny_patch4_window7_224", 4, **windows),
        _timm("timm_swinv2", "swinv2_tiny_window8_256", 4, EAGER, **windows),
        _timm("timm_maxvit", "maxvit_rmlp_pico_rw_256", 4, size=64, img_size=64, depths=(1, 1), embed_dim=(32, 64)),
        _timm("timm_coatnet", "coatnet_rmlp_nano_rw_224", 2, size=64, img_size=64, depths=(1, 1, 1, 1),
              embed_dim=(32, 32, 32, 64)),
        _timm("timm_mvitv2", "mvitv2_tiny", 10, EAGER, img_size=32),
        _timm("timm_levit", "levit_128s", 3, EAGER, size=64, img_size=64, embed_dim=(32, 48), num_heads=(2, 3),
              depth=(1, 1)),
        _timm("timm_convnext", "convnext_atto", 0, PLAIN),
        _timm("timm_efficientvit", "efficientvit_b0", 0, PLAIN),
    ]  # fmt: skip


# --- torch.nn and modules by hand -------------------------------------------------------------------------------------


def _torch_models() -> list[Family]:
    def one(name: str, make: Callable[[str], nn.Module], sites: int, spellings: tuple[str, ...] = PLAIN) -> Family:
        return Family(name, lambda s: _seeded(lambda: make(s)), lambda: ((_normal(2, 9, 32),), {}), spellings, sites)

    def layer() -> nn.TransformerEncoderLayer:
        return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

    def pair() -> Inputs:
        return (_normal(2, 9, 32), _normal(2, 5, 32)), {}

    def transformer(_: str) -> nn.Module:
        return _seeded(lambda: nn.Transformer(32, 4, 1, 2, 64, batch_first=True))

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

        made: Any = _seeded(lambda: getattr(diffusers, model)(**settings))
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
            "hidden_states": _normal(2, 4, 8, 8),
            "timestep": torch.tensor([3, 7]),
            "class_labels": torch.tensor([1, 4]),
        }

    def described() -> dict[str, Any]:
        states = {"encoder_hidden_states": _normal(2, 5, 24)}
        return {"sample": _normal(2, 4, 16, 16), "timestep": torch.tensor(3)} | states

    return [
        _diffusion("dit", "DiTTransformer2DModel", dit, labelled, 2),
        _diffusion("unet", "UNet2DConditionModel", unet, described, 8),
    ]
