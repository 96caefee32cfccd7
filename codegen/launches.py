"""What a run would launch on a GPU that need not be there, and the bytes that must go through its memory for that.

Each operator of torch that is no view is one kernel, as torch runs without a compiler; a primitive is the kernels that
are generated for it, or the operators that run in their place. A kernel's bytes are those of the tensors that it is
given and makes, each element once: what caches cannot save.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..compiler.primitives.operator import Primitive, called
from .triton import NAME
from .triton.launching import recorded

_NONE = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})  # nothing is launched


@dataclass(frozen=True)
class Launched:
    """One kernel; `generated`: it stands in a primitive's place."""

    name: str
    bytes: int
    generated: bool = False


class Launches(TorchDispatchMode):
    """Notes the kernels of everything that runs inside, and lets it run."""

    def __init__(self, target: str = "cuda:90") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.target = target
        self.found: list[Launched] = []

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.found)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        primitive = called(func)
        if primitive is not None:
            return self._of(primitive, func, args)
        result = func(*args, **kwargs)
        name = str(func.overloadpacket).removeprefix("aten.")
        taken = _tensors((args, kwargs))
        made = _tensors(result)
        if name not in _NONE and not _is_view(func, taken, made):
            self.found.append(Launched(name, _bytes([*taken, *made])))
        return result

    def _of(self, primitive: Primitive, func: Any, args: Any) -> Any:
        """The primitive's kernels on the target; its results are those of this machine."""
        *tensors, text = args
        groups = [a if isinstance(a, list | tuple) else [a] for a in tensors]
        kernel, _ = primitive.choose(groups, text, device="cuda")
        if kernel is None or kernel.name != NAME:
            with self:
                return (kernel.run if kernel else primitive.meaning)(groups, text)
        with recorded(self.target) as launches, self:
            kernel.run(groups, text)
        for _, name, _, given in launches:
            bytes_ = _bytes(t for t in given.values() if isinstance(t, Tensor))
            self.found.append(Launched(f"{primitive.name}: {name}", bytes_, generated=True))
        return func(*args)


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _is_view(func: Any, taken: Iterable[Tensor], made: list[Tensor]) -> bool:
    """Whether what comes out is memory that went in, and nothing was written to it."""
    if func._schema.is_mutable or not made:
        return False
    memory = {t.untyped_storage()._cdata for t in taken}
    return all(t.untyped_storage()._cdata in memory for t in made)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of all elements, those that stand at one address once."""
    total = 0
    for t in {(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()): t for t in tensors}.values():
        sizes = [size for size, step in zip(t.shape, t.stride(), strict=True) if step]
        total += int(torch.Size(sizes).numel()) * t.element_size()
    return total
