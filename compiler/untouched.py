"""Leaving a model as it was: what a trace or a trial run changes on its modules is put back."""

from __future__ import annotations

import contextlib
import io
import logging
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Attributes, buffers, hooks and modes of all modules are put back, whatever happens inside."""
    before = [(m, dict(m.__dict__), _contents(m)) for m in model.modules()]
    try:
        with same_statistics(model):
            yield
    finally:
        for module, attributes, contents in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for held, inside in contents:
                held.clear()
                held.update(inside)


def _contents(module: nn.Module) -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
    return [(held, dict(held)) for held in module.__dict__.values() if type(held) in (dict, OrderedDict)]


@contextmanager
def same_statistics(model: nn.Module) -> Iterator[None]:
    """What runs in train() write into buffers, as batch norms do, is put back."""
    held = {id(t): t for m in model.modules() if m.training for t in m._buffers.values() if _written_in_place(t)}
    before = [(tensor, tensor.clone()) for tensor in held.values()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                if not torch.equal(tensor, value):  # batch_norm counts no versions; what is not written stays shared
                    tensor.copy_(value)


def _written_in_place(tensor: Tensor | None) -> TypeGuard[Tensor]:
    return type(tensor) is Tensor and not tensor.is_meta and not tensor.is_inference()


@contextmanager
def forgotten(model: nn.Module, names: set[str]) -> Iterator[None]:
    """Tensors that a forward keeps on its modules are not kept: while tracing they are fake."""
    before = [(path, m, dict(m.__dict__)) for path, m in model.named_modules()]
    yield
    for path, module, attributes in before:
        for name, value in list(module.__dict__.items()):
            if isinstance(value, Tensor) and attributes.get(name) is not value:
                names.add(f"{path}.{name}" if path else name)
                if name in attributes:
                    module.__dict__[name] = attributes[name]
                else:
                    del module.__dict__[name]


@contextmanager
def quiet() -> Iterator[None]:
    """torch.export logs each dimension that it fixes and prints the whole graph where it fails: not to be seen."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


_LOUD = ("torch._export.non_strict_utils", "torch.fx.experimental.symbolic_shapes")
