"""Train the shipped byte model: `python -m reattend.models.training.language --out out/byte_lm` (resumes by itself)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..extras import needed
from .recall import TASKS, one_passkey, passkey
from .run import Run
from .text import SEPARATOR, Text, standard_library


@dataclass(frozen=True)
class Phase:
    """Steps before `until` see rows of `context` bytes, a share `tasks` of them recall; a passkey every `key` bytes."""

    until: int
    context: int
    tasks: float
    key: int = 256


@dataclass(frozen=True)
class Plan:
    """Everything that decides the weights, apart from the text.

    The rate falls twice: after the first time pairs and copies were learned and passkeys, too rare in the rows, were
    not; so the second stretch sees many of them.
    """

    steps: int = 1900
    tokens: int = 6144  # a step
    lr: float = 3e-3
    warmup: int = 60
    turn: int = 1600  # where the rate has fallen for the first time
    decay: int = 560  # steps over which it does
    again: float = 0.4  # of the rate, from where it falls a second time
    seed: int = 0
    phases: tuple[Phase, ...] = (
        Phase(192, 256, 0.60),
        Phase(880, 256, 0.35),
        Phase(1312, 1024, 0.35),
        Phase(1600, 2048, 0.35),
        Phase(1780, 512, 0.70, key=48),
        Phase(1900, 2048, 0.50, key=64),
    )

    def phase(self, step: int) -> Phase:
        return next(phase for phase in self.phases if step < phase.until or phase is self.phases[-1])

    def rate(self, step: int) -> float:
        if step < self.turn:
            return min(1.0, (step + 1) / self.warmup, max(0.02, (self.turn - step) / self.decay))
        return self.again * max(0.02, (self.steps - step) / (self.steps - self.turn))


def byte_llama() -> Any:
    """A random Llama over bytes: 6 layers, 8 heads on 4 key heads of size 32, 4.4 M parameters."""
    transformers = needed("transformers", "reattend[hf]")
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            bos_token_id=SEPARATOR,
            eos_token_id=SEPARATOR,
            pad_token_id=SEPARATOR,
            tie_word_embeddings=False,
        )
    )


def batch(plan: Plan, text: Text, step: int) -> tuple[Tensor, Tensor]:
    """Rows and weights of one step; they depend on the step and the seed alone, so that a resumed run is the same."""
    rng = np.random.default_rng((plan.seed, step))
    phase = plan.phase(step)
    rows, weights = [], []
    names = list(TASKS)
    for _ in range(plan.tokens // phase.context):
        if rng.random() < phase.tasks:
            task = TASKS[names[int(rng.integers(len(names)))]]
            sample = passkey(rng, text, phase.context, phase.key) if task is passkey else task(rng, text, phase.context)
            rows.append(sample.bytes)
            weights.append(sample.weight)
        else:
            rows.append(text.window(rng, phase.context))
            weights.append(np.ones(phase.context, np.float32))
    return torch.from_numpy(np.stack(rows).astype(np.int64)), torch.from_numpy(np.stack(weights))


def loss_of(model: nn.Module, rows: Tensor, weights: Tensor) -> Tensor:
    logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    each = F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none")
    weight = weights[:, 1:].flatten()
    return (each * weight).sum() / weight.sum()


@torch.no_grad()
def judged(model: nn.Module, held_out: Text, context: int) -> dict[str, float]:
    """Bits per byte on held-out text, and the share of passkeys answered whole, near and far."""
    model.eval()
    text = torch.from_numpy(held_out.windows(context, 16 * 2048 // context).astype(np.int64))
    found = {"bpb": _mean(loss_of(model, row[None], torch.ones_like(row[None]).float()) for row in text) / np.log(2)}
    for distance in (context // 4, context - 64):
        rng = np.random.default_rng(1)
        samples = [one_passkey(rng, held_out, context, distance) for _ in range(16)]
        rows = torch.from_numpy(np.stack([sample.bytes for sample in samples]).astype(np.int64))
        start = samples[0].answers[0].start
        guess = model(input_ids=rows, use_cache=False).logits[:, start - 1 : start + 4].argmax(-1)
        found[f"passkey_{distance}"] = (guess == rows[:, start : start + 5]).all(-1).float().mean().item()
    model.train()
    return found


def _mean(values: Iterator[Tensor]) -> float:
    return float(torch.stack(list(values)).mean())


class LanguageRun(Run):
    """The byte model, from random weights or from where its folder stands."""

    command = "python -m reattend.models.training.language"

    def __init__(self, plan: Plan, out: Path) -> None:
        torch.manual_seed(plan.seed)
        self.train_text, self.held_out = standard_library()
        super().__init__(plan, out, byte_llama(), self.train_text.sha256)
        self.compiled: Any = torch.compile(self.model, dynamic=False)

    def loss(self) -> Tensor:
        rows, weights = batch(self.plan, self.train_text, self.step)
        # compiled, the causal mask becomes a tensor: on long rows that costs more than compiling gains
        return loss_of(self.compiled if rows.shape[1] <= 256 else self.model, rows, weights)

    def judged(self) -> dict[str, float]:
        return judged(self.model, self.held_out, self.plan.phase(self.step).context)

    def about(self) -> dict[str, Any]:
        texts = {"text": self.train_text, "held_out": self.held_out}
        sizes = {f"{name}_bytes": len(text.bytes) for name, text in texts.items()}
        hashes = {f"{name}_sha256": text.sha256 for name, text in texts.items()}
        return {"judged": judged(self.model, self.held_out, self.plan.phases[-1].context), **sizes, **hashes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/byte_lm"))
    parser.add_argument("--steps", type=int, default=Plan.steps)
    given = parser.parse_args()
    run = LanguageRun(Plan(steps=given.steps), given.out)
    run.train()
    run.finish()


if __name__ == "__main__":
    main()
