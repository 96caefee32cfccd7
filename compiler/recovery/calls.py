"""The calls that a recovery learns from: their order by seed, rows hashed so that none is also judged on."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..difference import described
from ..held_out import Batch, as_batch
from ..refusal import Refused, nearest
from ..signature import Call, SignatureKey

Source = Sequence[Batch] | Callable[[int], Any]
HELD_OUT = 8  # calls kept back where none are given, at most a tenth of all


class Calls:
    """Call number k of a run: a function of k and the seed alone, so that a resumed run goes on with the same ones."""

    def __init__(self, source: Source, *, stack: int | None = None, seed: int = 0) -> None:
        self.source, self.stack, self.seed = source, stack or 1, seed

    def __call__(self, number: int) -> Batch:
        return stacked([self._one(number * self.stack + k) for k in range(self.stack)])

    def _one(self, number: int) -> Batch:
        if callable(self.source):
            return as_batch(self.source(number))
        turn, place = divmod(number, len(self.source))
        return self.source[int(np.random.default_rng((self.seed, turn)).permutation(len(self.source))[place])]


def listed(data: Iterable[Any] | Callable[[int], Any]) -> Source:
    """Calls as a list, or the function that gives the k-th."""
    if isinstance(data, str | bytes | Tensor):
        fits = "a list of calls like example_inputs, or a function of the number of a call"
        raise Refused(f"data as {type(data).__name__}", where="recover", fits=fits)
    if callable(data) and not isinstance(data, Sequence):
        return data
    found = [as_batch(call) for call in data]
    if not found:
        raise Refused("no data", where="recover", fits="calls like example_inputs")
    return found


def kept_apart(source: Source, held_out: Sequence[Batch]) -> tuple[Source, Sequence[Batch]]:
    """Training and held-out calls; where none are held out, the last ones are. A row in both is refused."""
    if not held_out:
        if callable(source) or len(source) < 2:
            found = "data() gives calls without end" if callable(source) else "one call"
            raise Refused(f"{found}, none held out", where="recover", fits="held_out=[...]: calls to judge on")
        count = min(HELD_OUT, max(1, len(source) // 10))
        source, held_out = source[:-count], source[-count:]
    if not callable(source):
        judged = rows_of(held_out)
        for number, call in enumerate(source):
            refuse_judged(call, judged, f"data[{number}]")
    return source, held_out


def rows_of(calls: Iterable[Batch]) -> dict[bytes, str]:
    """Where each row of some calls stands, by the hash of all its tensors."""
    return {row: f"held_out[{number}] row {place}" for number, call in enumerate(calls)
            for place, row in enumerate(_rows(call))}  # fmt: skip


def refuse_judged(call: Batch, judged: Mapping[bytes, str], where: str) -> None:
    """A row that is also judged on would make the judgement worthless."""
    for place, row in enumerate(_rows(call)):
        if row in judged:
            found = f"row {place} is {judged[row]} as well: verification data equal to training data"
            raise Refused(found, where=where, fits="held-out calls that are not trained on")


def _rows(call: Batch) -> list[bytes]:
    tensors = [t for t in pytree.tree_leaves(call) if isinstance(t, Tensor)]
    if not tensors:
        return []
    together = len({t.shape[0] if t.ndim else None for t in tensors}) == 1 and tensors[0].ndim > 0
    pieces = zip(*(t.unbind(0) for t in tensors)) if together else [tuple(tensors)]
    return [_digest(piece) for piece in pieces]


def _digest(tensors: Iterable[Tensor]) -> bytes:
    found = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().contiguous().cpu()
        found.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.digest()


def stacked(calls: Sequence[Batch]) -> Batch:
    """Several calls as one, their rows one after another."""
    if len(calls) == 1:
        return calls[0]
    flat = [pytree.tree_flatten(call) for call in calls]
    joined = []
    for values in zip(*(leaves for leaves, _ in flat)):
        if not isinstance(values[0], Tensor):
            joined.append(values[0])
            continue
        if len({tuple(v.shape[1:]) for v in values}) > 1:
            sizes = ", ".join(str(tuple(v.shape)) for v in values)
            raise Refused(f"calls of sizes {sizes} in one batch", where="recover", fits="equal lengths, or batch: 1")
        joined.append(torch.cat(values))
    return pytree.tree_unflatten(joined, flat[0][1])


def fitting(call: Batch, signature: inspect.Signature, known: SignatureKey | None, where: str) -> None:
    """Refuses a call whose arguments the model does not have, or has as something else than was captured."""
    args, kwargs = call
    captured = {} if known is None else {name: described(known)[name] for name, _ in known.arguments}
    names = {*captured, *signature.parameters}
    for name in kwargs:
        if name not in names:
            raise Refused(f"argument {name!r}", where=where, fits=nearest(name, names))
    try:
        found = Call.of(signature, args, kwargs)
    except Refused as refused:
        raise refused.at(where) from None
    ours = {name: described(found.key())[name] for name, _ in found.layouts}
    for name, layout in () if known is None else known.arguments:
        if layout.kind == "tensor" and ours.get(name, captured[name]) != captured[name]:
            raise Refused(f"argument {name!r} is {ours[name]}", where=where, fits=f"captured: {captured[name]}")
    first = next((n for n, layout in (known.arguments if known else ()) if layout.kind == "tensor"), None)
    if first is not None and first not in ours:
        raise Refused(f"no argument {first!r}", where=where, fits=f"captured signature: {known}")
