"""Image tokens also see the question behind them, everything else stays causal (AKI's MMA, arXiv 2503.02597)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...compiler.functional import attention
from ...compiler.mechanism import Limit, Mechanism, register
from ...compiler.primitives.attend import attend
from ...compiler.problem import problem
from ...compiler.refusal import Refused
from ...compiler.site import Site
from ...compiler.symbols import table


@register("mma")
@dataclass(frozen=True)
class Mma(Mechanism):
    """j <= i, or image_start <= i < image_end and image_end <= j < text_end: softmax over these keys.

    Tokens are counted from 0 and the ends are exclusive. The spans are those of every row of a batch, unless ports of
    these names (B,) give each row its own. Image tokens
    see one another causally as before, answer tokens (from text_end on) are seen by no image token. With text_end =
    image_end, as it starts, it is causal attention. Image rows look ahead on purpose; decoding behind the question is
    plain causal.

    >>> q, k, v = problem(6)
    >>> o = attention(q, k, v, "mma", causal=True, image_start=1, image_end=3, text_end=5)
    >>> two = attention(q[:, :, 2:3], k[:, :, :5], v[:, :, :5], "softmax")  # what an image token sees
    >>> bool((o[:, :, 2:3] - two).abs().max() < 1e-6)
    True
    """

    image_start: int = 0
    image_end: int = 0
    text_end: int = 0

    part = "core"
    kind = "needs recovery"
    honours = {"padding"}
    paper = "arXiv 2503.02597"

    def __post_init__(self) -> None:
        if not 0 <= self.image_start <= self.image_end <= self.text_end:
            found = f"image_start={self.image_start}, image_end={self.image_end}, text_end={self.text_end}"
            raise Refused(found, where="mma", fits="0 <= image_start <= image_end <= text_end")

    def fits(self, site: Site) -> str | None:
        if site.pattern != "causal-self":
            return f"mma widens plain causal self-attention, this site is {site.pattern}"
        if site.keys.isdigit() and int(site.keys) < self.text_end:
            return f"text_end={self.text_end}, this site has {site.keys} tokens"
        return None

    def seen(self, i: Any, j: Any, start: Any = None, end: Any = None, text: Any = None) -> Any:
        start = self.image_start if start is None else start
        end, text = self.image_end if end is None else end, self.text_end if text is None else text
        return (j <= i) | ((i >= start) & (i < end) & (j >= end) & (j < text))

    def forward(
        self,
        site: Any,
        p: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding: Tensor | None = None,
        image_start: Tensor | None = None,
        image_end: Tensor | None = None,
        text_end: Tensor | None = None,
    ) -> Tensor:
        """The site's own mask can only be narrowed, so this stands without it; the last query is at the last key."""
        spans = [None if each is None else table(each) for each in (image_start, image_end, text_end)]
        real = None if key_padding is None else table(key_padding)

        def keep(b: Any, i: Any, j: Any) -> Any:
            seen = self.seen(i, j, *(None if each is None else each[b] for each in spans))
            return seen if real is None else seen & (real[b, j] != 0)

        o: Tensor = attend(q, k, v, keep=keep, scale=site.scale, align="end")
        return o

    def limits(self) -> Iterable[Limit]:
        q, k, v = problem(8)
        m, softmax = Mma(1, 4, 6), attention(q, k, v, "softmax", causal=True)
        without = lambda: attention(q, k, v, Mma(1, 4, 4), causal=True)
        yield Limit("without a question it is causal", without, lambda: softmax)
        for rows, name in ((slice(0, 1), "before the image"), (slice(4, 8), "behind the image")):
            yield Limit(f"rows {name} are causal",
                        lambda r=rows: attention(q, k, v, m, causal=True)[:, :, r],  # type: ignore[misc]
                        lambda r=rows: softmax[:, :, r])  # type: ignore[misc]  # fmt: skip
