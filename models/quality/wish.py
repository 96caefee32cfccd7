"""What a row is asked for: a recipe, or a model that was optimized already; and the recipe of every mechanism."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ...compiler.mechanism import mechanisms
from ...compiler.recipe import Recipe
from ...compiler.recipe_load import everywhere, load_recipe
from ...compiler.refusal import Refused
from ...compiler.vocabulary import Vocabulary
from .row import ORIGINAL


@dataclass(frozen=True)
class Wish:
    name: str
    recipe: Recipe | None = None
    model: nn.Module | None = field(default=None, compare=False)
    refused: str = ""


def wished(recipes: Any, every: bool, vocabulary: Vocabulary) -> list[Wish]:
    """The rows that a caller names, then those of `every` mechanism; a mistake in a recipe is refused now.

    recipes  one recipe, a sequence, or a mapping of names to recipes or models.
    """
    named: Iterable[tuple[str, Any]]
    if isinstance(recipes, Mapping) and "version" not in recipes:
        named = recipes.items()
    elif isinstance(recipes, Sequence) and not isinstance(recipes, str):
        named = [("", recipe) for recipe in recipes]
    else:
        named = [("", recipes)]
    found = [_wish(name, asked, vocabulary) for name, asked in named]
    found += [wish for wish in (_every(vocabulary) if every else ()) if wish not in found]
    for number, wish in enumerate(found):
        if wish.name == ORIGINAL or any(wish.name == other.name for other in found[:number]):
            raise Refused(f"two rows named {wish.name!r}", where="quality", fits="a mapping of one name a recipe")
    return found


def _wish(name: str, asked: Any, vocabulary: Vocabulary) -> Wish:
    if isinstance(asked, nn.Module):
        if not name:
            raise Refused(
                f"a {type(asked).__name__} without a name", where="quality", fits='{"name of its row": model}'
            )
        return Wish(name, model=asked)
    recipe = load_recipe(asked, vocabulary)
    return Wish(name or _name_of(recipe), recipe)


def _name_of(recipe: Recipe) -> str:
    source = recipe.source
    return Path(source).stem if source and source != "recipe" else f"recipe {recipe.digest[:8]}"


def _every(vocabulary: Vocabulary) -> list[Wish]:
    """`exact`, then each registered mechanism at every site, with the knobs that its class says it is judged at."""
    found = [Wish("exact", load_recipe("exact", vocabulary))]
    for slug, cls in mechanisms().items():
        for knobs in cls.judged:
            found.append(_alone(slug, knobs, vocabulary))
    return found


def _alone(slug: str, knobs: Mapping[str, Any], vocabulary: Vocabulary) -> Wish:
    name = " ".join((slug, *(f"{knob}={value}" for knob, value in knobs.items())))
    try:
        return Wish(name, everywhere(slug, vocabulary, knobs))
    except Refused as refused:
        return Wish(name, refused=str(refused))
