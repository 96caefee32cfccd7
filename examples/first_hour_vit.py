"""The first hour with an image model: a ViT gets agent attention and goes on in one's own training loop.

python examples/first_hour_vit.py
"""

from __future__ import annotations

import torch

import reattend
from reattend.models.vision_ops import declare_missing_vision_ops

declare_missing_vision_ops()  # only where torchvision and torch are of different builds

import timm  # noqa: E402

RECIPE = {"version": 1, "sites": [{"match": {"layer": "1--1"}, "attention": {"agent": {"agent_num": 9}}}]}
STEPS = 6


def main() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=4)
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8) % 4

    fast = reattend.optimize(model.eval(), RECIPE, (images,)).train()
    print(fast.report)

    optimizer = torch.optim.AdamW(fast.parameters(), lr=1e-3)
    for step in range(STEPS):
        loss = torch.nn.functional.cross_entropy(fast(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {float(loss.detach()):.3f}")

    new = [name for name, _ in fast.named_parameters() if "reattend" in name]
    print(f"{type(fast).__name__} trained, with {len(new)} new tensors: {', '.join(new[:2])} ...")


if __name__ == "__main__":
    main()
