"""A mechanism put into small real models: what the tests of single mechanisms share."""

from __future__ import annotations

from typing import Any

import torch

import reattend
from reattend.models.zoo import zoo


def swapped(family: str, rule: dict[str, Any], **more: Any) -> tuple[Any, torch.Tensor]:
    """The rewritten model, and its first output on the family's inputs."""
    model = zoo()[family]
    args, kwargs = model.inputs()
    recipe = {"version": 1, "sites": [{"match": "*", "attention": rule, **more}]}
    fast = reattend.optimize(model.build("sdpa").eval(), recipe, (args, kwargs), measure=False)
    found = fast(*args, **kwargs)
    return fast, found if isinstance(found, torch.Tensor) else found[0]


def assert_swapped(family: str, rule: dict[str, Any], tensors: set[str], *, idle: set[str] = frozenset()) -> None:  # type: ignore[assignment]
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
