"""`reattend heads`, `reattend plan`, `reattend plan-bits`: what heads do or layers cost, and a recipe that follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .answers import answers, working, write
from .cli_arguments import AsJson, ModelName
from .compiler.refusal import Refused

Measures = Annotated[str, typer.Option(help="names with commas: entropy,sink,distance,induction,echo,influence ...")]
Task = Annotated[str, typer.Option(help="inputs with known sources, for retrieval: passkey, pairs or copying")]
Length = Annotated[int, typer.Option(min=1, help="bytes of a task's inputs")]


def heads(
    model: ModelName,
    measures: Measures = "entropy,sink,distance",
    task: Task = "",
    length: Length = 512,
    out: Annotated[Path | None, typer.Option(help="write the table here (.csv, .json or .txt)")] = None,
    as_json: AsJson = False,
) -> None:
    """What each head does: a row a head, a column a measure."""
    with answers(as_json=as_json):
        if out is not None and out.suffix not in (".csv", ".json", ".txt"):
            raise Refused(f"--out {out}", fits=".csv, .json or .txt")
        found = _heads(model, measures.split(","), task, length, quiet=as_json)
        if out is not None:
            written = {".csv": found.csv, ".json": found.json, ".txt": found.text}[out.suffix]
            write(out, written().rstrip("\n") + "\n")
        print(found.json() if as_json else found.text())


def plan(
    model: ModelName,
    keep: Annotated[list[str], typer.Option("--heads", help="MEASURE=SHARE to keep; -MEASURE: the smallest; repeat")],
    out: Annotated[Path | None, typer.Option(help="write the recipe here")] = None,
    attention: Annotated[str, typer.Option(help="the mechanism of all other heads")] = "window",
    knobs: Annotated[list[str] | None, typer.Option("--set", help="a knob of it: window=64; repeat")] = None,
    task: Task = "",
    length: Length = 512,
) -> None:
    """Measure the heads and write a recipe: the kept ones stay, whole groups that share keys, all others change."""
    with answers():
        from . import api
        from .compiler.recipe_yaml import resolve

        shares = {name: _share(text, value) for text in keep for name, _, value in [text.partition("=")]}
        settings = {name: resolve(value) for name, _, value in (text.partition("=") for text in knobs or [])}
        table = _heads(model, [name.removeprefix("-") for name in shares], task, length, quiet=False)
        recipe = api.plan(table, shares, {attention: settings})
        if out is None:
            print(recipe.text(), end="")
        else:
            write(out, f"# heads of {model} kept by {', '.join(keep)}\n{recipe.text()}")
            print(f"wrote {out}: {len(recipe.rules)} of {len(table.sites)} sites change")


def plan_bits(
    model: ModelName,
    bits: Annotated[float, typer.Option(help="bits a weight on average, scales included")],
    schemes: Annotated[str, typer.Option(help="names with commas; groups as in w4a16:64")] = "w4a16,w8",
    data: Annotated[Path | None, typer.Option(help="calls to measure on, a JSON object a line")] = None,
    out: Annotated[Path | None, typer.Option(help="write the recipe here")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what each linear layer costs at fewer bits, and write the recipe that stays within a budget."""
    with answers(as_json=as_json):
        from . import api
        from .compiler.held_out import SAMPLES, calls_of
        from .models.load import load_model

        loaded = load_model(model)
        calls: Any = [kwargs for _, kwargs in calls_of(data, count=SAMPLES)] if data else loaded.example_inputs
        found = api.plan_bits(loaded.model, calls, bits=bits, schemes=[_scheme(text) for text in schemes.split(",")])
        print(json.dumps(found.to_dict(), indent=1) if as_json else found.text())
        if out is not None:
            write(out, f"# {model} at {found.bits:.2f} bits a weight\n{found.recipe.text()}")


def _scheme(text: str) -> Any:
    name, colon, group = text.strip().partition(":")
    if colon and not group.lstrip("-").isdigit():
        raise Refused(f"--schemes {text}", fits="w4a16:64: so many inputs a group")
    return {name: {"group_size": int(group)}} if colon else name


def _heads(model: str, measures: list[str], task: str, length: int, *, quiet: bool) -> Any:
    from . import api
    from .models.load import load_model
    from .models.training.recall_calls import recall_call

    loaded = load_model(model)
    inputs, sources = recall_call(task, length) if task else (loaded.example_inputs, ())
    work = lambda: api.heads(loaded.model, inputs, measures=measures, sources=sources, name=model)
    return working(f"looking at the heads of {model}", work, quiet=quiet)


def _share(text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise Refused(f"--heads {text}", fits="MEASURE=SHARE, as in induction=0.14") from None
