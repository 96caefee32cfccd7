"""One attention for a reader: its formulas, its mask in tiles, its cascade, and the source of each kernel."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import fx
from tqdm import tqdm

from ..cascades.of_mechanism import spec_math
from ..cost import sizes
from ..primitives.attend import attend_op
from ..primitives.attend_spec import AttendSpec
from ..refusal import Refused
from ..symbol_math import latex
from ..symbol_text import parse
from ..symbols import TRUE, Expr
from ..tiles import tiles_of
from .view import Computation, Kernel, Mask

ACROSS = 24  # tiles in a row of the picture
_NORMALISERS = {
    "softmax": r"A_{i, j} = \frac{\exp\left(S_{i, j}\right)}{\sum_{j} \exp\left(S_{i, j}\right)}",
    "sum": r"A_{i, j} = \frac{W_{i, j}}{\sum_{j} W_{i, j}}",
    "none": r"A_{i, j} = W_{i, j}",
    "stick": r"A_{i, j} = \beta_{i, j} \prod_{j' > j} \left(1 - \beta_{i, j'}\right)",
    "grouped": r"A_{i, j} = \text{softmax over groups, then inside each}",
}
_WITH_SINK = r"A_{i, j} = \frac{\exp\left(S_{i, j}\right)}{\exp\left(t_{0}\right) + \sum_{j} \exp\left(S_{i, j}\right)}"


@lru_cache(maxsize=256)
def computation(spec: str, keys: int) -> Computation:
    """What an `attend` computes on so many keys."""
    read = AttendSpec.of(spec)
    return Computation(
        key="",
        spec=spec,
        formulas=_formulas(read),
        masks=tuple(m for keep, _, _ in read.segments if (m := _mask(keep, read, keys)) is not None),
        cascade=_cascade(spec),
        kernels=_kernels(spec),
    )


def _formulas(spec: AttendSpec) -> tuple[tuple[str, str], ...]:
    found = [("score", f"S_{{i, j}} = {_score(spec.score_expr)}")]
    if spec.weight:
        found.append(("weight", f"W_{{i, j}} = {latex(parse(spec.weight))}"))
    found.append(("normaliser", _WITH_SINK if spec.sink else _NORMALISERS[spec.normaliser]))
    if spec.after:
        found.append(("then", f"A_{{i, j}} = {latex(parse(spec.after))}"))
    return (*found, ("output", r"o_{i} = \sum_{j} A_{i, j} v_{j}"))


def _score(e: Expr) -> str:
    """s is what the row of q and the row of k make of each other."""
    return re.sub(r"(?<![\w\\{])s(?![\w}])", r"q_{i} \\cdot k_{j}", _short(latex(e)))


def _short(text: str) -> str:
    """Numbers to six digits: a scale of 0.1767766952966369 is told by its first ones."""
    return re.sub(r"\d+\.\d{7,}", lambda number: f"{float(number[0]):.6g}", text)


def _mask(keep: str, spec: AttendSpec, keys: int) -> Mask | None:
    """Drawn where positions alone decide; what a table decides is said, not drawn."""
    if not keep:
        return None
    kept = TRUE
    for condition in (c for c in AttendSpec(score="s", keep=keep).conjuncts if not _looks_up(c)):
        kept = kept & condition
    words = _short(latex(parse(keep)))
    if kept.text == TRUE.text or spec.tiles or spec.q_positions or spec.k_positions:
        return Mask(keep, words, 0, ())
    size = max(1, -(-keys // ACROSS))
    try:
        tiles = tiles_of(kept, keys, keys, (size, size))
    except Refused:
        return Mask(keep, words, 0, ())
    rows = tuple("".join("epf"[int(c)] for c in row) for row in tiles.classes())
    return Mask(keep, words, size, rows, f"{keys} queries by {keys} keys, {tiles}")


def _looks_up(condition: Expr) -> bool:
    return any(e.op == "lookup" or (e.op == "name" and e.args[0] in ("b", "h")) for e in condition.walk())


def _cascade(spec: str) -> str:
    """Equations, barriers, passes, loops; their LaTeX is what the formulas say already."""
    try:
        return spec_math(spec).partition("\nlatex\n")[0]
    except Refused as refused:
        return f"not analysed: {refused}"


def _kernels(spec: str) -> tuple[Kernel, ...]:
    found: list[Kernel] = []
    for device, kernels in attend_op.kernels.items():
        for kernel in kernels:
            source = kernel.source(spec) if kernel.source is not None else None
            if source:
                found.append(Kernel(kernel.name, device, source))
    return tuple(found)


def numbered(found: Sequence[tuple[str, int]]) -> dict[tuple[str, int], Computation]:
    """The computations of (spec, keys) pairs, each once, named in order."""
    distinct = dict.fromkeys(found)
    return {pair: replace(computation(*pair), key=f"c{n}") for n, pair in enumerate(distinct, 1)}


# --- on GPUs ----------------------------------------------------------------------------------------------------------

Example = tuple[tuple[tuple[tuple[int, ...], torch.dtype], ...], ...]  # sizes and types of a call's tensors, in groups


def example(attend: fx.Node) -> Example:
    """Of what a node is called with."""
    groups = [a if isinstance(a, list | tuple) else [a] for a in attend.args[:-1]]
    values = [[node.meta["val"] for node in group] for group in groups]  # type: ignore[union-attr]
    return tuple(tuple((sizes(t), t.dtype) for t in group) for group in values)


def with_footprints(
    found: Iterable[Computation], examples: Mapping[str, Example], targets: Sequence[str]
) -> tuple[Computation, ...]:
    """What each kernel takes of the GPUs named and of those that it was compiled for before."""
    return tuple(
        replace(c, kernels=_footprints(c, examples[c.spec], targets)) if c.spec in examples else c
        for c in (tqdm(tuple(found), desc=f"compiling for {', '.join(targets)}") if targets else found)
    )


def _footprints(c: Computation, of: Example, targets: Sequence[str]) -> tuple[Kernel, ...]:
    groups = [[torch.empty(shape, dtype=dtype) for shape, dtype in group] for group in of]
    known = {
        (kernel.name, device): kernel.footprints(groups, c.spec, targets)
        for device, kernels in attend_op.kernels.items()
        for kernel in kernels
        if kernel.footprints is not None
    }
    return tuple(replace(k, footprints=known.get((k.name, k.device), ())) for k in c.kernels)
