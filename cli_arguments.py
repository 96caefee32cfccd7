"""What several commands are given alike: a model, a recipe, the wish for JSON."""

from __future__ import annotations

from typing import Annotated

import typer

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="hf:<id or dir>, timm:<name>, py:module:factory, or built in")
]
RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="a YAML file, or the name of a shipped recipe or of a mechanism")
]
AsJson = Annotated[bool, typer.Option("--json", help="machine-readable output")]
