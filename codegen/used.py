"""The kernels that a model's calls would run on a target: what they are as source, and built before the first call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tqdm import tqdm

from ..compiler.pointwise import Piece
from ..compiler.primitives.operator import PRIMITIVES, Groups, Kernel
from ..compiler.quick import pieces_of
from ..compiler.refusal import Refused, nearest
from .cpu import attend as cpu_attend
from .cpu import pointwise
from .cpu import scan as cpu_scan
from .of_heads import settling
from .triton.ahead import TARGETS, Compiled, compiled
from .triton.launching import recorded

CPU = "cpu"
SHOWN = (CPU, *TARGETS)  # whose sources can be told; only GPUs are compiled for beforehand


@dataclass(frozen=True)
class Call:
    """A primitive called with tensors of some shapes, or a piece of pointwise work."""

    primitive: str
    groups: Groups
    text: str
    piece: Piece | None = None

    def __str__(self) -> str:
        if self.piece is not None:
            return f"pointwise: {self.piece}"
        shapes = ", ".join("x".join(map(str, t.shape)) for group in self.groups for t in group)
        return f"{self.primitive} of {shapes}: {self.text}"

    @property
    def key(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Used:
    """A call's kernels on a target by name, or why torch's operations run in their place."""

    call: Call
    sources: dict[str, str]
    refused: str = ""

    def __str__(self) -> str:
        said = "\n".join(f"\n{source}" for source in self.sources.values())
        return f"# {self.call}\n{said or f'# no kernel: {self.refused}'}"


def used_in(run: Callable[[], object], target: str) -> tuple[Used, ...]:
    """The kernels of everything that is called inside, without gradients."""
    return tuple(used(call, target) for call in _without_gradients(run, target))


def built_in(run: Callable[[], object], target: str) -> tuple[Compiled, ...]:
    """The same compiled."""
    calls = _without_gradients(run, target)
    return tuple(made for call in tqdm(calls, desc=f"building for {target}") for made in built(call, target))


def _without_gradients(run: Callable[[], object], target: str) -> list[Call]:
    with torch.no_grad():
        return calls_of(run, target)


def calls_of(run: Callable[[], object], target: str = "") -> list[Call]:
    """The primitives that are called, each spec and shape once; for a processor pointwise work too."""
    with _watching() as found:
        run()
    pieces = pieces_of(run) if target == CPU else ()
    return [*{call.key: call for call in found}.values(), *(Call("pointwise", [], "", piece) for piece in pieces)]


@contextmanager
def _watching() -> Iterator[list[Call]]:
    """A kernel in front of all others that takes nothing and remembers what it was asked."""
    found: list[Call] = []

    def watcher(primitive: str) -> Kernel:
        def refuses(groups: Groups, text: str) -> str:
            if not _in_numbers(found, primitive, groups):
                found.append(Call(primitive, groups, text))
            return "watching"

        return Kernel("watching", refuses, lambda groups, text: [], reads_stored=True)

    placed = {name: watcher(name) for name in PRIMITIVES}
    for name, primitive in PRIMITIVES.items():
        primitive.kernels.setdefault(CPU, []).insert(0, placed[name])
    try:
        yield found
    finally:
        for name, primitive in PRIMITIVES.items():
            primitive.kernels[CPU].remove(placed[name])


def _in_numbers(found: list[Call], primitive: str, groups: Groups) -> bool:
    """Whether the last call is asked about once more, on the numbers that its rows of bytes stand for."""
    last = found[-1] if found else None
    stored = last is not None and last.primitive == primitive and PRIMITIVES[primitive].stored(last.text)
    return last is not None and stored and last.groups[0][0] is groups[0][0]


def must_be_targets(targets: Iterable[str], known: Collection[str] = tuple(TARGETS)) -> None:
    """An unknown target is refused; asked first, as a model takes long to load and to capture."""
    for target in targets:
        if target not in known:
            raise Refused(f"target {target!r}", fits=nearest(target, known))


def used(call: Call, target: str) -> Used:
    """The sources of one call."""
    return _on_cpu(call) if target == CPU else _on_gpu(call, target)


def _on_cpu(call: Call) -> Used:
    if (piece := call.piece) is not None:
        return _made(call, None, lambda: pointwise.source(piece))
    if call.primitive == "attend":
        reason = settling(cpu_attend.refuses)(call.groups, call.text)
        return _made(call, reason, lambda: cpu_attend.source_of(call.groups, call.text))
    if call.primitive == "scan":
        reason = cpu_scan.refuses(call.groups, call.text)
        return _made(call, reason, lambda: cpu_scan.source_of(call.groups, call.text))
    return Used(call, {}, "plain torch operations")


def _made(call: Call, reason: str | None, source: Callable[[], str]) -> Used:
    return Used(call, {}, reason) if reason else Used(call, {call.primitive: source()})


def _on_gpu(call: Call, target: str) -> Used:
    reason = _why_not(call)
    if reason:
        return Used(call, {}, reason)
    with recorded(target) as launches:
        _run(call)
    return Used(call, {name: source for source, name, _, _ in launches})


def _why_not(call: Call) -> str | None:
    kernel = _generated(call)
    return "plain torch operations" if kernel is None else kernel.refuses(call.groups, call.text)


def _generated(call: Call) -> Kernel | None:
    """The kernel for GPUs that is generated here."""
    from .triton import NAME

    return next((k for k in PRIMITIVES[call.primitive].kernels.get("cuda", []) if k.name == NAME), None)


def _run(call: Call) -> None:
    kernel = _generated(call)
    assert kernel is not None
    kernel.run(call.groups, call.text)


def built(call: Call, target: str) -> list[Compiled]:
    """A call's kernels compiled for a GPU, into Triton's own cache: its first launch there finds them."""
    if _why_not(call):
        return []
    return compiled(target, lambda: _run(call))
