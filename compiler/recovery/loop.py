"""The loop: two stages of steps, judged on held-out calls, the best kept; what it does next depends on its state alone.

stage 1  each rewritten site alone, on the teacher's inputs      transfer.py
stage 2  the whole model, on the teacher's outputs               losses.py, relations.py
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from ..giving_way import ours
from ..held_out import Batch
from ..refusal import Refused
from ..taps import stream_groups
from .calls import Calls, refuse_judged, rows_of
from .checkpoint import Folder, State, random_state, set_random_state, written_buffers
from .finite import NotFinite, first_not_finite
from .losses import is_logits, output_loss, own_loss
from .pair import Pair, View
from .plan import Plan
from .relations import relation_loss
from .trained import Trained
from .transfer import SiteTransfer, stream_transfer, transfers

Judge = Callable[[Any], Mapping[str, float]]
STAGES = ("transfer", "distil")


class Run:
    """One recovery under way; `best` are the trained tensors that were judged best."""

    def __init__(
        self, pair: Pair, trained: Trained, calls: Calls, held_out: Sequence[Batch], plan: Plan, *,
        folder: Folder | None = None, judge: Judge | None = None, progress: bool = True,
    ) -> None:  # fmt: skip
        self.pair, self.trained, self.calls, self.held_out, self.plan = pair, trained, calls, held_out, plan
        self.folder, self.judge, self.progress = folder, judge, progress
        self.judged = rows_of(held_out)
        self.sites: dict[int, tuple[SiteTransfer, ...]] = {}
        self.state = State()
        self.best = trained.state()
        self.steps = plan.split(sites=bool(self._sites(pair.view(held_out[0]))))
        self.optimizer = self._optimizer()
        self.device = next(iter(trained.tensors.values())).device

    def train(self) -> None:
        """From the start, or from where the folder's run stands, to the end."""
        with self.trained.alone(), torch.random.fork_rng():
            torch.manual_seed(self.plan.seed)
            if not self._resumed():
                self._judge()
            began = time.monotonic() - self.state.seconds
            with tqdm(total=sum(self.steps), initial=self.state.total, disable=not self.progress) as bar:
                for loss in self._all_steps():
                    self.state.seconds = time.monotonic() - began
                    bar.update()
                    bar.set_postfix_str(self._shown(loss))
                    self._after_step(loss)
            self.state.done = True
            self._keep()

    # --- steps --------------------------------------------------------------------------------------------------------

    def _all_steps(self) -> Iterator[float]:
        while self.state.stage < len(STAGES):
            if self._over():
                self.state.stage += 1
                self.state.step, self.state.stale, self.state.stage_best = 0, 0, math.inf
                self.optimizer = self._optimizer()
                continue
            yield self._one_step()

    def _over(self) -> bool:
        state, patience = self.state, self.plan.patience
        return state.step >= self.steps[state.stage] or (patience > 0 and state.stale >= patience)

    def _one_step(self) -> float:
        state, plan = self.state, self.plan
        for group in self.optimizer.param_groups:
            group["lr"] = plan.rate(state.step, self.steps[state.stage])
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for _ in range(plan.accumulate):
            call = self.calls(state.drawn)
            refuse_judged(call, self.judged, f"data, call {state.drawn}")
            state.drawn += 1
            total += (self._transfer if state.stage == 0 else self._distil)(call) / plan.accumulate
        moving = [t for t in self.trained.tensors.values() if t.grad is not None]
        norm = nn.utils.clip_grad_norm_(moving, plan.clip or math.inf)
        if not torch.isfinite(norm):
            raise NotFinite(self._strange_gradient(), f"a gradient is {norm.item()}")
        self.optimizer.step()
        state.step += 1
        state.total += 1
        return total

    def _transfer(self, call: Batch) -> float:
        """Gradients of the mean over sites, each taken as soon as the site's values exist."""
        view = self.pair.view(call)
        sites, errors = self._sites(view), list[float]()

        def receive(path: str, loss: Tensor) -> None:
            if not torch.isfinite(loss):
                raise NotFinite(path, f"loss is {loss.item()}")
            errors.append(loss.item())
            if loss.requires_grad:  # graphs go with the loss; sites of one shared module share their deltas' graph
                (loss / (len(sites) * self.plan.accumulate)).backward(retain_graph=True)

        with self.trained.applied(), self._autocast():
            stream_transfer(self.pair, view, sites, call, receive, grad=True)
        return sum(errors) / len(errors)

    def _distil(self, call: Batch) -> float:
        args, kwargs = call
        with self._autocast():  # its graph is another one, and none can be made while weights are made of deltas
            ours(self.pair.student, "prepare")(*args, **kwargs)
        with self.trained.applied():
            with self._autocast():
                loss = self._with_relations(call) if self.plan.relations else self._outputs(call)
            if not torch.isfinite(loss):
                raise NotFinite(first_not_finite(self.pair.student, call), f"loss is {loss.item()}")
            if loss.requires_grad:
                (loss / self.plan.accumulate).backward()
        return loss.item()

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.bfloat16)

    def _outputs(self, call: Batch) -> Tensor:
        args, kwargs = call
        with torch.no_grad():
            expected = self.pair.teacher(*args, **kwargs)
        got = self.pair.student(*args, **kwargs)
        return self._distance(got, expected, call) + sum(ours(self.pair.student, "losses")().values())

    def _distance(self, got: Any, expected: Any, call: Batch) -> Tensor:
        plan = self.plan
        loss = plan.kl * output_loss(got, expected, call, plan.output, plan.temperature) if plan.kl else 0.0
        return loss + plan.ce * own_loss(got) if plan.ce else torch.as_tensor(loss)

    def _with_relations(self, call: Batch) -> Tensor:
        """Teacher and student with q, k and v of one site tapped on the way."""
        view = self.pair.view(call)
        reference, program = view.outcome.reference, view.outcome.program
        site = reference.sites[self.plan.relation_site]
        theirs: dict[str, Tensor] = {}
        ours: dict[str, Tensor] = {}
        asked, tensors = view.inputs(call, self.pair.teacher)
        group = {site.path: {n: reference.ports[site.path].nodes[n] for n in "qkv"}}
        flat = stream_groups(reference.graph, tensors, group, lambda path, values: theirs.update(values))
        taps: dict[str, fx.Node] = {n: program.ports[site.path].nodes[n] for n in "qkv"}
        got, losses = view.run_student(self.pair.student, call, taps, ours.__setitem__)
        loss = self._distance(got, view.captured.result(asked, flat), call) + sum(losses.values())
        padding = call[1].get("attention_mask")
        padding = padding if isinstance(padding, Tensor) and padding.shape == ours["q"].shape[::2] else None
        return loss + self.plan.relation_weight * relation_loss(
            ours, theirs, self.plan.relations, causal=site.causal, padding=padding, heads=self.plan.relation_heads
        )

    # --- judging and keeping ------------------------------------------------------------------------------------------

    def _after_step(self, loss: float) -> None:
        state = self.state
        ends = state.step >= self.steps[state.stage]
        if state.step % self.plan.every == 0 or ends:
            self._judge(loss)
            self._keep()

    def _judge(self, loss: float | None = None) -> None:
        """Held-out distance to the teacher, the sites' own errors in stage 1, and what the caller measures."""
        state = self.state
        first = state.stage == 0 and self.steps[0] > 0
        found: dict[str, Any] = {"step": state.total, "stage": STAGES[state.stage if self.steps[0] else 1]}
        found |= {} if loss is None else {"loss": loss}
        with judging(self.pair.student):
            for args, kwargs in self.held_out:
                ours(self.pair.student, "prepare")(*args, **kwargs)  # captures see the weights themselves
            with self.trained.applied():
                found |= self._measured(first)
        state.history.append(found)
        if self.folder is not None:
            self.folder.say(found)
        own = found["sites"] if first else found["held_out"]
        state.stale = 0 if own < state.stage_best else state.stale + 1
        state.stage_best = min(state.stage_best, own)
        if found["held_out"] < state.best:
            state.best, state.best_at = found["held_out"], state.total
            self.best = self.trained.state()

    def _measured(self, first: bool) -> dict[str, float]:
        found = self._held_out()
        found |= {"sites": self._site_error()} if first else {}
        asked = self.judge(self.pair.student) if self.judge is not None else {}
        return found | {name: float(value) for name, value in asked.items()}

    def _held_out(self) -> dict[str, float]:
        total, named = 0.0, dict[str, float]()
        for call in self.held_out:
            got, expected = (m(*call[0], **call[1]) for m in (self.pair.student, self.pair.teacher))
            distance = output_loss(got, expected, call, self.plan.output).item() / len(self.held_out)
            if not math.isfinite(distance):
                raise NotFinite(first_not_finite(self.pair.student, call), f"held-out distance is {distance}")
            name = "kl" if is_logits(got, self.plan.output) else "error"
            named[name] = named.get(name, 0.0) + distance
            total += (self.plan.kl or 1.0) * distance
            if self.plan.ce:
                named["ce"] = named.get("ce", 0.0) + own_loss(got).item() / len(self.held_out)
        return {"held_out": total + self.plan.ce * named.get("ce", 0.0), **named}

    def _site_error(self) -> float:
        errors = site_errors(self.pair, self.held_out, self._sites)
        return sum(errors.values()) / max(1, len(errors))

    def _shown(self, loss: float) -> str:
        last = self.state.history[-1] if self.state.history else {}
        said = {n: v for n, v in last.items() if n not in ("step", "stage", "loss", "held_out") and v is not None}
        shown = " ".join(f"{name} {value:.4g}" for name, value in said.items())
        return f"{STAGES[self.state.stage]} loss {loss:.4g} held out: {shown}"

    def _sites(self, view: View) -> tuple[SiteTransfer, ...]:
        if id(view) not in self.sites:
            learns = self.trained.touched
            self.sites[id(view)] = transfers(view.outcome, learns)
        return self.sites[id(view)]

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            list(self.trained.tensors.values()), lr=self.plan.lr, betas=(0.9, 0.99), weight_decay=self.plan.weight_decay
        )

    def _strange_gradient(self) -> str:
        wrong = (n for n, t in self.trained.tensors.items() if t.grad is not None and not torch.isfinite(t.grad).all())
        name = next(wrong, "")
        return name.partition(".reattend.")[0] if ".reattend." in name else name.partition("|")[0]

    def _keep(self) -> None:
        if self.folder is not None:
            self.folder.write(self.state, {
                "weights": self.weights, "tensors": self.trained.state(), "best": self.best,
                "optimizer": self.optimizer.state_dict(), "random": random_state(),
                "buffers": written_buffers(self.pair.student),
            })  # fmt: skip

    def _resumed(self) -> bool:
        self.weights = self.trained.digest() if self.folder is not None else ""
        found = self.folder.read() if self.folder is not None else None
        if found is None:
            return False
        self.state, kept = found
        self._same_weights(kept)
        self.trained.load(kept["tensors"])
        self.best = {n: t.to(self.best[n].device) for n, t in kept["best"].items()}
        self.optimizer.load_state_dict(kept["optimizer"])
        set_random_state(kept["random"])
        with torch.no_grad():
            buffers = dict(self.pair.student.named_buffers())
            for name, value in kept["buffers"].items():
                buffers[name].copy_(value)
        return True

    def _same_weights(self, kept: Mapping[str, Any]) -> None:
        if kept["weights"] != self.weights:
            fits = "the model as it was when that run began, or another folder"
            raise Refused("the run began from other weights", where=str(self.folder and self.folder.file), fits=fits)


def site_errors(
    pair: Pair, calls: Sequence[Batch], sites_of: Callable[[View], tuple[SiteTransfer, ...]]
) -> dict[str, float]:
    """Each rewritten site's relative square error on the teacher's inputs, a mean over calls."""
    found: dict[str, float] = {}

    def receive(path: str, error: Tensor) -> None:
        found[path] = found.get(path, 0.0) + error.item() / len(calls)

    for call in calls:
        view = pair.view(call)
        stream_transfer(pair, view, sites_of(view), call, receive, grad=False)
    return found


@contextmanager
def judging(student: Any) -> Iterator[None]:
    """In eval(), without gradients, random numbers and mode as they were afterwards."""
    modes = {module: module.training for module in student.modules()}
    student.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
