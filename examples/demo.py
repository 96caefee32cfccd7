"""`make demo`: a real sentence encoder, optimized by a recipe; what changed, by how much, and what it cost."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

import reattend
from reattend.models.load import minilm

RECIPE = """
version: 1
model: {type: bert, layers: 6}
sites:
  - {match: {layer: "0-1"}, attention: softmax}                  # exact: the mask folded away, the best kernel
  - {match: {layer: "2-3"}, attention: {window: {window: 48}}, drop: [padding]}
"""


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(2)
    loaded = minilm()

    print("The encoder all-MiniLM-L6-v2 attends here:\n")
    print(reattend.explain(loaded.model, loaded.example_inputs).brief())

    print("\nThe recipe `exact` changes no number, only how it is computed:\n")
    exact = reattend.optimize(loaded.model, "exact", loaded.example_inputs, name="minilm")
    print(exact.report.text())

    print("\nA recipe of our own cuts two layers to a window; nothing was trained: the deviation is what it costs:\n")
    fast = reattend.optimize(loaded.model, RECIPE, loaded.example_inputs, name="minilm")
    print(fast.report.text())

    page = fast.report.write(Path("out") / "demo.html")
    print(f"\nThe same as a page: {page.resolve()}")


if __name__ == "__main__":
    main()
