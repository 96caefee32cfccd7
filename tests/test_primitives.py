"""Every primitive is asked the same: registered rightly, exported with open sizes, compiled, differentiated, halved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reattend.compiler.primitives.attend import attend
from reattend.compiler.primitives.chosen import chosen
from reattend.compiler.primitives.gather import gather, scatter
from reattend.compiler.primitives.group import group
from reattend.compiler.primitives.merge import merge
from reattend.compiler.primitives.operator import Primitive
from reattend.compiler.primitives.prefix import prefix
from reattend.compiler.primitives.reduce_kv import reduce_kv
from reattend.compiler.primitives.route import route
from reattend.compiler.primitives.scan import scan
from reattend.compiler.symbols import table

B, H, D, DV = 2, 4, 4, 3
Tensors = list[Tensor]


@dataclass(frozen=True)
class Case:
    """A call on tensors of n rows; `draw` gives those tensors, `rows` says which dimension of each is n."""

    name: str
    call: Callable[..., Any]
    draw: Callable[[int, torch.dtype], Tensors]
    rows: tuple[int | None, ...]

    def outputs(self, tensors: Tensors) -> Tensors:
        found = self.call(*tensors)
        return list(found) if isinstance(found, tuple) else [found]


def qkv(n: int, kind: torch.dtype) -> Tensors:
    return [torch.randn(B, H, n, D, dtype=kind), *(torch.randn(B, 2, n, d, dtype=kind) for d in (D, DV))]


def numbers(n: int, *shape: int) -> Tensor:
    """Row numbers, some of no row."""
    return torch.randint(-1, max(n, 1), shape)


def masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor) -> Any:
    return attend(
        q,
        k,
        v,
        keep=lambda b, i, j: (i - j < 3) & table(seen)[b, j],
        score=lambda s, h, i, j: s + table(bias)[h] * (j - i),
        causal=True,
        outputs=("o", "lse", "colsum", "topk:2"),
    )


CASES = [
    Case("attend", lambda q, k, v: attend(q, k, v, causal=True, outputs=("o", "lse")), qkv, (2, 2, 2)),
    Case(
        "attend with tables",
        masked,
        lambda n, kind: [*qkv(n, kind), torch.rand(B, n) < 0.8, torch.rand(H, dtype=kind)],
        (2, 2, 2, 1, None),
    ),
    Case(
        "attend by a sum",
        lambda q, k, v: attend(q, k, v, weight=lambda s: s * s, normaliser="sum", eps=0.1, outputs=("o", "entropy")),
        qkv,
        (2, 2, 2),
    ),
    Case("scan", lambda q, k, v: scan(q, k, v, outputs=("o", "state")), qkv, (2, 2, 2)),
    Case(
        "scan with decay",
        lambda q, k, v, a, ids: scan(q, k, v, decay=a, reset=ids, feature=torch.exp, normaliser="sum"),
        lambda n, kind: [
            *qkv(n, kind),
            torch.rand(B, H, n, D, dtype=kind) * 0.8 + 0.1,
            (torch.rand(n) < 0.3).cumsum(0),
        ],
        (2, 2, 2, 2, 0),
    ),
    Case("scan, one state", lambda q, k, v: scan(q, k, v, causal=False), qkv, (2, 2, 2)),
    Case(
        "prefix affine",
        lambda a, x: prefix("affine", a, x),
        lambda n, kind: [torch.rand(B, H, n, 1, dtype=kind), torch.randn(B, H, n, D, dtype=kind)],
        (2, 2),
    ),
    Case(
        "prefix softmax",
        lambda s, v: prefix("softmax", s, v),
        lambda n, kind: [torch.randn(B, H, n, dtype=kind), torch.randn(B, H, n, D, dtype=kind)],
        (2, 2),
    ),
    Case(
        "merge",
        lambda o, o2, z, z2: merge([(o, z), (o2, z2)]),
        lambda n, kind: (
            [torch.randn(B, H, n, d, dtype=kind) for d in (DV, DV)]
            + [torch.randn(B, H, n, dtype=kind).masked_fill(torch.rand(n) < 0.2, -torch.inf) for _ in range(2)]
        ),
        (2, 2, 2, 2),
    ),
    Case(
        "merge of sums",
        lambda o, o2, z, z2: merge([(o, z), (o2, z2)], by="sum"),
        lambda n, kind: [torch.randn(B, H, n, *d, dtype=kind) for d in ((DV,), (DV,), (), ())],
        (2, 2, 2, 2),
    ),
    *(
        Case(
            f"group {combine} {padding}",
            lambda x, index, valid, c=combine, p=padding: group(x, index, valid=valid, combine=c, padding=p),
            lambda n, kind: [torch.randn(B, H, n, D, dtype=kind), numbers(n, B, 3, 2), torch.rand(B, n) < 0.8],
            (2, None, 1),
        )
        for combine, padding in (("assign", "mask"), ("sum", "zero"), ("mean", "mirror"), ("lse", "borrow"))
    ),
    Case(
        "reduce_kv",
        lambda k, v, index, w: reduce_kv(k, v, index, weights=w),
        lambda n, kind: [*qkv(n, kind)[1:], numbers(n, 3, 2), torch.rand(B, n, dtype=kind) + 0.1],
        (2, 2, None, 1),
    ),
    Case(
        "route",
        lambda scores, valid: route(scores, 3, valid=valid),
        lambda n, kind: [torch.randn(B, H, n, dtype=kind), torch.rand(B, 1, n) < 0.8],
        (2, 2),
    ),
    Case(
        "gather",
        gather,
        lambda n, kind: [torch.randn(B, H, n, D, dtype=kind), numbers(n, B, 5)],
        (2, None),
    ),
    Case(
        "chosen",
        chosen,
        lambda n, kind: [
            torch.randn(n, D, dtype=kind),
            torch.randint(-1, 4, (n, 2)),
            torch.randn(4, D, DV, dtype=kind),
        ],
        (0, 0, None),
    ),
    *(
        Case(
            f"scatter {reduce}",
            lambda x, index, into, r=reduce: scatter(x, index, into, reduce=r),
            lambda n, kind: [
                torch.randn(B, H, n, D, dtype=kind),
                torch.randint(-1, 4, (B, n)),
                torch.randn(B, H, 4, D, dtype=kind),
            ],
            (2, 1, None),
        )
        for reduce in ("add", "mean")
    ),
]
every = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


class Calls(torch.nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def forward(self, *tensors: Tensor) -> Tensors:
        return self.case.outputs(list(tensors))


@contextmanager
def told() -> Iterator[list[tuple[Primitive, tuple[Any, ...]]]]:
    """The ops that are called meanwhile, with their arguments."""
    calls: list[tuple[Primitive, tuple[Any, ...]]] = []
    original = Primitive.__call__

    def remember(self: Primitive, *arguments: Any) -> list[Tensor]:
        calls.append((self, arguments))
        return original(self, *arguments)

    Primitive.__call__ = remember  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        Primitive.__call__ = original  # type: ignore[method-assign]


def learning(tensors: Tensors) -> Tensors:
    return [t.requires_grad_() if t.is_floating_point() else t for t in tensors]


def same(got: Tensors, expected: Tensors, close: float) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=close, rtol=close, equal_nan=False)


@every
def test_the_op_is_registered_rightly(case: Case) -> None:
    with told() as calls:
        case.outputs(learning(case.draw(7, torch.float32)))
    assert len(calls) == 1
    primitive, arguments = calls[0]
    with torch.random.fork_rng():
        torch.library.opcheck(primitive.op, arguments, atol=1e-4, rtol=1e-4)


@every
def test_exported_with_open_sizes(case: Case) -> None:
    tensors = case.draw(7, torch.float32)
    open_sizes = [{} if rows is None else {rows: torch.export.Dim.AUTO} for rows in case.rows]
    with torch.no_grad():
        exported = torch.export.export(Calls(case), tuple(tensors), dynamic_shapes=(tuple(open_sizes),), strict=False)
    assert [n for n in exported.graph.nodes if "reattend" in str(n.target)]
    for n in (7, 12):
        tensors = case.draw(n, torch.float32)
        same(exported.module()(*tensors), case.outputs(tensors), 0.0)
    whole = torch.compile(exported.module(), backend="aot_eager", fullgraph=True, dynamic=False)
    same(whole(*tensors), case.outputs(tensors), 1e-6)


@every
def test_compiled_with_gradients(case: Case) -> None:
    def run(compiled: bool) -> tuple[Tensors, Tensors]:
        torch.manual_seed(0)
        tensors = learning(case.draw(6, torch.float32))
        torch.compiler.reset()  # every case compiles the same method of Calls
        call = torch.compile(Calls(case), backend="aot_eager", fullgraph=True) if compiled else Calls(case)
        outputs = call(*tensors)
        total = sum(o.masked_fill(o == -torch.inf, 0.0).square().sum() for o in outputs if o.requires_grad)
        return [o.detach() for o in outputs], list(torch.autograd.grad(total, [t for t in tensors if t.requires_grad]))

    for got, expected in zip(run(True), run(False), strict=True):
        same(got, expected, 1e-5)


@every
def test_gradients_are_those_of_the_numbers(case: Case) -> None:
    tensors = learning(case.draw(5, torch.float64))

    def finite(*given: Tensor) -> Tensors:
        found = [o for o in case.outputs(list(given)) if o.is_floating_point()]
        return [torch.where(o == -torch.inf, 0.0, o) for o in found]

    within = [t.detach().masked_fill(t.isinf(), -1.0) for t in tensors]  # at -inf there are no differences to take
    assert torch.autograd.gradcheck(finite, learning(within), atol=1e-6, rtol=1e-5, fast_mode=True)
    outputs = [o for o in finite(*tensors) if o.requires_grad]
    learned = [t for t in tensors if t.requires_grad]
    for gradient in torch.autograd.grad([o.sum() for o in outputs], learned, allow_unused=True):
        assert gradient is None or torch.isfinite(gradient).all()


@every
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_is_close(case: Case, kind: torch.dtype) -> None:
    narrow = case.draw(7, kind)
    wide = case.outputs([t.float() if t.is_floating_point() else t for t in narrow])
    for got, expected in zip(case.outputs(narrow), wide, strict=True):
        if expected.is_floating_point():
            torch.testing.assert_close(got.float(), expected, atol=0.03, rtol=0.03)
        else:
            assert torch.equal(got, expected)


@every
@pytest.mark.parametrize("n", [0, 1])
def test_no_rows_and_one(case: Case, n: int) -> None:
    tensors = learning(case.draw(n, torch.float32))
    with told() as calls:
        outputs = case.outputs(tensors)
    primitive, arguments = calls[0]
    promised = primitive._empty(*arguments)
    results = primitive(*arguments)
    assert [(o.shape, o.dtype) for o in results] == [(o.shape, o.dtype) for o in promised]
    assert not any(o.isnan().any() for o in outputs)
    kept = [o.masked_fill(o == -torch.inf, 0.0).sum() for o in outputs if o.requires_grad]
    for gradient in torch.autograd.grad(kept, [t for t in tensors if t.requires_grad], allow_unused=True):
        assert gradient is None or torch.isfinite(gradient).all()


def test_a_call_that_nobody_looks_at_leaves_out_the_operator() -> None:
    """The numbers are the same; whoever looks at single operations, or learns, sees the operator as before."""
    q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))
    seen: list[str] = []

    class Looks(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    asked = attend(q, k, v)
    with torch.no_grad():
        plain = attend(q, k, v)
        with Looks():
            watched = attend(q, k, v)
        turned = attend(torch._neg_view(q), k, v)
    assert torch.equal(asked, plain) and torch.equal(asked, watched) and "reattend.attend.default" in seen
    assert torch.equal(turned, attend(-q, k, v))
    assert attend(q.requires_grad_(), k, v).requires_grad
