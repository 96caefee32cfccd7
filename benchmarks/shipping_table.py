"""Which recipe leaves by which route: every shipped recipe and each mechanism that fits, on a tiny llama and ViT.

python benchmarks/shipping_table.py docs/shipping_table.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import reattend
from reattend.compiler.recipe_load import everywhere, shipped
from reattend.compiler.refusal import Refused
from reattend.compiler.steps import vocabulary
from reattend.models.load import load_model

MODELS = ("llama", "vit")
ROUTES = ("save_pretrained/load", "hf", "torch", "aoti", "generate")


def main() -> None:
    lines = ["# Recipe × route", "", "Made by `python benchmarks/shipping_table.py docs/shipping_table.md`.", ""]
    reasons: dict[str, int] = {}
    for name in MODELS:
        lines += [f"## {name}", "", f"| recipe | {' | '.join(ROUTES)} |", f"|---|{'---|' * len(ROUTES)}"]
        for shown, recipe in _recipes():
            print(name, shown, file=sys.stderr)
            lines.append(f"| {shown} | {' | '.join(_cells(name, recipe, reasons))} |")
        lines.append("")
    lines += ["Reasons:", "", *(f"{number}. {reason}" for reason, number in reasons.items())]
    text = "\n".join(lines) + "\n"
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text, encoding="utf-8")
    else:
        print(text)


def _recipes() -> Iterator[tuple[str, Any]]:
    yield from ((f"{name}.yaml", name) for name in shipped())
    words = vocabulary()
    for slug, cls in reattend.mechanisms().items():
        if cls.part in ("core", "region", "gate", "model"):
            yield slug, everywhere(slug, words)


def _cells(name: str, recipe: Any, reasons: dict[str, int]) -> list[str]:
    loaded = load_model(name)
    try:
        fast = reattend.optimize(loaded.model, recipe, loaded.example_inputs, measure=False)
    except (Refused, TypeError) as refused:
        said = f"does not fit: {str(refused).splitlines()[0][:160]}"
        return [f"- ({reasons.setdefault(said, len(reasons) + 1)})"] * len(ROUTES)
    routes = fast.ships()
    return [
        "yes" if routes[r].open else f"no ({reasons.setdefault(routes[r].reason, len(reasons) + 1)})" for r in ROUTES
    ]


if __name__ == "__main__":
    main()
