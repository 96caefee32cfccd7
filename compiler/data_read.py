"""While tracing, `x.data` is what `x.detach()` is: torch.export takes the first for a constant that it cannot keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_READ = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class DataAsDetached(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func == _READ:  # made anew at each access, so that it is never the same object
            return args[0].detach()
        return func(*args, **(kwargs or {}))
