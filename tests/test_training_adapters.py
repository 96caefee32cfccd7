"""LoRA by peft and quantized layers by torchao: what they do to an optimized model is what they do to its original."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import reattend

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

# peft 0.x asks transformers under a name that 5.x deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
CONFIG = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=60)
WINDOW = {"version": 1, "sites": [{"match": "*", "attention": {"window": {"window": 4, "sinks": 1}}}]}


def llama() -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**CONFIG, num_hidden_layers=1, use_cache=False, pad_token_id=0)).eval()


def ids() -> Tensor:
    return torch.randint(1, 60, (2, 12), generator=torch.Generator().manual_seed(1))


def optimized(model: Any, recipe: Any = "exact") -> Any:
    return reattend.optimize(model, recipe, {"input_ids": ids()}, measure=False)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def adapted(model: Any) -> Any:
    torch.manual_seed(5)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))


def trained(model: Any) -> tuple[dict[str, Any], Any]:
    """What one sees of a LoRA run: losses, the answers with, without and after merging; and the merged model."""
    tuned = adapted(model).train()
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.5)
    seen: dict[str, Any] = {"losses": []}
    for _ in range(3):
        loss = tuned(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen["losses"].append(loss.detach())
    tuned.eval()
    with torch.no_grad():
        seen["with"] = tuned(input_ids=ids()).logits
        with tuned.disable_adapter():
            seen["without"] = tuned(input_ids=ids()).logits
        merged = tuned.merge_and_unload()
        seen["merged"] = merged(input_ids=ids()).logits
    return seen, merged


def test_lora_is_what_it_is_on_the_original() -> None:
    model = llama()
    before = weights(model)
    got, merged = trained(optimized(model))
    expected, _ = trained(copy.deepcopy(model))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got["with"], got["without"], atol=1e-4)
    torch.testing.assert_close(got["merged"], got["with"], atol=1e-5, rtol=1e-5)
    assert isinstance(merged, hf.LlamaForCausalLM) and list(merged.state_dict()) == list(before)
    now = model.state_dict()  # merging writes into frozen weights, `.data += delta`: the original's must not change
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


def test_lora_on_a_rewritten_model() -> None:
    fast = optimized(llama(), WINDOW)
    plain = fast(ids()).logits
    seen, merged = trained(fast)
    torch.testing.assert_close(seen["without"], plain)
    torch.testing.assert_close(seen["merged"], seen["with"], atol=1e-5, rtol=1e-5)
    assert seen["losses"][-1] < seen["losses"][0] and merged.sites[0].kind == "approximate"


def test_an_adapter_stays_a_module_in_signatures_that_come_later() -> None:
    """Traced through, it could not be switched off or merged any more."""
    fast = optimized(llama(), WINDOW)
    mask = torch.ones(2, 12, dtype=torch.long)
    plain = fast(ids()).logits
    tuned = adapted(fast).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    with torch.no_grad():
        changed = tuned(input_ids=ids(), attention_mask=mask).logits  # a new signature, captured with the adapter in
        with tuned.disable_adapter():
            torch.testing.assert_close(tuned(input_ids=ids(), attention_mask=mask).logits, plain)
        merged = tuned.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids(), attention_mask=mask).logits, changed, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(changed, plain, atol=1e-3)


def test_the_other_order_is_refused_with_the_way_out() -> None:
    tuned = adapted(llama())
    with pytest.raises(reattend.Refused, match=r"PeftModel.*optimize the base model first.*merge_and_unload"):
        optimized(tuned)
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(optimized(merged)(ids()).logits, merged(ids()).logits)


@pytest.mark.parametrize("config", [Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig])
def test_torchao_converts_every_linear(config: Any) -> None:
    model = llama()
    before = weights(model)
    fast, other = optimized(model), copy.deepcopy(model)
    plain = fast(ids()).logits
    quantize_(fast, config())
    quantize_(other, config())
    linears = [m for m in fast.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 8 and all(type(m.weight) is not nn.Parameter for m in linears)
    with torch.no_grad():
        got, expected = fast(ids()).logits, other(ids()).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert (got - plain).abs().max() > 1e-4
    now = model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
