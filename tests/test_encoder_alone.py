"""A swapped encoder that generate() runs alone is the one within the whole model."""

from __future__ import annotations

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

import reattend

CONFIG = BartConfig(
    d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=60, max_position_embeddings=32, forced_eos_token_id=None,
)  # fmt: skip
NEAR = {"window": {"window": 2, "sinks": 1}}
LEARNED = {"sigmoid": {"sim": "softmax", "sink": "kv_bias"}}


@pytest.mark.parametrize("attention", [NEAR, LEARNED])
def test_an_encoder_alone_is_rewritten_as_in_the_whole(attention: dict[str, object]) -> None:
    model, ids = BartForConditionalGeneration(CONFIG).eval(), torch.randint(4, 60, (2, 9))
    given = {"input_ids": ids, "decoder_input_ids": ids[:, :4], "use_cache": False}
    sites = [{"match": {"kind": ["noncausal-self"]}, "attention": attention}]
    fast = reattend.optimize(model, {"version": 1, "sites": sites}, given, measure=False, max_signatures=16)
    assert [row.status for row in fast.report.rows].count("rewritten") == 2
    names = [name for name, _ in fast.named_parameters()]
    for _ in range(2):
        encoder = fast.get_encoder()
        assert isinstance(encoder, type(model.model.encoder))
        states = encoder(input_ids=ids)
        alone = fast(encoder_outputs=states, decoder_input_ids=ids[:, :4], use_cache=False)
        torch.testing.assert_close(alone.logits, fast(**given).logits, rtol=0, atol=1e-5)
        assert (states[0] - model.get_encoder()(input_ids=ids)[0]).abs().max() > 1e-4
        with torch.no_grad():
            for weight in fast.parameters():  # trained since
                weight.mul_(1.1)
    assert [name for name, _ in fast.named_parameters()] == names
    more = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=1)
    with torch.no_grad():
        assert torch.equal(fast.generate(ids, **more), fast.generate(ids, use_cache=False, **more))


def test_an_encoder_as_it_came_stays_it() -> None:
    model, ids = BartForConditionalGeneration(CONFIG).eval(), torch.randint(4, 60, (2, 9))
    fast = reattend.optimize(model, "exact", {"input_ids": ids, "decoder_input_ids": ids[:, :4]}, measure=False)
    assert fast.get_encoder() is fast.model.encoder


@pytest.mark.parametrize("path", ["model.encoder", "model.encoder.layers.0", "model.encoder.layers.0.self_attn"])
def test_a_part_called_alone_is_rewritten_as_in_the_whole(path: str) -> None:
    model, ids = BartForConditionalGeneration(CONFIG).eval(), torch.randint(4, 60, (2, 9))
    given = {"input_ids": ids, "decoder_input_ids": ids[:, :4], "use_cache": False}
    sites = [{"match": {"kind": ["noncausal-self"]}, "attention": NEAR}]
    fast = reattend.optimize(model, {"version": 1, "sites": sites}, given, measure=False)
    x = torch.randn(2, 9, 32)
    call = {"input_ids": ids} if path == "model.encoder" else {"hidden_states": x, "attention_mask": None}
    alone, plain = (part(**call)[0] for part in (fast.part(path), model.get_submodule(path)))
    assert (alone - plain).abs().max() > 1e-4
    near = ((torch.arange(9)[:, None] - torch.arange(9)).abs() < 2) | (torch.arange(9) < 1)
    if path != "model.encoder":
        masked = model.get_submodule(path)(x, attention_mask=torch.where(near, 0.0, -1e9)[None, None])[0]
        torch.testing.assert_close(alone, masked, rtol=0, atol=1e-5)


def test_a_part_that_is_not_there_or_not_changed() -> None:
    model, ids = BartForConditionalGeneration(CONFIG).eval(), torch.randint(4, 60, (2, 9))
    given = {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    fast = reattend.optimize(model, "exact", given, measure=False)
    with pytest.raises(reattend.Refused, match="no module 'model.encodr': did you mean 'model.encoder'"):
        fast.part("model.encodr")
    assert fast.part("model.encoder.embed_tokens") is fast.model.encoder.embed_tokens
