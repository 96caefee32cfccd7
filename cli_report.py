"""`reattend report`: what a rewrite changed, as a page, a picture, tables or plain values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .answers import answers, working, write
from .cli_arguments import ModelName
from .compiler.giving_way import ours
from .compiler.refusal import Refused

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="a YAML file, a shipped recipe's or a mechanism's name; none: the sites")
]


def report(
    model: ModelName,
    recipe: RecipeName = "",
    html: Annotated[Path | None, typer.Option(help="write the page here")] = None,
    svg: Annotated[Path | None, typer.Option(help="write the table as a picture here")] = None,
    md: Annotated[Path | None, typer.Option(help="write Markdown tables here")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="write everything that the page shows here")] = None,
    heads: Annotated[str, typer.Option(help="measures of heads to draw as well: entropy,sink,distance ...")] = "",
    quality: Annotated[Path | None, typer.Option(help="the rows that `reattend quality --out` wrote, to draw")] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="compile kernels for this GPU, there or not, and tell their registers")
    ] = None,
) -> None:
    """What a recipe changes in a model, to look at; without a recipe where the model attends."""
    with answers():
        from .compiler.showing import markdown, page, picture

        view = working(f"looking at {model}", lambda: _view(model, recipe, heads, quality, target or []), quiet=False)
        writers: tuple[tuple[Path | None, Callable[[], str]], ...] = (
            (html, lambda: page.document(view)),
            (svg, lambda: picture.table(view)),
            (md, lambda: markdown.document(view)),
            (as_json, lambda: json.dumps(view.to_dict(), indent=1)),
        )
        written = [(path, make()) for path, make in writers if path is not None]
        print(view.verdict if written else markdown.document(view).rstrip())
        for path, text in written:
            write(path, text)
            print(f"wrote {path}")


def _view(model: str, recipe: str, heads: str, quality: Path | None, targets: list[str]) -> Any:
    from . import api
    from .codegen.used import must_be_targets
    from .compiler.showing.looking import view_of_sites
    from .models.load import load_model

    must_be_targets(targets)
    loaded = load_model(model)
    if not recipe:
        if heads or quality or targets:
            asked = "--heads, --quality or --target without a recipe"
            raise Refused(asked, where="report", fits="reattend report MODEL exact")
        return view_of_sites(api.explain(loaded.model, loaded.example_inputs), loaded.name)
    fast = api.optimize(loaded.model, recipe, loaded.example_inputs, name=loaded.name)
    measures = heads.split(",") if heads else []
    table = api.heads(loaded.model, loaded.example_inputs, measures=measures, name=loaded.name) if measures else None
    plot = api.quality_plot(loaded.model, quality, name=loaded.name) if quality else ""
    return ours(fast, "report").view(heads=table, plot=plot, targets=targets)
