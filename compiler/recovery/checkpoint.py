"""A recovery on disk: all that decides what comes next, in one file that is replaced whole, and a line a judgement."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..refusal import Refused
from .plan import Plan

FORMAT = "reattend recovery 1"


@dataclass
class State:
    """Where a run stands."""

    stage: int = 0
    step: int = 0  # of this stage
    total: int = 0  # of the run
    drawn: int = 0  # calls
    best: float = float("inf")  # of the held-out distance to the teacher, over the whole run
    best_at: int = 0
    stage_best: float = float("inf")  # of the stage's own measure
    stale: int = 0  # judgements since then
    seconds: float = 0.0
    done: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)


class Folder:
    """recovery.pt and log.jsonl of one run."""

    def __init__(self, path: str | Path, plan: Plan, data: str) -> None:
        self.path, self.plan, self.data = Path(path), plan, data
        self.path.mkdir(parents=True, exist_ok=True)

    @property
    def file(self) -> Path:
        return self.path / "recovery.pt"

    def write(self, state: State, tensors: Mapping[str, Any]) -> None:
        kept = {"format": FORMAT, "plan": asdict(self.plan), "data": self.data, "state": asdict(state), **tensors}
        part = self.file.with_suffix(".part")
        torch.save(kept, part)
        part.replace(self.file)

    def read(self) -> tuple[State, dict[str, Any]] | None:
        """What a run of the same plan on the same data left; another one is refused."""
        if not self.file.exists():
            return None
        try:
            kept = torch.load(self.file, weights_only=True, map_location="cpu")
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise Refused(str(error).splitlines()[0][:120], where=str(self.file), fits="another folder") from None
        if not isinstance(kept, dict) or kept.get("format") != FORMAT:
            raise Refused("no checkpoint of a recovery", where=str(self.file), fits="another folder")
        ours = asdict(self.plan)
        other = [f"{n}={kept['plan'].get(n)!r} there, {v!r} here" for n, v in ours.items() if kept["plan"].get(n) != v]
        if kept["data"] != self.data:
            other.append("other data")
        if other:
            raise Refused("; ".join(other), where=str(self.file), fits="the same plan to go on, or another folder")
        return State(**kept["state"]), kept

    def say(self, line: Mapping[str, Any]) -> None:
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")


def random_state() -> dict[str, Any]:
    """Of every generator that a forward can draw from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def written_buffers(model: Any) -> dict[str, Tensor]:
    """Buffers that training writes: running statistics, and those of mechanisms; none in eval()."""
    kept = set(model.state_dict()) if model.training else set()
    return {n: b.detach().clone() for n, b in model.named_buffers() if n in kept}
