"""Packages that not everybody has: opened, or refused with the command that brings them."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from ..compiler.refusal import Refused
from .vision_ops import declare_missing_vision_ops


def needed(package: str, extra: str) -> Any:
    declare_missing_vision_ops()  # before transformers and timm look for torchvision
    if importlib.util.find_spec(package) is None:
        raise Refused(f"{package} is not installed", fits=f"pip install '{extra}'")
    return importlib.import_module(package)
