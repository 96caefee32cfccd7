"""Further language models of the zoo: decoders, encoders and pairs whose attention is written in a way of its own."""

from __future__ import annotations

from typing import Any

from .zoo_family import EAGER, GROUPED, TEXT, WIDTH, Family, causal_ids, decoder, hf, ids, padded_ids, plain_ids

SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
SMALL: dict[str, Any] = dict(n_embd=64, n_layer=2, n_head=4, vocab_size=100, n_positions=64)


def language() -> list[Family]:
    return [*_decoders(), *_hybrids(), *_encoders(), *_pairs()]


def _decoders() -> list[Family]:
    own = GROUPED | SPECIAL
    wide = own | {"head_dim": 16}
    latent = WIDTH | SPECIAL | dict(num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=16)
    latent |= dict(
        qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1
    )
    latent |= dict(moe_intermediate_size=32, n_shared_experts=1, first_k_dense_replace=1)
    local = dict(attention_types=[[["global", "local"], 1]], window_size=4, max_position_embeddings=64)
    neo: dict[str, Any] = dict(hidden_size=64, num_layers=2, num_heads=4, vocab_size=100, **local)
    two = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    chunks = wide | dict(num_local_experts=2, attention_chunk_size=4, intermediate_size_mlp=96)
    return [
        decoder("cohere", "Cohere", own),
        decoder("cohere2", "Cohere2", own | {"sliding_window": 4}),
        decoder("starcoder2", "Starcoder2", own | {"sliding_window": 4}),
        decoder("stablelm", "StableLm", own),
        decoder("olmoe", "Olmoe", own | {"num_experts": 4, "num_experts_per_tok": 2}),
        decoder("glm4", "Glm4", wide),
        decoder("granite", "Granite", own),
        decoder("nemotron", "Nemotron", own),
        decoder("persimmon", "Persimmon", WIDTH | SPECIAL),
        decoder("mpt", "Mpt", dict(d_model=64, n_heads=4, n_layers=2, vocab_size=100, max_seq_len=64), spellings=EAGER),
        decoder("codegen", "CodeGen", SMALL | {"rotary_dim": 8}, spellings=EAGER),
        decoder("gptj", "GPTJ", SMALL | {"rotary_dim": 8}, spellings=EAGER),
        decoder("gpt_bigcode", "GPTBigCode", SMALL),
        decoder("gpt_neo", "GPTNeo", neo, spellings=EAGER),
        decoder("biogpt", "BioGpt", TEXT),
        decoder("deepseek_v2", "DeepseekV2", latent | {"topk_method": "greedy", "routed_scaling_factor": 1.0}),
        decoder("deepseek_v3", "DeepseekV3", latent),
        decoder("llama4", "Llama4", chunks, "Llama4TextConfig"),
        decoder("phimoe", "Phimoe", own | {"num_local_experts": 4}),
        decoder("smollm3", "SmolLM3", own),
        decoder("exaone4", "Exaone4", own | two),
        decoder("olmo3", "Olmo3", own | two),
        decoder("ernie4_5", "Ernie4_5", wide),
        decoder("hunyuan", "HunYuanDenseV1", wide),
        decoder("arcee", "Arcee", wide),
        decoder("apertus", "Apertus", own),
        decoder("seed_oss", "SeedOss", wide),
        decoder("helium", "Helium", wide),
        hf("openai_gpt", "OpenAIGPTLMHeadModel", "OpenAIGPTConfig", SMALL, plain_ids, 2, EAGER),
    ]


