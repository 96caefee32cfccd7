"""Triton's interpreter, mended where it is not ready for numpy 2.4 and where it takes bfloat16 for its bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

_patched = interpreter._patch_lang_tensor
_dot = interpreter.InterpreterBuilder.create_dot
_cast = interpreter.InterpreterBuilder.cast_impl


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


def _bits(numbers: Any) -> Any:
    """The nearest bfloat16 of each, the even one of two; what is no number stays none."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(numbers), 0x7FC0, rounded).astype(np.uint16)


def _cast_impl(self: Any, handle: Any, kind: Any) -> Any:
    """Through numbers, where the interpreter cuts their bits off or takes them for an integer."""
    if tl.bfloat16 not in (handle.dtype.scalar, kind.scalar) or handle.dtype.scalar == kind.scalar:
        return _cast(self, handle, kind)
    numbers = _numbers(handle)
    if kind.scalar == tl.bfloat16:
        return interpreter.TensorHandle(_bits(numbers), tl.bfloat16)
    return interpreter.TensorHandle(numbers.astype(interpreter._get_np_dtype(kind)), kind.scalar)


def _create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, most: Any) -> Any:
    if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
        return _dot(self, a, b, d, precision, most)
    product = np.matmul(_numbers(a), _numbers(b), dtype=np.float32)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


interpreter._patch_lang_tensor = _patch_lang_tensor
interpreter.InterpreterBuilder.create_dot = _create_dot
interpreter.InterpreterBuilder.cast_impl = _cast_impl
