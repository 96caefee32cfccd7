"""Heads taken out, turned down, made uniform or replaced by those of another input, while a model runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..held_out import Batch
from ..primitives.attend import attend_op
from ..primitives.attend_spec import FAINT, AttendSpec
from ..refusal import Refused, nearest
from ..site import Site
from .reading import Edit, Reading

MODES = ("zero", "uniform")


def intervened(
    reading: Reading,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    scale: Mapping[str, Mapping[int, float]],
    uniform: Mapping[str, Iterable[int]],
    patch: tuple[Batch, Mapping[str, Iterable[int]]] | None,
) -> Any:
    """The output of a call with some heads patched, then made uniform, then scaled."""
    edits: dict[str, list[Edit]] = {}
    for path, edit in _edits(reading, scale, uniform, patch):
        edits.setdefault(path, []).append(edit)
    call, tensors = reading.call(args, kwargs)
    with torch.no_grad():
        return reading.edited(call, tensors, {path: together(each) for path, each in edits.items()})


def _edits(
    reading: Reading,
    scale: Mapping[str, Mapping[int, float]],
    level: Mapping[str, Iterable[int]],
    patch: tuple[Batch, Mapping[str, Iterable[int]]] | None,
) -> Iterator[tuple[str, Edit]]:
    if patch is not None:
        other = outputs_of(reading, *patch)
        for path, heads in patch[1].items():
            yield path, patched(heads_of(reading.program.site(path), heads), other[path])
    for path, heads in level.items():
        yield path, uniform(heads_of(reading.program.site(path), heads))
    for path, factors in scale.items():
        heads_of(reading.program.site(path), factors)
        yield path, scaled(factors)


def scaled(factors: Mapping[int, float]) -> Edit:
    """Some heads' outputs times a number: o_h -> a_h o_h."""

    def edit(o: Tensor, arguments: Sequence[Any]) -> Tensor:
        factor = torch.ones(o.shape[1], dtype=o.dtype, device=o.device)
        factor[list(factors)] = torch.tensor(list(factors.values()), dtype=o.dtype, device=o.device)
        return o * factor[:, None, None]

    return edit


def uniform(heads: Iterable[int]) -> Edit:
    """Some heads' weights replaced by equal ones over the keys that a query may see."""
    chosen = list(heads)

    def edit(o: Tensor, arguments: Sequence[Any]) -> Tensor:
        q, kv, tables, text = arguments
        spec = AttendSpec.of(text)
        level = torch.zeros_like(q) if spec.score_expr.names <= {"s"} else q  # then every score is the same already
        equal = attend_op(level, list(kv), list(tables), _level(spec).text)[0]
        return _with_heads(o, chosen, equal)

    return edit


def patched(heads: Iterable[int], other: Tensor) -> Edit:
    """Some heads' outputs replaced by given ones (B, H, N, D)."""
    chosen = list(heads)

    def edit(o: Tensor, arguments: Sequence[Any]) -> Tensor:
        if other.shape != o.shape:
            raise Refused(f"heads of {tuple(other.shape)} in place of {tuple(o.shape)}", fits="inputs of equal sizes")
        return _with_heads(o, chosen, other)

    return edit


def masked(heads: Iterable[int], mode: str) -> Edit:
    """Some heads without what they know: their output zero, or their weights uniform."""
    if mode not in MODES:
        raise Refused(f"mode {mode!r}", where="heads", fits=nearest(mode, MODES))
    return scaled(dict.fromkeys(heads, 0.0)) if mode == "zero" else uniform(heads)


def outputs_of(reading: Reading, batch: Batch, paths: Iterable[str]) -> dict[str, Tensor]:
    """What some sites give on a call, (B, H, N, D) each."""
    found: dict[str, Tensor] = {}

    def keeping(path: str) -> Edit:
        def edit(o: Tensor, arguments: Sequence[Any]) -> Tensor:
            found[path] = o
            return o

        return edit

    call, tensors = reading.call(*batch)
    with torch.no_grad():
        reading.edited(call, tensors, {path: keeping(path) for path in paths})
    return found


def together(edits: Sequence[Edit]) -> Edit:
    """One after another."""

    def edit(o: Tensor, arguments: Sequence[Any]) -> Tensor:
        for one in edits:
            o = one(o, arguments)
        return o

    return edit


def heads_of(site: Site, heads: Iterable[int]) -> tuple[int, ...]:
    """The head numbers, each of which the site must have."""
    wanted = tuple(heads)
    beyond = [h for h in wanted if not 0 <= h < site.heads]
    if beyond:
        raise Refused(f"head {beyond[0]}", where=site.path, fits=f"heads 0..{site.heads - 1}")
    return wanted


def _level(spec: AttendSpec) -> AttendSpec:
    """Every key at one score, but for those that a bias takes away."""
    if spec.normaliser != "softmax":
        raise Refused(f"uniform weights under the normaliser {spec.normaliser}", fits='"zero"')
    plain = spec.score_expr.names <= {"s"}
    score = spec.score if plain else f"where(({spec.score}) < {FAINT!r}, -inf, 0.0 * s)"
    return replace(spec, score=score, outputs=("o",))


def _with_heads(o: Tensor, heads: Sequence[int], other: Tensor) -> Tensor:
    mine = torch.zeros(o.shape[1], dtype=torch.bool, device=o.device)
    mine[list(heads)] = True
    return torch.where(mine[:, None, None], other.to(o.dtype), o)
