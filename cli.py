"""The command line: the functions of `import reattend`, models named by text. Exit 0: fine, 1: yours, 2: ours."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .answers import Commands
from .answers import answers as _answers
from .answers import working as _working
from .answers import write as _write
from .cli_arguments import AsJson, ModelName, RecipeName
from .cli_heads import heads, plan, plan_bits
from .cli_report import report
from .compiler.giving_way import ours
from .compiler.refusal import Refused, nearest

app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)
recipes = typer.Typer(no_args_is_help=True, help="Recipes: check one, list the shipped ones, print the JSON Schema.")
app.add_typer(recipes, name="recipe")
for command in (report, heads, plan, plan_bits):
    app.command()(command)


@app.callback(help=__doc__)
def with_mechanisms(
    own: Annotated[
        list[Path] | None, typer.Option("--with", metavar="FILE.py", help="mechanisms of your own; may be repeated")
    ] = None,
) -> None:
    with _answers():
        if own:
            from .compiler.named import registered_by

            for path in own:
                registered_by(path)


@app.command()
def sites(model: ModelName, as_json: AsJson = False) -> None:
    """Where a model attends: one line a site, then what looked like attention and was not raised."""
    with _answers(as_json=as_json):
        from . import api
        from .models.load import load_model

        loaded = load_model(model)
        found = _working(f"capturing {model}", lambda: api.explain(loaded.model, loaded.example_inputs), quiet=as_json)
        if as_json:
            print(json.dumps({"sites": [json.loads(s.to_json()) for s in found.sites], "misses": found.misses}))
        else:
            print(found.brief())


@app.command()
def explain(
    model: ModelName,
    site: Annotated[str, typer.Option(help="one site's path")] = "",
    math: Annotated[
        bool, typer.Option("--math", help="equations, passes, barriers, loops, LaTeX; MODEL may name a mechanism")
    ] = False,
    causal: Annotated[bool, typer.Option("--causal", help="with --math: the mechanism on a causal site")] = False,
    as_json: AsJson = False,
) -> None:
    """What was tried at each place that looks like attention: the site with its mask and ports, or the nearest miss."""
    with _answers(as_json=as_json):
        from . import api
        from .models.load import built_ins, load_model

        known = {**api.mechanisms(), **built_ins()} if math else {}
        if math and ":" not in model and model not in known:
            fits = nearest(model, known, kind="mechanisms and models")
            raise Refused(f"{model!r}", where="explain --math", fits=fits)
        if math and model in api.mechanisms():
            told = api.math_of(model, causal=causal)
            print(json.dumps({model: told}) if as_json else told)
            return
        if causal:
            raise Refused("--causal", fits="explain SLUG --math --causal: a site of a model knows whether it is causal")
        loaded = load_model(model)
        found = _working(f"capturing {model}", lambda: api.explain(loaded.model, loaded.example_inputs), quiet=as_json)
        if math:
            every = api.math_of_sites(found, site)
            print(json.dumps(every) if as_json else "\n\n".join(f"{path}\n{text}" for path, text in every.items()))
            return
        print(json.dumps(found.to_dict()) if as_json else found.text(site))


@app.command()
def optimize(
    model: ModelName,
    recipe: RecipeName,
    report: Annotated[Path | None, typer.Option(help="write the report here (.html, .json or .txt)")] = None,
    graph: Annotated[Path | None, typer.Option(help="write the rewritten graph's code here")] = None,
    save: Annotated[Path | None, typer.Option(help="write the rewritten model to this folder")] = None,
    as_json: AsJson = False,
) -> None:
    """Rewrite a model by a recipe and say what changed."""
    with _answers(as_json=as_json):
        from . import api
        from .models.load import load_model

        if report is not None and report.suffix not in (".html", ".json", ".txt"):
            raise Refused(f"--report {report}", fits=".html, .json or .txt")
        loaded = load_model(model)
        work = lambda: api.optimize(loaded.model, recipe, loaded.example_inputs, name=loaded.name)
        fast = _working(f"optimizing {model}", work, quiet=as_json)
        if report is not None:
            ours(fast, "report").write(report)
        if graph is not None:
            _write(graph, ours(fast, "graph").code)
        if save is not None:
            api.save(fast, save)
        print(json.dumps(ours(fast, "report").to_dict()) if as_json else ours(fast, "report").text())
        for path in (report, graph, save):
            if path is not None and not as_json:
                print(f"\nwrote {path}")


@app.command()
def ships(model: ModelName, recipe: RecipeName, as_json: AsJson = False) -> None:
    """How a rewritten model can leave the process: one line a route, with the reason for each no."""
    with _answers(as_json=as_json):
        from . import api
        from .models.load import load_model

        loaded = load_model(model)
        work = lambda: api.optimize(loaded.model, recipe, loaded.example_inputs, name=loaded.name, measure=False)
        found = _working(f"optimizing {model}", work, quiet=as_json).ships()
        print(json.dumps(found.to_dict()) if as_json else found)


@app.command()
def recover(
    model: ModelName,
    recipe: RecipeName,
    data: Annotated[Path | None, typer.Option(help="calls to learn from, one a line; else the recipe's")] = None,
    held_out: Annotated[Path | None, typer.Option(help="calls to judge on; else the recipe's, or a tenth")] = None,
    save: Annotated[Path | None, typer.Option(help="write the recovered model to this folder")] = None,
    folder: Annotated[Path | None, typer.Option(help="checkpoints: the same command goes on where it stopped")] = None,
    train: Annotated[str, typer.Option(help="new, lora, sites or all; empty: as the recipe says")] = "",
    steps: Annotated[int, typer.Option(min=0, help="optimizer steps; 0: as the recipe says")] = 0,
    lr: Annotated[float, typer.Option(help="learning rate; 0: as the recipe says")] = 0.0,
    rank: Annotated[int, typer.Option(min=0, help="of low-rank deltas; 0: as the recipe says")] = 0,
    batch: Annotated[int, typer.Option(min=0, help="lines stacked into one call; 0: as the recipe says")] = 0,
    as_json: AsJson = False,
) -> None:
    """Rewrite a model and train back what that lost, the original as the teacher."""
    with _answers(as_json=as_json):
        from . import api
        from .compiler.held_out import calibration, calls_of
        from .compiler.recipe_load import load_recipe
        from .compiler.recovery.plan import Plan
        from .compiler.steps import vocabulary
        from .models.load import load_model

        asked: dict[str, Any] = {"train": train, "steps": steps, "lr": lr, "rank": rank, "batch": batch}
        asked = {setting: value or None for setting, value in asked.items()}
        wanted = load_recipe(recipe, vocabulary())
        Plan.of(wanted.recover, asked)  # what is amiss in files and settings is said before any work
        lessons = calls_of(data) if data else calibration(wanted)
        judged = calls_of(held_out) if held_out else None
        loaded = load_model(model)
        work = lambda: api.optimize(loaded.model, wanted, loaded.example_inputs, name=loaded.name, measure=False)
        fast = _working(f"optimizing {model}", work, quiet=as_json)
        found = api.recover(fast, lessons, held_out=judged, folder=folder, progress=not as_json, **asked)
        if save is not None:
            api.save(fast, save)
        print(json.dumps(found.to_dict()) if as_json else f"{found}\n{ours(fast, 'report').verdict()}")
        if save is not None and not as_json:
            print(f"\nwrote {save}")


@app.command()
def bench(
    model: ModelName,
    recipe: RecipeName,
    compiled: Annotated[bool, typer.Option("--compiled", help="both sides through torch.compile")] = False,
    batch: Annotated[int, typer.Option(min=0, help="rows of the inputs; 0: as they come")] = 0,
    length: Annotated[int, typer.Option(min=0, help="tokens of the inputs; 0: as they come")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; empty: the model's own")] = "",
    runs: Annotated[int, typer.Option(min=1, help="interleaved pairs of runs, at most")] = 15,
    as_json: AsJson = False,
) -> None:
    """A model before and after a recipe: deviation first, then time, rate, peak memory, and where the time goes."""
    with _answers(as_json=as_json):
        from . import api
        from .models.load import load_model

        loaded = load_model(model)
        work = lambda: api.bench(
            loaded.model, recipe, loaded.example_inputs, compiled=compiled, batch=batch, length=length,
            dtype=_dtype(dtype), runs=runs, name=loaded.name,
        )  # fmt: skip
        found = _working(f"measuring {model}", work, quiet=as_json)
        print(json.dumps(found.to_dict()) if as_json else found.text())
        if found.failed:
            raise typer.Exit(1)


@app.command()
def quality(
    model: Annotated[str, typer.Option(help="byte_lm, shapes_vit or minilm; any other MODEL with --data")],
    recipe: Annotated[
        list[str] | None, typer.Option(help="a YAML file, a shipped recipe's or a mechanism's name; may be repeated")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="exact, and every mechanism at every site")] = False,
    data: Annotated[Path | None, typer.Option(help='a file with one call a line: {"input_ids": [1, 2]}')] = None,
    out: Annotated[Path | None, typer.Option(help="keep rows, table and plot here; a killed run goes on")] = None,
    as_json: AsJson = False,
) -> None:
    """How good a model still is after each recipe, beside the cost predicted and the time measured."""
    with _answers(as_json=as_json):
        from . import api

        found = api.quality(
            model, recipe or (), every=every, data=data, out=out, name=model, progress=False if as_json else None
        )
        print(json.dumps(found.to_dict()) if as_json else found.text())
        asked = found.rows[1:]
        if asked and all(row.reason for row in asked):
            raise typer.Exit(1)


@app.command()
def preview(
    model: ModelName,
    recipe: RecipeName,
    tokens: Annotated[int, typer.Option(min=0, help="length of the inputs; 0: as they come")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="rows of the inputs")] = 1,
    device: Annotated[str, typer.Option(help="h100, a100 or cpu")] = "h100",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; empty: the model's own")] = "",
    as_json: AsJson = False,
) -> None:
    """What a recipe would change on a device: predicted from shapes; of hf: models only the config is read."""
    with _answers(as_json=as_json):
        from . import api
        from .models.load import load_model
        from .models.on_meta import shape_of

        shape = shape_of(model, _dtype(dtype))
        loaded = load_model(model) if shape is None else None
        work = lambda: api.preview(
            loaded.model if loaded else shape, recipe, loaded.example_inputs if loaded else None, tokens=tokens,
            batch=batch, device=device, dtype=_dtype(dtype) if loaded else None, name=model,
        )  # fmt: skip
        found = _working(f"predicting {model}", work, quiet=as_json)
        print(json.dumps(found.to_dict()) if as_json else found.text())


def _dtype(text: str) -> Any:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "": None}
    if text not in known:
        raise Refused(f"--dtype {text}", fits=", ".join(filter(None, known)))
    return known[text]


@app.command()
def mechanisms(
    for_site: Annotated[str, typer.Option("--for", help="MODEL@SITE: only what fits that site")] = "",
    markdown: Annotated[bool, typer.Option("--md", help="the table of the docs")] = False,
    as_json: AsJson = False,
) -> None:
    """Every registered mechanism: what it is, its part, what it does to a trained model, its knobs."""
    with _answers(as_json=as_json):
        from . import api

        table = api.mechanism_table(_fitting(for_site) if for_site else None)
        if as_json:
            print(json.dumps(table.rows))
        else:
            print(table.markdown() if markdown else table.text())


def _fitting(place: str) -> tuple[str, ...]:
    from . import api
    from .compiler.steps import fitting
    from .models.load import load_model

    model, at, path = place.rpartition("@")
    if not at:
        raise Refused(f"--for {place}", fits="MODEL@SITE, as in minilm@encoder.layer.0.attention.self")
    loaded = load_model(model)
    found = api.explain(loaded.model, loaded.example_inputs)
    chosen = [s for s in found.sites if s.path == path]
    if not chosen:
        raise Refused(f"site {path!r}", fits=", ".join(s.path for s in found.sites))
    return fitting(chosen[0])


@app.command()
def kernels(
    model: ModelName,
    recipe: RecipeName,
    target: Annotated[str, typer.Option(help="cpu, cuda:80, cuda:90, cuda:100 or hip:gfx942")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """The source of every kernel that a rewritten model runs on a target."""
    with _answers(as_json=as_json):
        from . import api
        from .codegen.used import SHOWN, must_be_targets
        from .models.load import load_model

        must_be_targets([target], SHOWN)
        loaded = load_model(model)
        work = lambda: api.kernels(loaded.model, recipe, loaded.example_inputs, target=target)
        found = _working(f"optimizing {model}", work, quiet=as_json)
        told = [{"call": str(k.call), "sources": k.sources, "refused": k.refused} for k in found]
        print(json.dumps(told) if as_json else "\n\n".join(map(str, found)) or "no primitive is called")


@app.command()
def build(
    model: ModelName,
    recipe: RecipeName,
    target: Annotated[str, typer.Option(help="cuda:80, cuda:90, cuda:100 or hip:gfx942")],
    as_json: AsJson = False,
) -> None:
    """Compile a rewritten model's kernels for a GPU, there or not, and say what became of them."""
    with _answers(as_json=as_json):
        from . import api
        from .codegen.used import must_be_targets
        from .models.load import load_model

        must_be_targets([target])
        loaded = load_model(model)
        found = api.build(loaded.model, recipe, loaded.example_inputs, target=target)
        told = [asdict(made) for made in found]
        print(json.dumps(told) if as_json else "\n".join(map(str, found)) or "no generated kernel is called")


