"""Pieces of pointwise work as generated C++: a row stays in the first cache while its sums and its results are made.

A piece is cut into sweeps: a mean of a row ends one, and what needs it begins in the next. What a later sweep reads of
an earlier one is kept in a row of its own, float32; tensors that enter are read again.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...compiler.pointwise import FULL, ROW, Given, Made, Operand, Piece, Step, rows_apart
from .skeleton import skeleton
from .toolchain import built

_C = {torch.float32: "float", torch.bfloat16: "half"}
_SAYS = {
    "add": "({0} + {1})", "sub": "({0} - {1})", "mul": "({0} * {1})", "div": "({0} / {1})", "neg": "(-{0})",
    "square": "({0} * {0})", "cube": "({0} * {0} * {0})", "sqrt": "root({0})", "rsqrt": "(1.f / root({0}))",
    "cast": "{0}", "exp": "exp_({0})", "tanh": "tanh_({0})", "sigmoid": "sigmoid_({0})", "relu": "relu_({0})",
    "silu": "silu_({0})", "gelu": "gelu_({0})", "gelu_tanh": "gelu_tanh_({0})",
}  # fmt: skip


def kernel(piece: Piece) -> Any:
    """What runs a piece on tensors that enter into tensors that leave, and why there is none where it is None."""
    run, reason = built(source, piece)
    return (None, reason) if run is None else (_Kernel(run, piece), None)


class _Kernel:
    """A built library, called by pointer."""

    def __init__(self, run: Any, piece: Piece) -> None:
        self.run = run
        entering, leaving = (ctypes.c_void_p * len(held) for held in (piece.entering, piece.leaving))
        self.entering, self.leaving, self.sizes = entering, leaving, ctypes.c_int64 * 3
        self.apart = ctypes.c_int64 * len(piece.entering)

    def __call__(self, entering: Sequence[Tensor], leaving: Sequence[Tensor]) -> None:
        width = leaving[0].shape[-1]
        sizes = self.sizes(leaving[0].numel() // width, width, torch.get_num_threads())
        into = self.entering(*[t.data_ptr() for t in entering])
        apart = self.apart(*[rows_apart(t) or 0 for t in entering])
        self.run(into, self.leaving(*[t.data_ptr() for t in leaving]), sizes, apart)


def source(piece: Piece) -> str:
    """The whole C++ text of a piece."""
    said = _Text(piece)
    return "\n".join([skeleton("pointwise.cpp", said=[f"// {piece}"]), *said.lines()])


class _Text:
    """The loops over one row: what each step is called, in which sweep it is known, which are kept between sweeps."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self.out = dict(zip(piece.leaving, range(len(piece.leaving)), strict=True))
        self.known: list[int] = []  # of each step, the first sweep that may read it
        for step in piece.steps:
            before = max((self._known(a) for a in step.args), default=0)
            self.known.append(before + (step.op == "mean"))
        steps = list(enumerate(piece.steps))
        self.kept = sorted({a for k, s in steps for a in self._read(s) if self._sweep(k) > self.known[a]})

    def _read(self, step: Step) -> list[int]:
        """The numbers of the whole results that a step reads."""
        return [a.step for a in step.args if isinstance(a, Made) and self.piece.steps[a.step].shape == FULL]

    def _known(self, operand: Operand) -> int:
        return self.known[operand.step] if isinstance(operand, Made) else 0

    def _sweep(self, k: int) -> int:
        """The sweep in which a step is worked on."""
        return self.known[k] - (self.piece.steps[k].op == "mean")

    def lines(self) -> list[str]:
        floats = max(1, len(self.kept))
        return [
            "static void one(const Call* c, int64_t row, float* kept) {",
            "    const int64_t W = c->width, ld = rounded(W, VL);",
            *(f"    {line}" for line in self._pointers()),
            *(f"    {line}" for sweep in range(max(self.known) + 1) for line in self._swept(sweep)),
            "}",
            'extern "C" void run(const void** in, void** out, const int64_t* sizes, const int64_t* apart) {',
            "    const Call call = {in, out, sizes[0], sizes[1], apart}, *c = &call;",
            "#pragma omp parallel num_threads(sizes[2])",
            "    {",
            f"        Workspace kept({floats} * rounded(c->width, VL));",
            "#pragma omp for schedule(static)",
            "        for (int64_t row = 0; row < c->rows; row++) one(c, row, kept.data);",
            "    }",
            "}",
        ]

    def _pointers(self) -> list[str]:
        lines = []
        for k, e in enumerate(self.piece.entering):
            place = f"({_C[e.dtype]} const*)c->in[{k}]"
            if e.shape == ROW:
                lines.append(f"const vf a{k} = all(number(({place})[row]));")
            else:
                lines.append(f"const auto p{k} = {place}{f' + row * c->apart[{k}]' if e.shape == FULL else ''};")
        for step, k in self.out.items():
            lines.append(f"const auto o{step} = ({_C[self.piece.steps[step].dtype]}*)c->out[{k}] + row * W;")
        return lines

    def _swept(self, sweep: int) -> list[str]:
        """One loop over the row, behind the numbers of the row that are known before it."""
        steps = [(k, s) for k, s in enumerate(self.piece.steps) if self._sweep(k) == sweep]
        means = [k for k, s in steps if s.op == "mean"]
        inside = [(k, s) for k, s in steps if s.shape == FULL or s.op == "mean"]
        reads = [a for _, s in inside for a in s.args if not isinstance(a, float)]
        given = sorted({a.tensor for a in reads if isinstance(a, Given) and self.piece.entering[a.tensor].shape != ROW})
        again = sorted({a for _, s in inside for a in self._read(s) if self.known[a] < sweep})
        lines = [f"const vf s{k} = {self._said(s)};" for k, s in steps if s.shape == ROW and s.op != "mean"]
        if not inside:
            return lines
        lines += [f"Sum t{k};" for k in means]
        lines.append("sweep(W, [&](int64_t at, auto left) __attribute__((always_inline)) {")
        lines += [f"    const vf a{k} = take(p{k} + at, left);" for k in given]
        lines += [f"    const vf s{k} = load(kept + {self.kept.index(k)} * ld + at);" for k in again]
        for k, step in inside:
            if step.op == "mean":
                lines.append(f"    t{k}.add(there({self._name(step.args[0])}, left));")
                continue
            halves = k in self.out and step.dtype == torch.bfloat16  # rounded once, for what leaves and who reads on
            if halves:
                lines += [f"    const vh b{k} = halves({self._exact(step)});", f"    const vf s{k} = of_halves(b{k});"]
            else:
                lines.append(f"    const vf s{k} = {self._said(step)};")
            if k in self.kept:
                lines.append(f"    store(kept + {self.kept.index(k)} * ld + at, s{k});")
            if k in self.out:
                lines.append(f"    give(o{k} + at, {'b' if halves else 's'}{k}, left);")
        means_known = [
            f"const vf s{k} = {self._rounded(self.piece.steps[k], f'all(t{k}.all_of_it() / W)')};" for k in means
        ]
        return [*lines, "});", *means_known]

    def _said(self, step: Step) -> str:
        return self._rounded(step, self._exact(step))

    def _exact(self, step: Step) -> str:
        return _SAYS[step.op].format(*map(self._name, step.args))

    def _rounded(self, step: Step, text: str) -> str:
        return f"to_half({text})" if step.dtype == torch.bfloat16 else text

    def _name(self, operand: Operand) -> str:
        if isinstance(operand, Made):
            return f"s{operand.step}"
        if isinstance(operand, Given):
            return f"a{operand.tensor}"
        return _constant(operand)


def _constant(x: float) -> str:
    if x != x:
        return '__builtin_nanf("")'
    if abs(x) > torch.finfo(torch.float32).max:
        return "INF" if x > 0 else "-INF"
    return f"{x!r}f"
