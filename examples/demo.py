"""`make demo`: the shipped language model, optimized by two recipes; what changed, by how much, and what it cost."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

import reattend
from reattend.models.load import byte_lm

CONTEXT = 2048
PROMPT = b'def read_lines(path):\n    """Return the lines of a file."""\n    with open('
RECIPE = """
version: 1
model: {type: llama, layers: 6}
sites:
  - {match: {layer: "0, 2, 4"}, attention: {window: {window: 64, sinks: 4}}}   # three layers look back 64 bytes
"""


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(2)
    loaded = byte_lm(CONTEXT)

    print(f"A byte-level language model of 4.4 M parameters (a Hugging Face Llama) attends here, on {CONTEXT} bytes:\n")
    print(reattend.explain(loaded.model, loaded.example_inputs).brief())

    print("\nThe recipe `exact` changes no number, only how it is computed:\n")
    exact = reattend.optimize(loaded.model, "exact", loaded.example_inputs, name="byte_lm")
    print(exact.report.text())

    print("\nA recipe of our own cuts three layers to a window; nothing was trained: the deviation is what it costs:\n")
    fast = reattend.optimize(loaded.model, RECIPE, loaded.example_inputs, name="byte_lm")
    print(fast.report.text())

    print("\nBoth still generate, by the model's own generate():\n")
    for name, model in {"the original": loaded.model, "exact": exact, "windows": fast}.items():
        print(f"--- {name}\n{written(model)}\n")

    page = fast.report.write(Path("out") / "demo.html")
    print(f"The report as a page: {page.resolve()}")
    print("What it costs in quality: reattend quality --model byte_lm --recipe exact --recipe window")


def written(model: Any) -> str:
    """The prompt and the 60 likeliest bytes after it."""
    ids = torch.tensor([list(PROMPT)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)
    return bytes(out[0].tolist()).decode(errors="replace")


if __name__ == "__main__":
    main()
