"""The door: optimize() and what one asks before it.

capture ─▶ raise sites ─▶ fold masks ─▶ decide by the recipe ─▶ rewrite, verified ─▶ lower ─▶ host in the model's class
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import codegen as codegen
from . import passes as passes
from .codegen.triton.ahead import Compiled
from .codegen.used import SHOWN, Used, built_in, must_be_targets, used_in
from .compiler.bench import Bench, measure
from .compiler.bits import BitPlan, Wish
from .compiler.bits import plan_bits as choose_bits
from .compiler.cascades.of_mechanism import mechanism_math
from .compiler.catalogue import mechanism_table as mechanism_table
from .compiler.check import check as check
from .compiler.devices import device_of
from .compiler.example_inputs import example_inputs as inferred_inputs
from .compiler.explaining import explained
from .compiler.explaining import math_of_sites as math_of_sites
from .compiler.explanation import Explanation
from .compiler.giving_way import ours
from .compiler.heads.interventions import intervened
from .compiler.heads.look import DEFAULT as DEFAULT_MEASURES
from .compiler.heads.look import Look, look
from .compiler.heads.losses import Loss
from .compiler.heads.plan import plan as plan
from .compiler.heads.reading import Reading
from .compiler.heads.repeats import Repeats
from .compiler.heads.table import HeadTable
from .compiler.held_out import as_batch, calibration, held_out
from .compiler.hosted import host
from .compiler.hosting import about, original
from .compiler.mechanism import Mechanism
from .compiler.mechanism import mechanisms as mechanisms
from .compiler.place import as_mechanism
from .compiler.preview import Preview, foresee
from .compiler.recipe import Recipe, guard
from .compiler.recipe_load import load_recipe
from .compiler.recovery.plan import Plan
from .compiler.recovery.recovering import Recovered
from .compiler.recovery.recovering import recover as run_recovery
from .compiler.refusal import Refused
from .compiler.report import NO_DATA
from .compiler.rewriting import Rewriting, model_facts
from .compiler.scaffold import new_mechanism as new_mechanism
from .compiler.shipping import routes as routes  # ships() and export() of a hosted model
from .compiler.shipping.saved import load as load_folder
from .compiler.shipping.saved import save as save
from .compiler.site import Site
from .compiler.sized import sized
from .compiler.stage_line import stage, stages_told
from .compiler.steps import vocabulary
from .compiler.timing import RUNS, timed
from .compiler.unwrap import name_of, unwrap
from .compiler.whole_or_islands import rewritten
from .models.hf_names import attn_implementation as attn_implementation
from .models.hf_names import register_names
from .models.on_meta import on_meta
from .models.quality.harness import judge_rows
from .models.quality.row import read as read_rows
from .models.quality.table import Quality
from .models.quality.task import Task
from .models.quality.tasks import task_for
from .models.quality.wish import wished

register_names()  # `attn_implementation="reattend:..."`, from the moment transformers is imported
log = logging.getLogger("reattend")
RecipeLike = str | Path | Mapping[str, Any] | Recipe
Inputs = tuple[Any, ...] | Mapping[str, Any] | tuple[tuple[Any, ...], Mapping[str, Any]] | None


def optimize(
    model: Any,
    recipe: RecipeLike = "exact",
    example_inputs: Inputs = None,
    *,
    data: Iterable[Inputs] | None = None,
    name: str = "",
    measure: bool = True,
    max_signatures: int = 8,
) -> Any:
    """The model rewritten by a recipe: still of its own class, with `.graph`, `.report` and `.sites`.

    recipe          a shipped name, a mechanism's, a path, YAML text, or the same as a dict.
    example_inputs  positional arguments, keyword arguments, or a pair of both. Left out they are inferred where that
                    runs; where it does not, the first call is captured, and refused if the recipe does not fit.
    data            held-out calls like example_inputs; without it quality is not judged, only correctness.
    name            what the report calls the model; left out: its config's name or its class.
    measure         whether both sides are timed on the example inputs (not in train()).
    max_signatures  how many kinds of calls get a graph of their own before a further one is refused.

    The original is left bit-identical; weights are shared until something would write them.
    """
    inner, notes = unwrap(model)
    wanted = load_recipe(recipe, vocabulary())
    guard(wanted, model_facts(inner))
    batches, described = held_out(wanted, data)
    _needs_data(wanted, batches)
    work = Rewriting.after(about(inner), wanted, name or name_of(inner), notes)
    work.batches, work.described = batches, described
    try:
        args, kwargs = _inputs(inner, example_inputs)
    except Refused as unknown:
        if example_inputs is not None:
            raise
        log.warning("captured at the first call: %s", unknown)
        return host(inner, work.program_for, about=work, limit=max_signatures)
    with stages_told(work.name):
        fast = rewritten(inner, work, args, kwargs, max_signatures)
        if measure and not inner.training:
            stage("measuring")
            ours(fast, "report").timing = timed(inner, fast, args, kwargs)
    for warning in ours(fast, "report").warnings:
        log.warning("%s", warning)
    log.info("%s", ours(fast, "report").verdict())
    return fast


def recover(
    fast: Any,
    data: Iterable[Inputs] | Callable[[int], Inputs] | None = None,
    *,
    held_out: Iterable[Inputs] | None = None,
    folder: str | Path | None = None,
    judge: Callable[[Any], Mapping[str, float]] | None = None,
    teacher: nn.Module | None = None,
    progress: bool = True,
    **plan: Any,
) -> Recovered:
    """Train back what a rewrite lost; the recipe's `recover` says how, and its bounds hold afterwards.

    data      calls like example_inputs, or a function that gives call number k; left out: the recipe's data.calibrate.
    held_out  calls to judge on; left out: optimize's data, else the last tenth of `data`. None may be trained on.
    folder    checkpoints and a log; the same call again goes on bit for bit where that run stopped.
    judge     what else to measure at each judgement: judge(fast) -> {"recall": 0.93}.
    teacher   the model to be like; left out: the original, from the weights that `fast` still shares with it.
    plan      train (new, lora, sites, all), steps, lr, transfer, rank, batch, accumulate, kl, ce, relations, bfloat16,
              every, patience, seed ...: compiler/recovery/plan.py
    """
    work = about(fast) if isinstance(fast, nn.Module) else None
    recipe = work.recipe if work is not None else Recipe()
    asked = Plan.of(recipe.recover, plan)
    if data is None:
        data = calibration(recipe)
    return run_recovery(fast, data, held_out, asked, folder=folder, judge=judge, teacher=teacher, progress=progress)


def bench(
    model: Any,
    recipe: RecipeLike = "exact",
    inputs: Inputs = None,
    *,
    compiled: bool = False,
    batch: int = 0,
    length: int = 0,
    dtype: torch.dtype | None = None,
    runs: int = RUNS,
    name: str = "",
) -> Bench:
    """The model before and after a recipe: deviation first, then time, rate, memory and the share of its sites.

    inputs          the call that is measured, like example_inputs of `optimize`.
    compiled        both sides through torch.compile.
    batch, length   the inputs repeated or cut to these sizes; dtype: a copy of the model in it.
    """
    inner, _ = unwrap(model)
    inner = original(inner)
    args, kwargs = sized(*_inputs(inner, inputs), batch=batch, length=length, dtype=dtype)
    if dtype is not None:
        inner = copy.deepcopy(inner).to(dtype)
    if inner.training:
        raise Refused("a model in train()", where="bench", fits="model.eval(): dropout makes every call another one")
    fast = optimize(inner, recipe, (args, kwargs), name=name, measure=False)
    report = ours(fast, "report")
    return measure(inner, fast, args, kwargs, model=report.model, recipe=report.recipe, compiled=compiled, runs=runs)


def preview(
    model_or_config: Any,
    recipe: RecipeLike,
    inputs: Inputs = None,
    *,
    tokens: int = 0,
    batch: int = 1,
    device: str | Mapping[str, Any] = "h100",
    dtype: torch.dtype | None = None,
    name: str = "",
) -> Preview:
    """FLOPs, bytes, peak memory, KV cache and roofline time before and after a recipe; nothing is run or loaded.

    model_or_config  a model, its weights on any device, or a Hugging Face config: up to shapes of 70 B parameters.
    inputs           one call like example_inputs of `optimize`; tokens, batch: repeated or cut to these sizes.
    device           h100, a100, cpu, or {"flops": ..., "bandwidth": ..., "memory": ...}.
    """
    given = isinstance(model_or_config, nn.Module)
    model = original(unwrap(model_or_config)[0]) if given else on_meta(model_or_config, dtype)
    args, kwargs = sized(*_inputs(model, inputs), batch=batch, length=tokens, dtype=dtype)
    if dtype is not None and given:
        model = copy.deepcopy(model).to(dtype)
    wanted = load_recipe(recipe, vocabulary())
    guard(wanted, model_facts(model))
    called = name or type(model).__name__
    return foresee(model, wanted, args, kwargs, device=device_of(device), name=called)


def heads(
    model: Any,
    inputs: Inputs | list[Inputs] = None,
    *,
    measures: Iterable[str] = DEFAULT_MEASURES,
    loss: Loss | None = None,
    mode: str = "uniform",
    sources: Iterable[tuple[int, int, int]] = (),
    repeats: Mapping[str, int] | None = None,
    window: int = 64,
    block: int = 16,
    name: str = "",
) -> HeadTable:
    """What each head does: one row a head, a column a measure; prints, and `.json()`, `.csv()`, `.ranked(measure)`.

    inputs    one call like example_inputs, or a list of them.
    measures  entropy, sink, distance; induction, echo (on repeated random tokens: repeats={"block": 64, "times": 4});
              retrieval (at `sources`: (sample, row, key) each); arank; influence (masking: `mode` "uniform" or "zero");
              far (gradients: what a `window` would cost, in blocks of `block` tokens).
    loss      of (output, arguments by name), for influence and far; else next token, `labels`, or the own choice.
    """
    inner = original(unwrap(model)[0])
    called = name or name_of(inner)
    how = Look(loss, mode, tuple(sources), Repeats(**(repeats or {})), window, block)
    return look(inner, _calls(inner, inputs), measures, how, called)


def plan_bits(
    model: Any, inputs: Inputs | list[Inputs] = None, *, bits: float, schemes: Iterable[Wish] = ("w4a16", "w8")
) -> BitPlan:
    """Which linear layers get how many bits, so many `bits` a weight on average (scales included), by what each costs.

    inputs   one call like example_inputs, or a list of them: the output's error is measured on these.
    schemes  what a layer may become, as recipes say it: "w8", {"w4a16": {"group_size": 64}}; to stay is always one.

    `.recipe` says it to optimize(), `.text()` is the table of errors, one layer at a time.
    """
    inner = original(unwrap(model)[0])
    return choose_bits(inner, _calls(inner, inputs), list(schemes), bits)


def intervene(
    model: Any,
    inputs: Inputs = None,
    *,
    scale: Mapping[str, Mapping[int, float]] | None = None,
    uniform: Mapping[str, Iterable[int]] | None = None,
    patch: tuple[Inputs, Mapping[str, Iterable[int]]] | None = None,
) -> Any:
    """The model's output with some heads changed; sites by path, heads by number.

    scale    {site: {head: factor}} on a head's output; 0 takes it out.
    uniform  {site: heads} attend equally to all that they may see.
    patch    (other inputs, {site: heads}): the heads' outputs on these other inputs are put in.
    """
    inner = original(unwrap(model)[0])
    args, kwargs = _inputs(inner, inputs)
    reading = Reading.of(inner, args, kwargs)
    put_in = None if patch is None else (_inputs(inner, patch[0]), patch[1])
    return intervened(reading, args, kwargs, scale=scale or {}, uniform=uniform or {}, patch=put_in)


def quality(
    model: Any,
    recipes: Any = (),
    *,
    every: bool = False,
    data: Iterable[Inputs] | str | Path | None = None,
    task: str | Task = "",
    out: str | Path | None = None,
    name: str = "",
    progress: bool | None = None,
) -> Quality:
    """How good a model still is after each recipe: a row each, beside the cost predicted and the time measured.

    model     a model, or the name of one: byte_lm, shapes_vit, minilm have tasks with held-out data of their own.
    recipes   one, several, or {"name of its row": recipe}; instead of a recipe a model that was optimized, and perhaps
              trained, already.
    every     also `exact`, and each registered mechanism at every site.
    data      calls that answers are compared on, for models without a task; or a file with one call a line.
    out       a folder: rows are kept there as soon as they are measured, and not measured again while they hold.
    """
    if isinstance(model, str):
        from .models.load import load_model

        loaded = load_model(model)
        model, name = loaded.model, name or loaded.name
    inner, _ = unwrap(model)
    if about(inner) is not None:
        fits = 'quality(original, {"name of its row": optimized})'
        raise Refused("an optimized model", where="quality", fits=fits)
    if inner.training:
        raise Refused("a model in train()", where="quality", fits="model.eval(): dropout makes every call another one")
    wishes = wished(recipes, every, vocabulary())
    chosen = task_for(inner, task, data)
    called = name or name_of(inner)
    work = lambda recipe, call: optimize(inner, recipe, call, name=called, measure=False)
    folder = None if out is None else Path(out)
    found = judge_rows(called, inner, chosen, wishes, work, out=folder, progress=progress)
    if folder is not None:
        found.write(folder)
    return found


def quality_plot(model: Any, rows: str | Path, *, name: str = "") -> str:
    """The rows that `quality(..., out=folder)` kept in a file, drawn against their cost."""
    found = tuple(read_rows(Path(rows)))
    if not found:
        raise Refused(f"{rows} holds no row", where="quality", fits="NAME.jsonl, as quality(..., out=folder) writes it")
    return Quality(name, "", task_for(unwrap(model)[0]).measures, {}, found).svg()


def load(folder: str | Path, model: nn.Module | str | None = None) -> Any:
    """A model that `save_pretrained` or `save` wrote: equal outputs, report and sites; further signatures by recipe.

    model  needed where transformers does not ship the class: an instance, or "module:factory" that makes one. Nothing
           that the folder names is ever imported or run.
    """
    from .models.load import load_model
    from .models.vision_ops import declare_missing_vision_ops

    declare_missing_vision_ops()  # before transformers looks for torchvision
    if isinstance(model, str):
        model = load_model(f"py:{model.removeprefix('py:')}").model
    return load_folder(folder, model)


def sites(model: Any, example_inputs: Inputs = None) -> tuple[Site, ...]:
    """Where a model attends, in order; empty where it does not."""
    return explain(model, example_inputs).sites


def explain(model: Any, example_inputs: Inputs = None) -> Explanation:
    """Sites with masks, ports and costs; each place that looks like attention and was not raised, with the reason."""
    inner, notes = unwrap(model)
    inner = original(inner)
    return explained(inner, *_inputs(inner, example_inputs), notes)


def kernels(model: Any, recipe: RecipeLike, example_inputs: Inputs = None, *, target: str = "cpu") -> tuple[Used, ...]:
    """The sources of the kernels that the rewritten model runs on a target: "cpu", "cuda:90", "hip:gfx942", ..."""
    must_be_targets([target], SHOWN)
    return used_in(_one_call(model, recipe, example_inputs), target)


def build(model: Any, recipe: RecipeLike, example_inputs: Inputs = None, *, target: str) -> tuple[Compiled, ...]:
    """Compile the kernels that the rewritten model runs for a GPU, there or not: its first call there finds them."""
    must_be_targets([target])
    return built_in(_one_call(model, recipe, example_inputs), target)


def _one_call(model: Any, recipe: RecipeLike, example_inputs: Inputs) -> Callable[[], Any]:
    """Of the rewritten model on its example inputs."""
    fast = optimize(model, recipe, example_inputs, measure=False)
    args, kwargs = _inputs(unwrap(model)[0], example_inputs)
    return lambda: fast(*args, **kwargs)


def math_of(chosen: str | Mechanism, *, causal: bool = False, **knobs: Any) -> str:
    """A mechanism's cascade: equations, why each barrier is soft or hard, passes, the loops that follow, LaTeX."""
    return mechanism_math(as_mechanism(chosen, **knobs), causal=causal)


def _needs_data(recipe: Recipe, batches: Sequence[Any]) -> None:
    if recipe.verify.needs_data and not batches:
        found = f"bounds {', '.join(recipe.verify.needs_data)} without data"
        fits = f"`data: {{verify: FILE}}` in the recipe or optimize(..., data=batches): {NO_DATA}"
        raise Refused(found, where=recipe.source or "recipe", fits=fits)


def _inputs(model: nn.Module, given: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return inferred_inputs(model) if given is None else as_batch(given)


def _calls(model: nn.Module, given: Inputs | list[Inputs]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """One call, or each of a list."""
    return [_inputs(model, one) for one in (given if isinstance(given, list) else [given])]
