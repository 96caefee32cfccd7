"""The probe of copying heads: one block of random tokens, over and over (RazorAttention)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..refusal import Refused
from ..signature import Call, forward_signature

LONGEST = 64  # tokens of a block where nothing is said; the paper takes 2,500


@dataclass(frozen=True)
class Repeats:
    """`times` copies of a block of `block` random tokens (0: what the model's context allows, at most 64)."""

    block: int = 0
    times: int = 4
    samples: int = 2
    seed: int = 0

    def ids(self, vocabulary: int, context: int | None = None) -> Tensor:
        """(samples, block * times) token ids."""
        if self.times < 2 or self.block < 0:
            raise Refused(f"{self.times} copies of {self.block} tokens", where="repeats", fits="2 copies or more")
        block = self.block or min(LONGEST, (context or LONGEST * self.times) // self.times)
        if context is not None and block * self.times > context:
            found = f"{self.times} copies of {block} tokens in a context of {context}"
            raise Refused(found, where="repeats", fits=f"blocks of {context // self.times}")
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(vocabulary, (self.samples, block), generator=generator).repeat(1, self.times)


def probe_call(
    model: nn.Module, batch: tuple[Sequence[Any], Mapping[str, Any]], probe: Repeats
) -> tuple[dict[str, Any], int]:
    """The arguments of a call on repeated tokens in place of the given ones, and the length of a block."""
    values = Call.of(forward_signature(model), *batch).values
    name = "input_ids" if "input_ids" in values else next((n for n, v in values.items() if _tokens(v)), None)
    if name is None or not _tokens(values[name]):
        found = f"a call with {', '.join(values) or 'nothing'}"
        raise Refused(found, where="induction and echo", fits="a model of token ids (B, N)")
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None) or int(values[name].max()) + 1
    context = getattr(config, "max_position_embeddings", None)
    ids = probe.ids(vocabulary, context).to(values[name].device)
    return {name: ids}, ids.shape[1] // probe.times


def _tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.long, torch.int32) and value.ndim == 2
