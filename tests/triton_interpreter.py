"""Triton's interpreter, mended where it is not ready for numpy 2.4 and where it takes bfloat16 for its bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

_patched = interpreter._patch_lang_tensor
_dot = interpreter.InterpreterBuilder.create_dot


def _first(tensor: Any) -> Any:
    return tensor.handle.data.reshape(-1)[0]


def _patch_lang_tensor(tensor: Any, *args: Any, **how: Any) -> Any:
    """numpy no longer takes an array of one element for a number."""
    scope = _patched(tensor, *args, **how)
    tensor.__index__ = lambda self: int(_first(self))
    tensor.__bool__ = lambda self: bool(_first(self)) if self.handle.data.size == 1 else True
    return scope


def _numbers(handle: Any) -> Any:
    if handle.dtype.scalar == tl.bfloat16:  # kept as its bits
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def _create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, most: Any) -> Any:
    if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
        return _dot(self, a, b, d, precision, most)
    product = np.matmul(_numbers(a), _numbers(b), dtype=np.float32)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


interpreter._patch_lang_tensor = _patch_lang_tensor
interpreter.InterpreterBuilder.create_dot = _create_dot
