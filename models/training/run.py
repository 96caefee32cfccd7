"""One resumable training run: a checkpoint every hundred steps, a log, two optimizers, and at the end the model.

What a step computes is the script's; a run that goes on from its checkpoint is the run that was never stopped.
"""

from __future__ import annotations

import json
import platform
import time
from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .muon import Muon


class Run(ABC):
    """A run in a folder: checkpoint.pt, log.jsonl, and in the end model/ with half-precision weights."""

    command: str  # what a reader types to do the same
    others_rate = 1.0  # of everything but the matrices in layers, as a share of their learning rate
    judge_every = 200

    def __init__(self, plan: Any, out: Path, model: Any, data: str = "") -> None:
        """`plan` is a dataclass with steps, lr and rate(step); `data` names what it was trained on."""
        self.plan, self.out, self.model, self.data = plan, out, model, data
        self.step, self.seconds = 0, 0.0
        layered = {n: p.ndim == 2 and "layers" in n for n, p in model.named_parameters()}
        matrices = [p for n, p in model.named_parameters() if layered[n]]
        others = [p for n, p in model.named_parameters() if not layered[n]]
        self.optimizers: dict[torch.optim.Optimizer, float] = {
            Muon(matrices, lr=plan.lr): 1.0,
            torch.optim.AdamW(others, lr=plan.lr, betas=(0.9, 0.95), weight_decay=0.0): self.others_rate,
        }
        self._resume()

    @abstractmethod
    def loss(self) -> Tensor:
        """Of the step that is due."""

    @abstractmethod
    def judged(self) -> dict[str, float]:
        """A few numbers for the log, on what is not trained on."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What training.json says beside the plan and the versions; the weights are those that were stored."""

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    @property
    def _of(self) -> dict[str, str]:
        """What a checkpoint must agree on: the plan and the data."""
        return {"plan": json.dumps(asdict(self.plan)), "data": self.data}

    def _resume(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        if not self.checkpoint.exists():
            return
        kept = torch.load(self.checkpoint, weights_only=True)
        for what, mine in self._of.items():
            if kept[what] != mine:
                raise SystemExit(f"{self.checkpoint} was trained by another {what}: choose another --out")
        self.step, self.seconds = kept["step"], kept["seconds"]
        self.model.load_state_dict(kept["model"])
        for optimizer, state in zip(self.optimizers, kept["optimizers"], strict=True):
            optimizer.load_state_dict(state)

    def keep(self) -> None:
        states = {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}
        part = self.checkpoint.with_suffix(".part")
        torch.save({"step": self.step, "seconds": self.seconds, **self._of, **states}, part)
        part.replace(self.checkpoint)

    def train(self) -> None:
        while self.step < self.plan.steps:
            began = time.monotonic()
            loss = self._one_step()
            self.seconds += time.monotonic() - began
            if self.step % 20 == 0:
                self._say(loss=loss, seconds=self.seconds)
            if self.step % 100 == 0:
                self.keep()
            if self.step % self.judge_every == 0:
                self._say(**self.judged())
        self.keep()

    def _one_step(self) -> float:
        loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, share in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.plan.lr * share * self.plan.rate(self.step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item()

    def _say(self, **values: float) -> None:
        line = json.dumps({"step": self.step, **{name: round(value, 4) for name, value in values.items()}})
        print(line, flush=True)
        with (self.out / "log.jsonl").open("a") as log:
            log.write(line + "\n")

    def finish(self) -> None:
        """The model as half-precision safetensors with its log, and how it came about."""
        folder = self.out / "model"
        self.model.half().save_pretrained(folder)
        self.model.float()
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        known = {"command": self.command, "plan": asdict(self.plan), "train_seconds": round(self.seconds)}
        (folder / "training.json").write_text(json.dumps(known | self.about() | versions, indent=1) + "\n")
        (folder / "log.jsonl").write_text((self.out / "log.jsonl").read_text() if self.step else "")
