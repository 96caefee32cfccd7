"""What transformers says a query may see, as structure: causality, window, padding; a tensor only where it must be.

A mask function that is registered beside an attention function decides what reaches it: without one the causal mask is
lost silently. A model that does not hand its mask on to the attention function, but computes with it, is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

from ..compiler.refusal import Refused

FITS = "reattend.optimize(model, recipe), which reads any spelling of attention from the graph"


class NotRouted(Refused, AttributeError):
    """A model that computes with a mask which only an attention function understands."""


@dataclass(frozen=True, eq=False)
class Seen:
    """Query i sees key j, both counted from the start of the sequence."""

    causal: bool = False
    back: int | None = None  # the furthest key behind, i - j <= back
    ahead: int | None = None  # the furthest key ahead, j - i <= ahead
    padding: Tensor | None = None  # (B, keys from the start on), true where a key is real
    whole: Tensor | None = None  # (B, 1 | H, N, M): whatever else there is
    q_offset: int | Tensor | None = None  # the position of the first query; not told: the last is at the last key
    kv_offset: int | Tensor = 0  # of the first key

    def on(self, device: torch.device) -> Seen:
        """The same with its tensors on a device."""
        padding, whole = (None if t is None else t.to(device) for t in (self.padding, self.whole))
        return replace(self, padding=padding, whole=whole)

    # generate() makes the masks of a static cache itself and hands them through the model as they are

    ndim = 2

    def to(self, *_: Any, **__: Any) -> Seen:
        return self

    contiguous = to

    def __getattr__(self, wanted: str) -> NoReturn:
        if wanted.startswith("__"):
            raise AttributeError(wanted)
        _computed_with()

    def __getitem__(self, index: Any) -> NoReturn:
        _computed_with()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        _computed_with()


def _computed_with() -> NoReturn:
    found = "this model computes with its mask itself: it does not route attention through transformers' interface"
    raise NotRouted(found, where="attn_implementation", fits=FITS)


@torch.compiler.disable
def seen(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | Seen | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Seen:
    """The mask function of every `reattend:` name."""
    if isinstance(attention_mask, Seen):
        return attention_mask
    parts = list(_parts(mask_function))
    if None in parts:  # packed sequences, image blocks, masks of the user's own
        whole = masking_utils.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            allow_is_causal_skip=False, use_vmap=use_vmap, device=device,
        )  # fmt: skip
        return Seen(whole=whole, q_offset=q_offset, kv_offset=kv_offset)
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None and not is_tracing(padding) and bool(padding.all()):
        padding = None
    causal = any(part == "causal" for part in parts)
    backs = [part[0] for part in parts if isinstance(part, tuple) and part[0] is not None]
    aheads = [part[1] for part in parts if isinstance(part, tuple) and part[1] is not None]
    return Seen(causal, min(backs, default=None), min(aheads, default=None), padding, None, q_offset, kv_offset)


def _parts(function: Callable[..., Any]) -> Iterator[str | tuple[int | None, int | None] | None]:
    """A mask function taken apart: "causal", (furthest behind, furthest ahead), None for what is not known here."""
    if function is masking_utils.causal_mask_function:
        yield "causal"
    elif function is masking_utils.bidirectional_mask_function:
        yield (None, None)
    else:
        made_by = getattr(function, "__qualname__", "").partition(".")[0]
        inside = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
        if made_by == "and_masks":
            for part in inside["mask_functions"]:
                yield from _parts(part)
        elif made_by == "sliding_window_overlay":
            yield (inside["sliding_window"] - 1, None)
        elif made_by == "sliding_window_bidirectional_overlay":
            yield (inside["sliding_window"], inside["sliding_window"])
        else:
            yield None