def _hybrids() -> list[Family]:
    """Layers that attend beside layers that do not."""
    own = GROUPED | SPECIAL
    jamba = own | dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1)
    jamba |= dict(num_experts=4, use_mamba_kernels=False)
    gemma = WIDTH | SPECIAL | dict(num_key_value_heads=1, attention_window_size=4, lru_width=64)
    gemma |= dict(block_types=["recurrent", "attention"])
    scan = dict(mamba_n_heads=4, mamba_d_head=32, mamba_d_state=8, mamba_chunk_size=8)
    both = dict(head_dim=16, mamba_d_ssm=32, mamba_d_head=8, mamba_n_groups=1)
    convolved = dict(layer_types=["conv", "full_attention"], block_multiple_of=8)
    state = dict(hidden_size=32, num_hidden_layers=2, vocab_size=100, state_size=4)
    return [
        hf("diffllama", "DiffLlamaForCausalLM", "DiffLlamaConfig", own, causal_ids, 4),  # values in two halves
        hf("jamba", "JambaForCausalLM", "JambaConfig", jamba, causal_ids, 1),
        hf("recurrent_gemma", "RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", gemma, causal_ids, 1),
        hf("bamba", "BambaForCausalLM", "BambaConfig", own | scan | {"attn_layer_indices": [1]}, causal_ids, 1),
        hf("falcon_h1", "FalconH1ForCausalLM", "FalconH1Config", own | scan | both, causal_ids, 2),
        hf("lfm2", "Lfm2ForCausalLM", "Lfm2Config", own | convolved, causal_ids, 1),
        hf("mamba", "MambaForCausalLM", "MambaConfig", state, causal_ids, 0, EAGER),
    ]


def _encoders() -> list[Family]:
    funnel = dict(vocab_size=100, block_sizes=[1, 1], num_decoder_layers=1, d_model=64, n_head=4, d_head=16, d_inner=96)
    turned = TEXT | dict(pad_token_id=1, mask_token_id=4, position_embedding_type="rotary")
    two_terms = TEXT | dict(relative_attention=True, pos_att_type=["p2c", "c2p"])
    return [
        hf("electra", "ElectraModel", "ElectraConfig", TEXT | {"embedding_size": 32}, padded_ids, 2),
        hf("xlm_roberta", "XLMRobertaModel", "XLMRobertaConfig", TEXT, padded_ids, 2),
        hf("mpnet", "MPNetModel", "MPNetConfig", TEXT, padded_ids, 2, EAGER),
        hf("squeezebert", "SqueezeBertModel", "SqueezeBertConfig", TEXT | {"embedding_size": 64}, padded_ids, 2, EAGER),
        hf("funnel", "FunnelModel", "FunnelConfig", funnel, padded_ids, 3, EAGER),
        hf(
            "bigbird", "BigBirdModel", "BigBirdConfig", TEXT | {"attention_type": "original_full"}, padded_ids, 2, EAGER
        ),
        hf("convbert", "ConvBertModel", "ConvBertConfig", TEXT | {"embedding_size": 64}, padded_ids, 2, EAGER),
        hf("roformer", "RoFormerModel", "RoFormerConfig", TEXT | {"embedding_size": 64}, padded_ids, 2, EAGER),
        hf("esm", "EsmModel", "EsmConfig", turned, padded_ids, 2),
        hf("deberta", "DebertaModel", "DebertaConfig", two_terms, padded_ids, 2, EAGER),
        hf("fnet", "FNetModel", "FNetConfig", TEXT, plain_ids, 0, EAGER),
    ]


def _pairs() -> list[Family]:
    heads = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
    feed: dict[str, Any] = dict(d_model=64, encoder_ffn_dim=96, decoder_ffn_dim=96, vocab_size=100, **heads)
    feed |= dict(max_position_embeddings=32)
    relative = dict(d_model=64, d_ff=96, num_layers=2, num_heads=4, d_kv=16, vocab_size=100)
    grams = dict(hidden_size=64, encoder_ffn_dim=96, decoder_ffn_dim=96, num_encoder_layers=2, num_decoder_layers=2)
    grams |= dict(num_encoder_attention_heads=4, num_decoder_attention_heads=4, vocab_size=100)
    grams |= dict(max_position_embeddings=32, ngram=2)

    def both() -> dict[str, Any]:
        return {"input_ids": ids(), "decoder_input_ids": ids(2, 5), "use_cache": False}

    return [
        hf("mbart", "MBartModel", "MBartConfig", feed, both, 6),
        hf("pegasus", "PegasusModel", "PegasusConfig", feed | {"pad_token_id": 0}, both, 6),
        hf("m2m100", "M2M100Model", "M2M100Config", feed, both, 6),
        hf("umt5", "UMT5Model", "UMT5Config", relative, both, 6),
        hf("prophetnet", "ProphetNetModel", "ProphetNetConfig", grams, both, 8, EAGER),  # a stream beside the main one
    ]
