"""A mechanism put into small real models: what the tests of single mechanisms share."""

from __future__ import annotations

from typing import Any

import torch

import reattend
from reattend.models.zoo import zoo
from reattend.models.zoo_family import Family, timm

PIXELS = timm("pixels", "vit_tiny_patch16_224", 1, size=48, img_size=48, depth=1, embed_dim=32, num_heads=4,
              class_token=False, global_pool="avg")  # fmt: skip


def swapped(family: str | Family, rule: dict[str, Any] | list[dict[str, Any]], **more: Any) -> tuple[Any, torch.Tensor]:
    """The rewritten model, and its first output on the family's inputs; several rules come as a recipe has them."""
    model = zoo()[family] if isinstance(family, str) else family
    args, kwargs = model.inputs()
    rules = rule if isinstance(rule, list) else [{"match": "*", "attention": rule, **more}]
    recipe = {"version": 1, "sites": rules}
    fast = reattend.optimize(model.build("sdpa").eval(), recipe, (args, kwargs), measure=False)
    found = fast(*args, **kwargs)
    return fast, found if isinstance(found, torch.Tensor) else found[0]


def assert_swapped(
    family: str | Family, rule: dict[str, Any], tensors: set[str], *, idle: set[str] = frozenset()
) -> None:  # type: ignore[assignment]
    """It runs, is finite, and every one of the mechanism's tensors, at all sites, gets a gradient (but `idle` ones)."""
    fast, output = swapped(family, rule)
    assert torch.isfinite(output).all()
    own = {name: t for name, t in fast.named_parameters() if ".reattend." in name}
    assert {name.rsplit(".", 1)[1] for name in own} == tensors
    output.square().sum().backward()
    for name, t in own.items():
        assert t.grad is not None, name
        assert torch.isfinite(t.grad).all(), name
        assert bool(t.grad.any()) or name.rsplit(".", 1)[1] in idle, name
