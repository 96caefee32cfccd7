"""`reattend heads` and `reattend plan`: what each head does, and a recipe that keeps some of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .answers import answers, working
from .cli_arguments import AsJson, ModelName
from .compiler.refusal import Refused

Measures = Annotated[str, typer.Option(help="names with commas: entropy,sink,distance,induction,echo,influence ...")]
Task = Annotated[str, typer.Option(help="inputs with known sources, for retrieval: passkey, pairs or copying")]
Length = Annotated[int, typer.Option(help="bytes of a task's inputs")]


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
            out.write_text(written().rstrip("\n") + "\n", encoding="utf-8")
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
            out.write_text(f"# heads of {model} kept by {', '.join(keep)}\n{recipe.text()}", encoding="utf-8")
            print(f"wrote {out}: {len(recipe.rules)} of {len(table.sites)} sites change")


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
