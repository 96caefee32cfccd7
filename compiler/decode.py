"""Decoding token by token, derived from a mechanism's own forward.

One causal `attend(..., site=site)`: the keys that a later query can still reach, a ring where the predicate is a
window; the forward runs unchanged on the new queries and the kept keys, told where they stand. One causal `scan`: its
state. Everything else gives `state`, `prefill` and `step` itself or is refused: so may a region, whose rows are x.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .decode_derived import way_of
from .decode_ways import State, standing
from .mechanism import Mechanism
from .primitives.attend_spec import AttendSpec
from .refusal import Refused
from .site import Site


class Decoder:
    """One layer's attention, carried from token to token; q (B, H, n, D), k and v (B, Hkv, n, D), n new tokens.

    A region is given x (B, n, C) alone. Other ports of the new tokens are given by name, where a mechanism takes them.

    >>> import torch
    >>> from .mechanism import mechanism
    >>> from .problem import problem
    >>> site = Site("layer", 0, heads=4, kv_heads=2, dim=8, v_dim=8, scale=8**-0.5, pattern="causal-self")
    >>> decoder = Decoder(mechanism("window", window=3, sinks=1), site)
    >>> q, k, v = problem(20, kv_heads=2)
    >>> whole = decoder.prefill(q, k, v)
    >>> part = decoder.prefill(q[:, :, :9], k[:, :, :9], v[:, :, :9])
    >>> steps = [decoder.step(q[:, :, n : n + 1], k[:, :, n : n + 1], v[:, :, n : n + 1]) for n in range(9, 20)]
    >>> torch.allclose(torch.cat([part, *steps], 2), whole, atol=1e-5), decoder.state["k"].shape
    (True, torch.Size([2, 2, 3, 8]))
    """

    def __init__(
        self,
        mechanism: Mechanism,
        site: Site,
        *,
        params: Mapping[str, Tensor] = {},
        spec: AttendSpec | None = None,
        tables: Sequence[Tensor] = (),
    ) -> None:
        """`spec` and `tables`: the attention that stands at the site, its bias and padding; plain causal without."""
        self._at = standing(mechanism, site, params, spec, tables)
        self.way = way_of(self._at)
        self.state: State = {}
        self.seen = 0

    @property
    def state_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.state.values())

    def prefill(self, *rows: Tensor, **ports: Tensor) -> Tensor:
        """The first tokens of a sequence; what was there before is forgotten."""
        self.state, self.seen = {}, 0
        return self.step(*rows, **ports)

    def step(self, *rows: Tensor, **ports: Tensor) -> Tensor:
        """One or several tokens after those already seen."""
        region = self._at.mechanism.part == "region"
        counts = [t.shape[1 if region else 2] for t in rows]
        if len(counts) != (1 if region else 3) or len(set(counts)) != 1:
            found = ", ".join(f"{n} {what}" for n, what in zip(counts, ("queries", "keys", "values"), strict=False))
            fits = "x alone" if region else "the same new tokens of all three"
            raise Refused(found, where=str(self._at.site), fits=fits)
        o, self.state = self.way.run(self._at, self.state, self.seen, *rows, **ports)
        self.seen += counts[0]
        return o


def cache_for(fast: nn.Module) -> Any:
    """An empty transformers cache for an optimized model: `fast.generate(ids, past_key_values=cache_for(fast))`.

    Its layers keep a ring of keys, the state of a scan, or all keys, as the attention of each allows.
    """
    from .cache_for import cache_for as made  # transformers is needed here alone

    return made(fast)
