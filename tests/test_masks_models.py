"""Masks of Hugging Face models, captured and raised: predicates come out, no tensor over queries and keys stays."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import fx, nn

from reattend.compiler.capture import capture
from reattend.compiler.masks import MaskVerdict, fold_masks
from reattend.compiler.primitives.attend_spec import AttendSpec
from reattend.compiler.raising import raise_sites

transformers = pytest.importorskip("transformers")

SMALL = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TOKENS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
IDS = torch.arange(24).view(2, 12) % 97 + 3
PADDED = torch.tensor([[0] * 3 + [1] * 9, [1] * 12])
PACKED = torch.tensor([[*range(5), *range(7)], [*range(12)]])


def build(name: str, implementation: str = "sdpa", **config: Any) -> nn.Module:
    """A tiny random model: `Llama` + `ForCausalLM`, or the class as named."""
    class_name, _, config_name = name.partition(":")
    made = getattr(transformers, config_name)(**config)
    made._attn_implementation = implementation
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, class_name)(made).eval()
    return model


def llama(**more: Any) -> nn.Module:
    return build("LlamaForCausalLM:LlamaConfig", **{**SMALL, "num_key_value_heads": 2, **TOKENS, **more})


Found = list[tuple[str, str, tuple[str, ...]]]


def folded(model: nn.Module, **inputs: Any) -> tuple[Found, tuple[MaskVerdict, ...], Any]:
    """(keep, align, names of tables) of every site; numbers compared before and after."""
    captured = capture(model, (), inputs)
    raise_sites(captured.graph)
    tensors = [t for t in torch.utils._pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)]
    with torch.no_grad():
        before = captured.graph(*tensors)
        verdicts = fold_masks(captured.graph)
        captured.graph.graph.lint()
        after = captured.graph(*tensors)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    specs = [(AttendSpec.of(n.args[3]), n.args[2]) for n in sites(captured.graph)]
    return [(s.keep, s.align, tuple(t.name for t in tables)) for s, tables in specs], verdicts, captured.graph


def sites(graph_module: fx.GraphModule) -> list[Any]:
    return [n for n in graph_module.graph.nodes if n.target is torch.ops.reattend.attend.default]


def squares(graph_module: fx.GraphModule) -> list[str]:
    """Nodes whose last two dimensions are queries and keys."""
    n, m = (sites(graph_module)[0].args[k] for k in (0, 1))
    sizes = (n.meta["val"].shape[2], m[0].meta["val"].shape[2])
    tensors = [(x, x.meta.get("val")) for x in graph_module.graph.nodes]
    return [x.name for x, v in tensors if isinstance(v, torch.Tensor) and v.ndim > 1 and tuple(v.shape[-2:]) == sizes]


def test_llama_is_causal_and_no_square_is_left() -> None:
    found, verdicts, graph_module = folded(llama(), input_ids=IDS, use_cache=False)
    assert found == [("j <= i", "start", ())] * 2, verdicts
    assert squares(graph_module) == []
    assert all(v.proof == "symbolic" and len(v.sizes) >= 3 for v in verdicts)


def test_llama_with_padding_looks_up_the_mask_itself() -> None:
    found, verdicts, graph_module = folded(llama(), input_ids=IDS, attention_mask=PADDED, use_cache=False)
    assert {k for k, _, _ in found} == {"(0 != t0[b, j]) & (j <= i)"}, verdicts
    assert squares(graph_module) == []


def test_llama_with_packed_positions_compares_documents() -> None:
    found, verdicts, graph_module = folded(llama(), input_ids=IDS, position_ids=PACKED, use_cache=False)
    keep, _, tables = found[0]
    assert keep == "(j <= i) & (t0[b, i] == t0[b, j])" and len(tables) == 1, verdicts
    assert squares(graph_module) == []


def test_mistral_and_its_window() -> None:
    model = build("MistralForCausalLM:MistralConfig", **SMALL, num_key_value_heads=2, sliding_window=4, **TOKENS)
    found, verdicts, _ = folded(model, input_ids=IDS, attention_mask=PADDED, use_cache=False)
    assert {k for k, _, _ in found} == {"(0 != t0[b, j]) & (i <= j + 3) & (j <= i)"}, verdicts


def test_gemma3_alternates() -> None:
    model = build(
        "Gemma3ForCausalLM:Gemma3TextConfig", **SMALL, num_key_value_heads=2, head_dim=8, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"], **TOKENS,
    )  # fmt: skip
    found, verdicts, _ = folded(model, input_ids=IDS, use_cache=False)
    assert [k for k, _, _ in found] == ["(i <= j + 3) & (j <= i)", "j <= i"], verdicts


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bert_sees_everything_but_padding(implementation: str) -> None:
    model = build("BertModel:BertConfig", implementation, **SMALL)
    found, verdicts, _ = folded(model, input_ids=IDS)
    assert [k for k, _, _ in found] == ["", ""] and not [t for _, _, t in found if t], verdicts
    found, verdicts, _ = folded(model, input_ids=IDS, attention_mask=PADDED)
    assert {k for k, _, _ in found} == {"0 != t0[b, j]"}, verdicts


def test_modernbert_alternates() -> None:
    special = dict(local_attention=6, cls_token_id=1, sep_token_id=2)
    model = build("ModernBertModel:ModernBertConfig", **SMALL, **special, **TOKENS)
    found, verdicts, _ = folded(model, input_ids=IDS, attention_mask=PADDED)
    keeps = [k for k, _, _ in found]
    assert keeps[0] == "0 != t0[b, j]" and keeps[1] == "(0 != t0[b, j]) & (i <= j + 3) & (j <= i + 3)", verdicts


def test_t5_keeps_its_bias() -> None:
    model = build("T5Model:T5Config", vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    inputs = dict(input_ids=IDS, attention_mask=PADDED, decoder_input_ids=IDS[:, :7], use_cache=False)
    found, verdicts, graph_module = folded(model, **inputs)
    keeps = [k for k, _, _ in found]
    assert keeps[:2] == ["0 != t0[b, j]"] * 2 and keeps[2::2] == ["j <= i"] * 2 and keeps[3] == "0 != t0[b, j]", (
        verdicts
    )
    scores = [AttendSpec.of(n.args[3]).score for n in sites(graph_module)]
    assert "t0[0, h, i, j]" in scores[2] and "t" not in scores[3], scores


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_gpt2(implementation: str) -> None:
    sizes = dict(vocab_size=100, n_embd=32, n_layer=2, n_head=4)
    model = build("GPT2LMHeadModel:GPT2Config", implementation, **sizes, **TOKENS)
    found, verdicts, graph_module = folded(model, input_ids=IDS, use_cache=False)
    assert found == [("j <= i", "start", ())] * 2, verdicts
    assert implementation == "eager" or squares(graph_module) == []


def test_vit_has_no_mask() -> None:
    sizes = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    model = build("ViTModel:ViTConfig", **sizes, image_size=32, patch_size=8)
    found, verdicts, _ = folded(model, pixel_values=torch.randn(2, 3, 32, 32))
    assert [(k, t) for k, _, t in found] == [("", ())] * 2, verdicts


def test_decoding_counts_from_the_end() -> None:
    model = llama()
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=IDS[:, :10], past_key_values=cache)
    inputs = dict(input_ids=IDS[:, :3], attention_mask=torch.ones(2, 13).long(), past_key_values=cache)
    captured = capture(model, (), inputs)
    raise_sites(captured.graph)
    verdicts = fold_masks(captured.graph)
    specs = [AttendSpec.of(n.args[3]) for n in sites(captured.graph)]
    assert {(s.keep, s.align) for s in specs} == {("(0 != t0[b, j]) & (j <= i)", "end")}, verdicts


@pytest.mark.slow
def test_forty_layers_cost_little_beside_their_export() -> None:
    started = time.perf_counter()
    captured = capture(llama(num_hidden_layers=40), (), dict(input_ids=IDS, use_cache=False))
    exported = time.perf_counter() - started
    raise_sites(captured.graph)
    started = time.perf_counter()
    verdicts = fold_masks(captured.graph)
    assert len(verdicts) == 40 and time.perf_counter() - started < 0.05 * exported
