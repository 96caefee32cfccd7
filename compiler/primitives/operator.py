"""What every primitive op is made of: a text spec, an eager meaning, output shapes, a gradient, and kernels per device.

The registered op sees tensors and one text; the text is the whole truth, so it can be printed, hashed, saved and
lowered. Its gradient is a kernel's own, or that of the chosen implementation, recomputed from the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

from ..nodes import is_overload

Groups = Sequence[Sequence[Tensor]]  # the op's tensor arguments in order, a single tensor as a group of one
Meaning = Callable[[Groups, str], list[Tensor]]
# of a call, its results, the gradients of some of those: the gradients of the tensors that are wanted; None: not so
Gradients = Callable[
    [Groups, str, Sequence[Tensor], Mapping[int, Tensor], Sequence[int]], Sequence[Tensor | None] | None
]
InTorch = Callable[[fx.Node, dict[Any, fx.Node]], fx.Node | None]  # a call, and what was made so far in its graph


@dataclass(frozen=True)
class Footprint:
    """What a compiled kernel takes of a device: registers and spilled bytes a thread, shared memory a block."""

    kernel: str
    target: str
    registers: int
    spilled: int
    shared: int
    limit: int  # of shared memory
    matrix: int  # matrix instructions
    warps: int


@dataclass(frozen=True)
class Kernel:
    """One implementation of a primitive: `refuses` says why it does not fit these arguments, or None where it does."""

    name: str
    refuses: Callable[[Groups, str], str | None]
    run: Meaning
    plain: bool = False  # made of torch operations without looking at sizes or values, so that it can be traced
    differentiable: bool = False  # made of differentiable torch operations, so that its own gradient can be taken
    gradients: Gradients | None = None  # its own, where it has some for what is wanted
    reads_stored: bool = False  # takes tensors as they lie: rows of bytes, rows that groups are made of
    source: Callable[[str], str] | None = None  # the text it is built from, of a spec; "" where it cannot say that
    # what it takes of the devices named, which it is then compiled for, and of those that it was compiled for before
    footprints: Callable[[Groups, str, Sequence[str]], tuple[Footprint, ...]] | None = None


@dataclass(frozen=True)
class Ran:
    """One call of a primitive: the kernel that was taken, "" for the eager meaning, and why others were not."""

    primitive: str
    kernel: str
    refused: tuple[tuple[str, str], ...]
    on_gpu: str = ""  # the kernel that a GPU would take for the same call
    refused_there: tuple[tuple[str, str], ...] = ()
    device: str = "cpu"


_WATCHED: ContextVar[list[Ran] | None] = ContextVar("_WATCHED", default=None)


@contextmanager
def watched() -> Iterator[list[Ran]]:
    """The calls of primitives inside, in order."""
    ran: list[Ran] = []
    token = _WATCHED.set(ran)
    try:
        yield ran
    finally:
        _WATCHED.reset(token)


@dataclass(frozen=True, eq=False)
class Primitive:
    """A registered op `reattend::name`; calling it runs the first kernel that fits, the eager meaning otherwise."""

    name: str
    groups: tuple[str, ...]  # argument names; a trailing * marks a list of tensors
    meaning: Meaning
    shapes: Meaning  # the same outputs, empty
    kernels: dict[str, list[Kernel]] = field(default_factory=dict)
    in_torch: list[InTorch] = field(default_factory=list)
    frugal: Meaning | None = None  # the meaning piece by piece, where the whole would hold much at once
    stored: Callable[[str], bool] = lambda spec: False  # whether tensors of a call are read as they lie
    in_numbers: Callable[[Groups, str], tuple[Groups, str]] = lambda groups, spec: (groups, spec)  # made of them

    def __post_init__(self) -> None:
        PRIMITIVES[self.name] = self
        arguments = ", ".join(f"Tensor[] {g[:-1]}" if g.endswith("*") else f"Tensor {g}" for g in self.groups)
        self._define(f"reattend::{self.name}", f"({arguments}, str spec) -> Tensor[]", self._run, self._empty)
        self._define(
            f"reattend::{self.name}_backward",
            "(Tensor[] grads, Tensor[] tensors, Tensor[] results, int[] counts, int[] outputs, int[] wanted, str spec)"
            " -> Tensor[]",
            self._gradients,
            lambda grads, tensors, results, counts, outputs, wanted, spec: [
                torch.empty_like(tensors[k]) for k in wanted
            ],
        )
        torch.library.register_autograd(f"reattend::{self.name}", self._backward, setup_context=self._remember)

    @staticmethod
    def _define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
        torch.library.custom_op(name, run, mutates_args=(), schema=schema)
        torch.library.register_fake(name, fake)

    @property
    def op(self) -> Any:
        return getattr(torch.ops.reattend, self.name).default

    def __call__(self, *arguments: Any) -> list[Tensor]:
        if _nobody_asks(arguments):
            return self._run(*arguments)
        result: list[Tensor] = self.op(*arguments)
        return result

    def choose(
        self, groups: Groups, spec: str, *, only: Callable[[Kernel], bool] | None = None, device: str = ""
    ) -> tuple[Kernel | None, list[tuple[str, str]]]:
        """The kernel that will run (None: the eager meaning) and why those before it do not fit."""
        refused: list[tuple[str, str]] = []
        for kernel in self.kernels.get(device or next(t.device.type for group in groups for t in group), []):
            if only is not None and not only(kernel):
                continue
            unread = self.stored(spec) and not kernel.reads_stored
            reason = "rows as they lie" if unread else kernel.refuses(groups, spec)
            if reason is None:
                return kernel, refused
            refused.append((kernel.name, reason))
        return None, refused

    def plainly(self, *arguments: Any) -> list[Tensor]:
        """The same in plain torch, for graphs that leave: the kernel that fits if it is such, or the meaning."""
        *tensors, spec = arguments
        groups = self._grouped(tensors)
        kernel, _ = self.choose(groups, spec, only=lambda kernel: kernel.plain)
        return (kernel.run if kernel else self.meaning)(groups, spec)

    def eagerly(self, *arguments: Any) -> list[Tensor]:
        """The eager meaning, whatever kernels there are."""
        *tensors, spec = arguments
        return self.meaning(self._grouped(tensors), spec)

    def _grouped(self, arguments: Sequence[Any]) -> Groups:
        return [a if isinstance(a, list | tuple) else [a] for a in arguments]

    def _run(self, *arguments: Any) -> list[Tensor]:
        *tensors, spec = arguments
        groups = self._grouped(tensors)
        kernel, refused = self.choose(groups, spec)
        if kernel is None and self.stored(spec):
            groups, spec = self.in_numbers(groups, spec)
            kernel, refused = self.choose(groups, spec)
        watching = _WATCHED.get()
        if watching is not None:
            there, refused_there = self.choose(groups, spec, device="cuda")
            names = [k.name if k else "" for k in (kernel, there)]
            on = next(t.device.type for group in groups for t in group)
            watching.append(Ran(self.name, names[0], tuple(refused), names[1], tuple(refused_there), on))
        taken = {t.untyped_storage()._cdata for group in groups for t in group}
        return [_own(r, taken) for r in (kernel.run if kernel else self.frugal or self.meaning)(groups, spec)]

    def _empty(self, *arguments: Any) -> list[Tensor]:
        *tensors, spec = arguments
        return self.shapes(self._grouped(tensors), spec)

    def _remember(self, ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        *tensors, spec = inputs
        groups = self._grouped(tensors)
        ctx.spec, ctx.counts = spec, [len(group) for group in groups]
        ctx.lists = [isinstance(t, list | tuple) for t in tensors]
        ctx.save_for_backward(*(t for group in groups for t in group), *output)

    def _backward(self, ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
        saved = list(ctx.saved_tensors)  # read once: a checkpoint gives them once
        tensors, results = saved[: sum(ctx.counts)], saved[sum(ctx.counts) :]
        present = [index for index, grad in enumerate(grads) if grad is not None]
        backward = getattr(torch.ops.reattend, f"{self.name}_backward").default
        needed = tree_leaves(ctx.needs_input_grad)  # one per tensor, in order, and the spec's
        wanted = [k for k, t in enumerate(tensors) if needed[k] and _learns(t)]
        given = [grads[k].contiguous() for k in present]  # type: ignore[union-attr]
        found = backward(given, tensors, results, ctx.counts, present, wanted, ctx.spec)
        flat: list[Tensor | None] = [None] * len(tensors)
        for k, gradient in zip(wanted, found, strict=True):
            flat[k] = gradient
        answer: list[Any] = []
        for count, is_list in zip(ctx.counts, ctx.lists, strict=True):
            group, flat = flat[:count], flat[count:]
            answer.append(group if is_list else group[0])
        return (*answer, None)

    def _gradients(
        self,
        grads: list[Tensor],
        tensors: list[Tensor],
        results: list[Tensor],
        counts: list[int],
        outputs: list[int],
        wanted: list[int],
        spec: str,
    ) -> list[Tensor]:
        own, _ = self.choose(_in_groups(tensors, counts), spec, only=lambda kernel: kernel.gradients is not None)
        if own is not None and own.gradients is not None:
            given = dict(zip(outputs, grads, strict=True))
            made = own.gradients(_in_groups(tensors, counts), spec, results, given, wanted)
            if made is not None:
                return [_like(tensors[k], g) for k, g in zip(wanted, made, strict=True)]
        leaves = [t.detach().requires_grad_(k in wanted) for k, t in enumerate(tensors)]
        groups = _in_groups(leaves, counts)
        kernel, _ = self.choose(groups, spec, only=lambda kernel: kernel.differentiable)
        with _autograd_inside_an_op():
            results = (kernel.run if kernel else self.meaning)(groups, spec)
        pairs = [(results[k], g) for k, g in zip(outputs, grads, strict=True) if results[k].requires_grad]
        learned = [leaves[k] for k in wanted]
        if not pairs:
            return [torch.zeros_like(t) for t in learned]
        found = torch.autograd.grad([r for r, _ in pairs], learned, [g for _, g in pairs], allow_unused=True)
        return [_like(t, g) for t, g in zip(learned, found, strict=True)]


def watching() -> bool:
    """Whether something looks at single operations: modes, transforms, tracers, autocast."""
    modes = _get_current_dispatch_mode_stack() or torch.overrides._get_current_function_mode_stack()
    transforms = torch._C._functorch.peek_interpreter_stack() is not None
    return bool(modes) or transforms or torch._C._get_tracing_state() is not None or torch.is_autocast_enabled("cpu")


def _keys(tensor: Tensor) -> int:
    found: int = torch._C._dispatch_keys(tensor).raw_repr()
    return found


def _plain_keys() -> frozenset[int]:
    with torch.inference_mode():
        inference = torch.empty(0)
    return frozenset((_keys(torch.empty(0)), _keys(inference)))


_PLAIN, _TYPES = _plain_keys(), (Tensor, Parameter)


def _nobody_asks(arguments: Sequence[Any]) -> bool:
    """Whether a call gives the same without torch's operator, whose layers cost more than a small kernel: no gradient,
    nothing that looks on, tensors that are nothing else.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0 or watching():
        return False
    learns = torch.is_grad_enabled()
    for a in arguments[:-1]:
        for t in a if isinstance(a, list | tuple) else (a,):
            if type(t) not in _TYPES or _keys(t) not in _PLAIN or (learns and t.requires_grad):
                return False
    return True


def _in_groups(tensors: Sequence[Tensor], counts: Sequence[int]) -> Groups:
    rest = list(tensors)
    return [[rest.pop(0) for _ in range(count)] for count in counts]


PRIMITIVES: dict[str, Primitive] = {}  # by name, as the operators are called


def called(target: Any) -> Primitive | None:
    """The primitive that a call in a graph is of."""
    return PRIMITIVES[target._opname] if is_overload(target) and target.namespace == "reattend" else None


def _own(result: Tensor, taken: set[int]) -> Tensor:
    """A result in memory of its own: an op may return neither its inputs nor one memory twice."""
    whole = result.contiguous()
    if whole.untyped_storage()._cdata in taken:
        whole = whole.clone()
    taken.add(whole.untyped_storage()._cdata)
    return whole


def _like(tensor: Tensor, gradient: Tensor | None) -> Tensor:
    """A gradient of its own memory with the strides that the fake promised."""
    filled = torch.zeros_like(tensor)
    return filled if gradient is None else filled.copy_(gradient)


def _learns(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


@contextmanager
def _autograd_inside_an_op() -> Iterator[None]:
    """An op's kernel runs with autograd switched off below it; a gradient that is recomputed needs it back."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield
