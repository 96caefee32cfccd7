"""What a GPU's kernels are not made for is refused with the reason and torch runs it; nothing fails in a launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton_interpreter  # noqa: F401 (kernels run in Python)
from kernel_calls import drawn, same, wide
from torch import Tensor, nn
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from reattend import optimize
from reattend.codegen.triton import launching
from reattend.codegen.triton.launching import recorded
from reattend.codegen.used import calls_of, used
from reattend.compiler.kernel_status import by_torch
from reattend.compiler.primitives.attend import Segment, attend
from reattend.compiler.primitives.merge import merge
from reattend.compiler.primitives.operator import PRIMITIVES, Kernel, Ran
from reattend.compiler.primitives.qlinear import qlinear
from reattend.compiler.primitives.qlinear_spec import QLinearSpec
from reattend.compiler.primitives.scan import scan
from reattend.compiler.refusal import Refused
from reattend.compiler.symbols import table

N, H = 20, 2


def rows(dim: int, tokens: int = N, heads: int = H, batch: int = 1) -> Tensor:
    return drawn(batch, heads, tokens, dim)


def self_attend(x: Tensor, **how: Any) -> Callable[[], object]:
    return partial(attend, x, x, x, causal=True, **how)


def with_table(t: Tensor) -> Callable[[], object]:
    return self_attend(rows(16), score=lambda s, h: s + table(t)[h])


def taken(call: Callable[[], object]) -> tuple[Kernel | None, list[tuple[str, str]], Any, str]:
    """What a GPU would run for a call, why not another, and what the call hands to its primitive."""
    (asked,) = calls_of(call)
    return *PRIMITIVES[asked.primitive].choose(asked.groups, asked.text, device="cuda"), asked.groups, asked.text


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a head of 512": (self_attend(rows(512), score=torch.tanh), "a head of 512, at most 256"),
    "values of 512": (lambda: attend(rows(16), rows(16), rows(512), score=torch.tanh), "a head of 512, at most 256"),
    "a state of 512": (lambda: scan(rows(512), rows(512), rows(16)), "a state of 512 x 16, at most 256 x 256"),
    "a row of 513": (lambda: merge([(rows(513), drawn(1, H, N))] * 2), "rows of 513, at most 512"),
    "float64": (self_attend(rows(16).double(), score=torch.tanh), "torch.float64"),
    "a state of float64": (lambda: scan(*[rows(16).double()] * 3), "torch.float64"),
    "a state of whole numbers": (lambda: scan(*[torch.ones(1, H, N, 4, dtype=torch.int32)] * 3), "torch.int32"),
    "a linear layer of float64": (
        lambda: qlinear(drawn(3, 64).double(), [torch.ones(8, 64, dtype=torch.int8), torch.ones(8).double()],
                        QLinearSpec("int8", 64)),
        "torch.float64",
    ),
    "no batch": (self_attend(rows(16, batch=0), score=torch.tanh), "no rows"),
    "no queries": (lambda: attend(rows(16, 0), rows(16), rows(16), score=torch.tanh), "no rows"),
    "no keys": (lambda: attend(rows(16), rows(16, 0), rows(16, 0), score=torch.tanh), "no rows"),
    "a segment without keys": (self_attend(rows(16), segments=[Segment(rows(16, 0), rows(16, 0))]), "no rows"),
    "no rows in a state": (lambda: scan(*[rows(16, 0)] * 3), "no rows"),
    "a table of complex numbers": (with_table(drawn(H).to(torch.complex64)), "a tensor of torch.complex64"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Casting complex values:UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_cannot_take_is_refused_and_torch_runs_it(name: str) -> None:
    call, reason = REFUSED[name]
    _, refused, groups, text = taken(call)
    assert ("generated Triton", reason) in refused
    (asked,) = calls_of(call)
    made = PRIMITIVES[asked.primitive].meaning(groups, text)
    assert all(t.shape == e.shape for t, e in zip(made, PRIMITIVES[asked.primitive].shapes(groups, text), strict=True))


def test_a_tensor_elsewhere_is_named() -> None:
    x, far = rows(16), torch.empty(H, device="meta")
    assert launching.unfit([[x], [x, x], [far]]) == "a tensor on meta beside one on cpu"
    assert launching.unfit([[x], [x, x], [drawn(H)]]) is None


def test_a_gpu_without_products_of_bfloat16_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    launching._too_old.cache_clear()
    assert launching._too_old(torch.device("cuda")) == "a GPU of compute capability 7.5, at least 8.0"
    launching._too_old.cache_clear()


FRONTS: dict[str, tuple[Callable[[], object], str]] = {
    "whole numbers": (self_attend(torch.ones(1, H, N, 16, dtype=torch.int64)), "rows of torch.int64: torch.float32"),
    "no heads": (self_attend(rows(16, heads=0)), "at least one head"),
    "another batch": (lambda: attend(rows(8, batch=2), rows(8, batch=3), rows(8, batch=3)), "q of a batch of 2"),
    "another batch of a state": (lambda: scan(rows(8), *[rows(8, batch=3)] * 2), "q of a batch of 1, keys of 3"),
    "few positions": (self_attend(rows(8), q_positions=torch.arange(12)), r"q_positions of shape \(12,\): B = 1"),
    "positions of keys": (self_attend(rows(8), k_positions=torch.ones(3, N)), r"k_positions of shape \(3, 20\)"),
    "few key heads": (self_attend(rows(8), kv_heads=torch.tensor([0])), "a table of 1 key heads: one for each of 2"),
}


@pytest.mark.parametrize("name", FRONTS)
def test_what_has_no_meaning_is_refused_in_front(name: str) -> None:
    call, reason = FRONTS[name]
    with pytest.raises(Refused, match=reason):
        call()


# --- odd, and taken ---------------------------------------------------------------------------------------------------

TAKEN: dict[str, Callable[[], object]] = {
    "a head of 7": self_attend(rows(7), score=torch.tanh),
    "a head of 1": self_attend(rows(1), score=torch.tanh),
    "a head of 250": self_attend(rows(250), score=torch.tanh),
    "a head of 256": self_attend(rows(256), score=torch.tanh),
    "one token": self_attend(rows(16, 1), score=torch.tanh),
    "one token of many": lambda: attend(rows(16, 1), rows(16), rows(16), align="end", causal=True, score=torch.tanh),
    "channels before rows": self_attend(rows(N, 16).mT, score=torch.tanh),
    "every second channel": self_attend(rows(32)[..., ::2], score=torch.tanh),
    "rows before heads": self_attend(drawn(1, N, H, 16).transpose(1, 2), score=torch.tanh),
    "one row for all": self_attend(rows(16, 1, 1).expand(2, H, N, 16), score=torch.tanh),
    "keys of one batch for all": lambda: attend(rows(16, batch=3), rows(16), rows(16), score=torch.tanh),
    "a table of float64": with_table(drawn(H).double()),
    "a table of truths": with_table(drawn(H) > 0),
    "a state of 7": lambda: scan(rows(7), rows(7), rows(5), log_decay=-drawn(1, H, N).abs()),
    "a state of 256": lambda: scan(rows(256), rows(256), rows(8)),
    "one row of a state": lambda: scan(*[rows(16, 1)] * 3),
    "a state, channels before rows": lambda: scan(*[rows(N, 16).mT] * 3),
}


@pytest.mark.parametrize("name", TAKEN)
def test_odd_tensors_mean_what_they_mean_in_torch(name: str) -> None:
    kernel, _, groups, text = taken(TAKEN[name])
    assert kernel is not None and kernel.name == "generated Triton" and kernel.gradients is not None
    results, exact = kernel.run(groups, text), wide(groups)
    wanted = [n for n, t in enumerate(t for group in groups for t in group) if t.is_floating_point()]
    leaves = [t.requires_grad_() for group in exact for t in group if t.is_floating_point()]
    (asked,) = calls_of(TAKEN[name])
    expected = PRIMITIVES[asked.primitive].meaning(exact, text)
    same(results, [t.detach() for t in expected], 5e-6)
    found = kernel.gradients(groups, text, results, {0: torch.ones_like(results[0])}, wanted)
    assert found is not None
    same(list(found), list(torch.autograd.grad(expected[0].sum(), leaves)), 1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a head of 7", "a head of 256", "a state of 7", "a state of 256"])
def test_a_source_is_there_for_every_target(name: str) -> None:
    (call,) = calls_of(TAKEN[name])
    for target in ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942"):
        assert used(call, target).sources and not used(call, target).refused


def test_heads_that_lie_far_apart_are_found() -> None:
    """The third head begins 2 ** 31 numbers behind the first: an offset of 32 bits does not reach it."""
    try:
        memory = np.zeros(2 * 2**30 + N * 16, dtype=np.float16)  # of which only what is written to becomes real
    except MemoryError:
        pytest.skip("no room for 4 GiB of addresses")
    x = torch.from_numpy(memory).as_strided((1, 3, N, 16), (0, 2**30, 16, 1))
    x.copy_(rows(16, heads=3))
    for call in (self_attend(x, score=torch.tanh), lambda: scan(x, x, x)):
        kernel, _, groups, text = taken(call)
        assert kernel is not None
        (asked,) = calls_of(call)
        same(kernel.run(groups, text), PRIMITIVES[asked.primitive].meaning(wide(groups), text), 2e-3)
        ours = kernel.gradients(groups, text, kernel.run(groups, text), {0: x.clone()}, (0, 1, 2))  # type: ignore[misc]
        plain = [t.contiguous() for t in (x, x, x)]
        again = kernel.gradients([plain[:1], plain[1:], []], text, kernel.run(groups, text), {0: x.clone()}, (0, 1, 2))  # type: ignore[misc]
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))  # type: ignore[arg-type]


def test_rows_that_lie_too_far_apart_are_refused() -> None:
    memory = torch.zeros(1).expand(1, 1, 2, 16)
    far = memory.as_strided((1, 1, 2, 16), (0, 0, 0, 0))
    assert taken(self_attend(far, score=torch.tanh))[0] is not None
    x = torch.from_numpy(np.zeros(2**24 + 16, dtype=np.float16)).as_strided((1, 1, 2, 16), (0, 0, 2**24, 1))
    assert ("generated Triton", "rows that lie 2 ** 24 numbers apart") in taken(self_attend(x, score=torch.tanh))[1]


def test_more_heads_than_a_second_axis_has_programs() -> None:
    """A launch has 2 ** 31 programs on its first axis, 65,535 on any other."""
    x = torch.zeros(1).expand(40000, 2, 1, 1)
    for call in (self_attend(x, score=torch.tanh), lambda: scan(x, x, x)):
        kernel, _, groups, text = taken(call)
        assert kernel is not None and kernel.gradients is not None
        with recorded("cuda:90") as launches:
            results = kernel.run(groups, text)
            kernel.gradients(groups, text, results, {0: results[0]}, (0, 1, 2))
        assert all(axis < 65536 for _, _, grid, _ in launches for axis in grid[1:])


# --- a kernel that a device turns out not to take ---------------------------------------------------------------------


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> Iterator[None]:
    class Fails:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(**given: Any) -> None:
                raise error

            return launch

    names = ("forward", "rows_alone", "share", "join", "back_queries", "back_keys", "scan", "merge")
    with monkeypatch.context() as patch:
        patch.setattr(launching, "loaded", lambda source: SimpleNamespace(**{name: Fails() for name in names}))
        yield


ERRORS = {
    "no room": OutOfResources(300_000, 232_448, "shared memory"),
    "no assembly": PTXASError("ptxas fatal"),
    "no syntax": CompilationError(None, None, "said so"),
    "no code": RuntimeError("PassManager::run failed"),
}
CALLS: dict[str, Callable[[], object]] = {
    "attend": self_attend(rows(16), score=torch.tanh),
    "one token": lambda: attend(rows(16, 1), rows(16, 4096), rows(16, 4096), score=torch.tanh),
    "scan": lambda: scan(*[rows(16)] * 3),
    "merge": lambda: merge([(rows(16), drawn(1, H, N))] * 2),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("error", ERRORS)
def test_torch_runs_what_a_device_has_no_kernel_for(error: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (asked,) = calls_of(CALLS[name])
    kernel, _, groups, text = taken(CALLS[name])
    assert kernel is not None
    expected = PRIMITIVES[asked.primitive].meaning(groups, text)
    with failing(monkeypatch, ERRORS[error]):
        assert all(map(torch.equal, kernel.run(groups, text), expected))
        if kernel.gradients is not None:
            assert kernel.gradients(groups, text, expected, {0: expected[0]}, (0, 1, 2)) is None


def test_another_error_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, _, groups, text = taken(CALLS["attend"])
    assert kernel is not None
    with failing(monkeypatch, RuntimeError("an illegal memory access")), pytest.raises(RuntimeError, match="illegal"):
        kernel.run(groups, text)


# --- what a reader is told --------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Attention with a head of 512."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 512) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (of(x).unflatten(-1, (1, 512)).transpose(1, 2) for of in (self.q, self.k, self.v))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_a_report_on_a_gpu_says_what_torch_runs_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = [Ran("attend", "", (("generated Triton", "a head of 512, at most 256"),), device="cuda")] * 2
    assert by_torch(ran) == ("attend in plain torch (a head of 512, at most 256)",)
    assert by_torch([Ran("attend", "generated Triton", (), device="cuda"), Ran("attend", "", ())]) == ()
    monkeypatch.setattr("reattend.compiler.rewriting.by_torch", partial(by_torch, device="cpu"))
    monkeypatch.setitem(PRIMITIVES["attend"].kernels, "cpu", PRIMITIVES["attend"].kernels["cuda"][1:2])
    recipe = {"version": 1, "sites": [{"match": "*", "attention": {"window": {"window": 4, "sinks": 0}}}]}
    fast = optimize(Wide(), recipe, drawn(1, N, 8))
    assert "attend in plain torch (a head of 512, at most 256)" in str(fast.report)
