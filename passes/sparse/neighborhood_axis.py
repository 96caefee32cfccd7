"""One axis of a neighborhood: which keys are near a query, on numbers and on symbols alike.

Coordinates that are equal modulo the dilation form a group and see only one another; inside it they count a = x // d,
of length L. Every `stride` queries follow one leader p. Not causal: exactly w keys from clamp(p - w // 2, 0, L - w) on,
pushed inside at the borders, never shortened. Causal: b <= a and p - b < w, with the last of the stride as leader.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...compiler.symbols import Expr, build


@dataclass(frozen=True)
class Axis:
    size: int | None  # None: as many as there are keys
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def near(self, x: Any, y: Any, keys: Any) -> Any:
        """Whether key coordinate y is seen from query coordinate x."""
        group, a, b = x % self.dilation, x // self.dilation, y // self.dilation
        size = keys if self.size is None else self.size
        first, end = self.window_of(a, (size - group + self.dilation - 1) // self.dilation)
        inside = (b < end) & (first <= b) if self.window != self.size or self.causal or self.dilation > 1 else True
        return inside if self.dilation == 1 else (y % self.dilation == group) & inside

    def window_of(self, a: Any, length: Any) -> tuple[Any, Any]:
        """The first key of query a in its group of a length, and the one behind the last."""
        lead = self.stride - 1 if self.causal else self.stride // 2
        p = a if self.stride == 1 else _least(a // self.stride * self.stride + lead, length - 1)
        if self.causal:
            return p - (self.window - 1), a + 1
        first = _most(_least(p - self.window // 2, length - self.window), 0)
        return first, first + self.window

    def offset(self, x: Any, y: Any) -> Any:
        """Where a pair that is near stands in a table of 2 w - 1 biases."""
        return y // self.dilation - x // self.dilation + self.window - 1

    @property
    def far(self) -> int:
        """How far apart the coordinates of a query and a key can lie."""
        return (self.window - 1) * self.dilation


def _least(a: Any, b: Any) -> Any:
    return build("minimum", a, b) if isinstance(a, Expr) or isinstance(b, Expr) else min(a, b)


def _most(a: Any, b: Any) -> Any:
    return build("maximum", a, b) if isinstance(a, Expr) or isinstance(b, Expr) else max(a, b)