@app.command()
def check(
    mechanism: Annotated[str, typer.Argument(metavar="MECHANISM", help="a registered name, FILE.py, or module:Class")],
    as_json: AsJson = False,
) -> None:
    """Ask a mechanism the questions that our own must answer; exit 1 and the smallest failing case where one fails."""
    with _answers(as_json=as_json):
        from . import api
        from .compiler.named import named

        result = api.check(named(mechanism), show=False)
        print(json.dumps(result.to_dict()) if as_json else str(result))
        if not result.ok:
            raise typer.Exit(1)


@app.command()
def new_mechanism(
    name: Annotated[str, typer.Argument(metavar="NAME", help="its short name: small letters, digits and _")],
    family: Annotated[str, typer.Option(help="in reattend's repository: the folder under passes/")] = "",
) -> None:
    """Write a new mechanism's file, which passes `reattend check` as it is; with --family also its import line."""
    with _answers():
        from . import api

        made = api.new_mechanism(name, family=family)
        print("\n".join(f"wrote {path}" for path in made))
        print(f"next: reattend check {name if family else made[0].name}")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What this machine has, what is missing, what each thing is for and how to get it."""
    with _answers(as_json=as_json):
        from dataclasses import asdict

        from .compiler.doctor import doctor as examine

        checks = examine()
        print(json.dumps([asdict(c) for c in checks]) if as_json else "\n".join(map(str, checks)))
        if any(c.state == "wrong" for c in checks):
            raise typer.Exit(1)


@recipes.command("check")
def recipe_check(recipe: RecipeName, as_json: AsJson = False) -> None:
    """Read a recipe and print it in canonical form, or say what is wrong with it and where."""
    with _answers(as_json=as_json):
        from .compiler.recipe_load import load_recipe
        from .compiler.steps import vocabulary

        found = load_recipe(recipe, vocabulary())
        print(json.dumps({"digest": found.digest, "recipe": found.to_dict()}) if as_json else found.text(), end="")


@recipes.command("list")
def recipe_list() -> None:
    """The recipes that ship with reattend."""
    with _answers():
        from .compiler.recipe_load import shipped

        print("\n".join(shipped()))


@recipes.command("schema")
def recipe_schema() -> None:
    """JSON Schema of recipes, for editors."""
    with _answers():
        from .compiler.recipe_schema import json_schema
        from .compiler.steps import vocabulary

        print(json.dumps(json_schema(vocabulary()), indent=1))
