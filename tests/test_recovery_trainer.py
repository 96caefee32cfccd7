"""DistillTrainer: a transformers Trainer that brings an optimized model back to its original; resumed, and refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import reattend
from reattend.compiler.recovery.losses import kl
from reattend.models.distill_trainer import distill_trainer

CONFIG = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=60)
WINDOW = {"version": 1, "sites": [{"match": "*", "attention": {"window": {"window": 3, "sinks": 0}}}]}


def llama() -> Any:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**CONFIG, num_hidden_layers=1, use_cache=False, pad_token_id=0))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.ndim == 2 else 1)  # attention that looks somewhere
    return model.eval()


def rows(count: int = 16) -> list[dict[str, Tensor]]:
    drawn = torch.randint(1, 60, (count, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row} for row in drawn]


def trainer(model: Any, folder: Path, steps: int = 6, save: int = 0, **how: Any) -> Any:
    args = hf.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=3e-3, seed=3, use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no",
        save_strategy="steps" if save else "no", save_steps=save or 500,
    )  # fmt: skip
    return reattend.DistillTrainer(model=model, args=args, train_dataset=rows(), **how)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.slow
def test_it_comes_nearer_the_original_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    model = llama()
    before = weights(model)
    fast = reattend.optimize(model, WINDOW, {"input_ids": torch.ones(2, 12).long()}, measure=False)
    whole = trainer(fast, tmp_path, steps=20, save=4, train="all")
    seen = torch.stack([row["input_ids"] for row in rows()])  # random ids: other rows have nothing in common with them
    start = kl(fast(seen).logits, model(seen).logits)
    whole.train()
    assert kl(fast.eval()(seen).logits, model(seen).logits) < 0.8 * start
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    again = trainer(reattend.optimize(llama(), WINDOW, {"input_ids": torch.ones(2, 12).long()}, measure=False),
                    tmp_path / "again", steps=20, train="all")  # fmt: skip
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert all(torch.equal(tensor, fast.state_dict()[name]) for name, tensor in again.model.state_dict().items())


def test_the_loss_is_the_distance_to_the_teacher(tmp_path: Path) -> None:
    fast = reattend.optimize(llama(), WINDOW, {"input_ids": torch.ones(2, 12).long()}, measure=False)
    asked = trainer(fast, tmp_path, train="all", kl=2.0, ce=0.5)
    inputs = {"input_ids": torch.stack([row["input_ids"] for row in rows(4)])}
    inputs["labels"] = inputs["input_ids"]
    loss, outputs = asked.compute_loss(fast, inputs, return_outputs=True)
    p, q = (m(**inputs).logits.log_softmax(-1) for m in (llama(), fast))
    expected = 2 * (p.exp() * (p - q)).sum(-1).mean() + 0.5 * outputs.loss
    torch.testing.assert_close(loss, expected)


def test_mistakes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(reattend.Refused, match="LlamaForCausalLM without a teacher"):
        trainer(llama(), tmp_path)
    fast = reattend.optimize(llama(), WINDOW, {"input_ids": torch.ones(2, 12).long()}, measure=False)
    with pytest.raises(reattend.Refused, match="nothing to train: train=new"):
        trainer(fast, tmp_path, train="new")
    with pytest.raises(reattend.Refused, match="train='lora'"):
        trainer(fast, tmp_path, train="lora")
    distill_trainer.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(reattend.Refused, match=r"transformers is not installed: pip install 'reattend\[hf\]'"):
        _ = reattend.DistillTrainer
    with pytest.raises(AttributeError, match="has no attribute 'DistilTrainer'"):
        _ = reattend.DistilTrainer
