"""Train the shipped vision transformer: `python -m reattend.models.training.vision --out out/shapes_vit` (resumes)."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..extras import needed
from .images import CLASSES, SIZE, pictures
from .run import Run

PATCH = 4  # pixels a side: 256 patches a picture
TEST_SEED = 1_000_003  # pictures that no training run sees
TEST_PICTURES = 2400


@dataclass(frozen=True)
class Phase:
    """Steps before `until` see `patches` of a picture's 256, those that stand out."""

    until: int
    patches: int


@dataclass(frozen=True)
class Plan:
    """Everything that decides the weights."""

    pictures: int = 64  # a step
    lr: float = 3e-3  # of matrices in layers; of everything else a third
    rates: tuple[tuple[int, float], ...] = (  # of lr; the second rise is for whole pictures
        (0, 0.025), (39, 1.0), (480, 1.0), (793, 0.021875), (794, 0.02), (800, 0.02), (815, 0.5), (940, 0.02),
    )  # fmt: skip
    phases: tuple[Phase, ...] = (Phase(672, 64), Phase(760, 128), Phase(940, 256))
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.phases[-1].until

    def phase(self, step: int) -> Phase:
        return next(phase for phase in self.phases if step < phase.until or phase is self.phases[-1])

    def rate(self, step: int) -> float:
        """The factor on lr, straight between the given steps."""
        steps, factors = [at for at, _ in self.rates], [factor for _, factor in self.rates]
        return float(np.interp(step, steps, factors))


def shapes_vit() -> Any:
    """An untrained ViT for the named pictures: 6 layers, 4 heads of size 32, 256 patches and a class token, 1.2 M."""
    transformers = needed("transformers", "reattend[hf]")
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=PATCH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            id2label=dict(enumerate(CLASSES)),
            label2id={name: number for number, name in enumerate(CLASSES)},
        )
    )
    with torch.no_grad():  # learned like all else, but from waves on: random ones tell no places apart for long
        model.vit.embeddings.position_embeddings[0, 1:] = _waves(SIZE // PATCH, 128)
    return model


def _waves(side: int, width: int) -> Tensor:
    """(side * side, width): sines and cosines of row and column, wavelengths from 2 pi patches up."""
    rates = torch.logspace(0, -1.5, width // 4)
    angles = torch.arange(side)[:, None] * rates  # (side, width / 4)
    one = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = one[:, None].expand(side, side, -1), one[None].expand(side, side, -1)
    return 0.15 * torch.cat([rows, columns], 2).flatten(0, 1)


def batch(plan: Plan, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, classes and the patches to look at; all depend on the step and the seed alone."""
    images, labels = pictures(plan.seed, step * plan.pictures, plan.pictures)
    chance = np.random.default_rng((plan.seed, step, 1)).random((plan.pictures, (SIZE // PATCH) ** 2))
    order = np.argsort(-standing_out(images) - 0.3 * chance, axis=1, kind="stable")
    kept = np.sort(order[:, : plan.phase(step).patches], axis=1)
    return torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(kept)


def standing_out(images: np.ndarray) -> np.ndarray:
    """How far each patch is from the ground under even light, (B, patches): most of a picture tells nothing."""
    side = SIZE // PATCH
    level = images.reshape(len(images), 3, side, PATCH, side, PATCH).mean((3, 5)).reshape(len(images), 3, -1)
    y, x = np.mgrid[0:side, 0:side].reshape(2, -1) / side
    slopes = np.linalg.qr(np.stack([np.ones_like(x), x, y], 1))[0].astype(np.float32)
    even = level - level @ slopes @ slopes.T
    found: np.ndarray = np.abs(even - np.median(even, axis=2, keepdims=True)).sum(1)
    return found


def logits_of(model: Any, images: Tensor, kept: Tensor) -> Tensor:
    """The model on some of each picture's patches: the others are dropped, not blackened, and cost nothing."""
    hidden = model.vit.embeddings(images)  # (B, 1 + patches, C), each with its position added
    places = torch.cat([torch.zeros_like(kept[:, :1]), kept + 1], dim=1)
    hidden = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
    for layer in model.vit.layers:
        hidden = layer(hidden, None)
    return model.classifier(model.vit.layernorm(hidden)[:, 0])


@torch.no_grad()
def accuracy(model: Any, count: int = TEST_PICTURES) -> dict[str, float]:
    """The share of test pictures named rightly, over all and for each class."""
    model.eval()
    right = []
    names = []
    for first in range(0, count, 48):
        images, labels = pictures(TEST_SEED, first, min(48, count - first))
        guesses = model(pixel_values=torch.from_numpy(images)).logits.argmax(-1).numpy()
        right.append(guesses == labels)
        names.append(labels)
    model.train()
    hit, named = np.concatenate(right), np.concatenate(names)
    each = {name: float(hit[named == label].mean()) for label, name in enumerate(CLASSES) if (named == label).any()}
    return {"accuracy": float(hit.mean()), **each}


class VisionRun(Run):
    """The vision transformer, from random weights or from where its folder stands."""

    command = "python -m reattend.models.training.vision"
    others_rate = 1 / 3

    def __init__(self, plan: Plan, out: Path) -> None:
        torch.manual_seed(plan.seed)
        super().__init__(plan, out, shapes_vit().train())

    def loss(self) -> Tensor:
        images, labels, kept = batch(self.plan, self.step)
        return F.cross_entropy(logits_of(self.model, images, kept), labels)

    def judged(self) -> dict[str, float]:
        return {"accuracy": accuracy(self.model, 240)["accuracy"]}

    def about(self) -> dict[str, Any]:
        found = accuracy(self.model)
        return {
            "pictures_seen": self.plan.steps * self.plan.pictures,
            "test": {"seed": TEST_SEED, "pictures": TEST_PICTURES},
            "test_accuracy": round(found.pop("accuracy"), 4),
            "test_accuracy_by_class": {name: round(value, 3) for name, value in found.items()},
            "numpy": np.__version__,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/shapes_vit"))
    run = VisionRun(Plan(), parser.parse_args().out)
    run.train()
    run.finish()


if __name__ == "__main__":
    main()
