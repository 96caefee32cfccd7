"""An optimized model in transformers.Trainer: the original's losses step for step, checkpoints, auxiliary losses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import reattend

CONFIG = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, vocab_size=60)
MOH = {"version": 1, "sites": [{"match": "*", "heads": {"moh": {"shared_heads": 2, "routed_heads": 1}}}]}


def llama() -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**CONFIG, num_hidden_layers=1, use_cache=False, pad_token_id=0)).eval()


def optimized(model: Any, recipe: Any = "exact") -> Any:
    return reattend.optimize(model, recipe, {"input_ids": torch.randint(1, 60, (2, 12))}, measure=False)


def texts() -> list[dict[str, Tensor]]:
    drawn = torch.randint(1, 60, (24, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in drawn]


class Listening(hf.Trainer):
    """A Trainer that keeps every loss it computes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[float] = []

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **more)
        self.seen.append(loss.item())
        return (loss, outputs) if return_outputs else loss


def trainer(model: Any, folder: Path, steps: int, kind: type[Listening] = Listening, **settings: Any) -> Listening:
    settings = {"save_strategy": "no"} | settings
    args = hf.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, seed=3, use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no", **settings
    )  # fmt: skip
    return kind(model=model, args=args, train_dataset=texts())


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_losses_are_the_originals_step_for_step(tmp_path: Path) -> None:
    model = llama()
    before = weights(model)
    fast, plain = optimized(model), copy.deepcopy(model)
    ours, theirs = trainer(fast, tmp_path, 3), trainer(plain, tmp_path, 3)
    ours.train()
    theirs.train()
    assert len(ours.seen) == 6 and ours.seen == pytest.approx(theirs.seen, abs=1e-5)
    for name, tensor in fast.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], atol=2e-4, rtol=0)  # AdamW scales last places up
    assert same(weights(model), before) and not same(weights(fast), before)
    assert ours.evaluate(texts()[:4])["eval_loss"] == pytest.approx(theirs.evaluate(texts()[:4])["eval_loss"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["exact", "linear"])
def test_a_checkpoint_is_resumed(tmp_path: Path, recipe: str) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer(optimized(llama(), recipe), tmp_path, 4, **saving)
    whole.train()
    again = trainer(optimized(llama(), recipe), tmp_path / "again", 4, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.seen == whole.seen[4:]
    assert same(weights(again.model), weights(whole.model))


def test_a_state_dict_goes_to_disk_and_back(tmp_path: Path) -> None:
    fast = optimized(llama(), "linear")
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.add_(0.1)
    torch.save(fast.state_dict(), tmp_path / "weights.pt")
    other = optimized(llama(), "linear")
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    x = torch.randint(1, 60, (2, 12))
    assert torch.equal(other(x).logits, fast(x).logits)


class Balanced(Listening):
    """Adds the auxiliary losses of the call to the model's own."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **more)
        loss = loss + sum(self.accelerator.unwrap_model(model).losses().values())
        return (loss, outputs) if return_outputs else loss


def test_auxiliary_losses_reach_the_routers(tmp_path: Path) -> None:
    fast = optimized(llama(), MOH)
    before = {name: parameter.detach().clone() for name, parameter in fast.new_parameters()}
    assert list(before) == [f"model.layers.0.self_attn.reattend.moh.{n}" for n in ("w_router", "w_shared", "w_balance")]
    trainer(fast, tmp_path, 2, Balanced).train()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in fast.new_parameters())
    assert list(fast.losses()) == ["model.layers.0.self_attn.load_balance"]


def test_losses_alone_have_gradients() -> None:
    fast = optimized(llama(), MOH).train()
    fast(torch.randint(1, 60, (2, 12)))
    sum(fast.losses().values()).backward()
    routers = [parameter for name, parameter in fast.new_parameters() if name.endswith("w_router")]
    assert routers and all(parameter.grad.abs().sum() > 0 for parameter in routers)


def test_new_parameters_alone_are_trained() -> None:
    fast = optimized(llama(), MOH).train()
    fast.requires_grad_(False)
    new = [parameter.requires_grad_() for _, parameter in fast.new_parameters()]
    x = torch.randint(1, 60, (2, 12))
    before = weights(fast)
    (fast(x, labels=x).loss + sum(fast.losses().values())).backward()
    torch.optim.AdamW(new, lr=1e-2).step()
    changed = {name for name, tensor in fast.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, _ in fast.new_parameters()}
