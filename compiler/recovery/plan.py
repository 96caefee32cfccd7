"""What a recovery is asked to do, as one value: what moves, for how long, by which losses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..refusal import Refused, nearest

TRAINS = ("new", "lora", "sites", "all")
RELATIONS = ("", "v1", "v2")
OUTPUTS = ("auto", "logits", "values")


@dataclass(frozen=True)
class Plan:
    """Two stages share the steps: each site alone on the teacher's inputs, then the whole model on its outputs."""

    train: str = "new"  # new tensors; lora: and low-rank deltas of the linears around sites; sites: those whole; all
    steps: int = 1000
    lr: float = 1e-3
    transfer: float = 0.5  # share of the steps spent on sites alone
    rank: int = 8
    batch: int | None = None  # calls that are stacked into one; None: as they come
    accumulate: int = 1  # calls a step
    kl: float = 1.0  # weight of the distance to the teacher's outputs
    ce: float = 0.0  # weight of the model's own loss, where the calls have labels
    temperature: float = 1.0
    relations: str = ""  # MiniLM's losses beside these: v1 (q with k, v with v) or v2 (q, k and v with themselves)
    relation_weight: float = 1.0
    relation_site: int = -1
    relation_heads: int = 0  # v2: heads that the width is split into again; 0: the site's own
    output: str = "auto"  # how outputs are compared: as logits (KL) or as values (relative square error)
    bfloat16: bool = False  # autocast while training; judging stays in the model's own dtype
    warmup: float = 0.05  # share of a stage
    floor: float = 0.1  # where the cosine of the learning rate ends, as a share of lr
    weight_decay: float = 0.0
    clip: float = 1.0
    every: int = 50  # steps between judgements; each is also a checkpoint
    patience: int = 0  # judgements without a new best until a stage ends; 0: none ends early
    merge: bool = True  # low-rank deltas become part of the weights at the end
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("train", TRAINS), ("relations", RELATIONS), ("output", OUTPUTS)):
            if getattr(self, name) not in known:
                raise Refused(f"{name}={getattr(self, name)!r}", where="recover", fits=", ".join(filter(None, known)))
        for name in ("steps", "rank", "accumulate", "every"):
            if getattr(self, name) < 1:
                raise Refused(f"{name}={getattr(self, name)}", where="recover", fits="at least 1")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise Refused(f"lr={self.lr}", where="recover", fits="a number above 0")
        if not 0 <= self.transfer <= 1:
            raise Refused(f"transfer={self.transfer}", where="recover", fits="a share of the steps, 0 to 1")
        if self.transfer < 1 and not (self.kl or self.ce or self.relations):
            raise Refused("kl=0, ce=0 and no relations", where="recover", fits="a loss for the second stage")

    @staticmethod
    def of(recipe: Any, given: Mapping[str, Any]) -> Plan:
        """A recipe's `recover` section, and what was given beside it, which wins."""
        known = [f.name for f in fields(Plan)]
        for name in given:
            if name not in known:
                raise Refused(f"{name}={given[name]!r}", where="recover", fits=nearest(name, known))
        asked = {} if recipe is None else {n: v for n, v in asdict(recipe).items() if v is not None}
        return Plan(**{**asked, **{n: v for n, v in given.items() if v is not None}})

    def split(self, *, sites: bool) -> tuple[int, int]:
        """The steps of both stages; without sites there is nothing to transfer."""
        first = round(self.steps * self.transfer) if sites else 0
        return first, self.steps - first

    def rate(self, step: int, steps: int) -> float:
        """The learning rate at a step of a stage: a short rise, then a cosine down to the floor."""
        rise = max(1, round(self.warmup * steps))
        if step < rise:
            return self.lr * (step + 1) / rise
        turn = math.cos(math.pi * (step - rise) / max(1, steps - rise))
        return self.lr * (self.floor + (1 - self.floor) * (1 + turn) / 2)
