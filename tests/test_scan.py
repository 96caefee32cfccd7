"""scan and prefix against the same recurrences, row by row in float64: values, gradients, continuation, memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import elu
from torch.utils._python_dispatch import TorchDispatchMode

from reattend.compiler.primitives.prefix import prefix, prefix_op
from reattend.compiler.primitives.scan import scan, scan_op, step
from reattend.compiler.primitives.scan_meaning import scan_meaning, scan_reference
from reattend.compiler.primitives.scan_spec import ScanSpec
from reattend.compiler.refusal import Refused

B, H, HKV, D, DV = 2, 4, 2, 5, 3
DECAYS: dict[str, Callable[[int], dict[str, Tensor]]] = {
    "none": lambda n: {},
    "per head": lambda n: {"decay": _leaf(torch.rand(H))},
    "per head and channel": lambda n: {"decay": _leaf(torch.rand(H, D))},
    "per row": lambda n: {"decay": _leaf(torch.rand(B, H, n))},
    "per row with zeros": lambda n: {"decay": _leaf(torch.rand(B, H, n) * (torch.rand(B, H, n) < 0.7))},
    "per row of key heads": lambda n: {"decay": _leaf(torch.rand(B, HKV, n))},
    "per row and channel": lambda n: {"decay": _leaf(torch.rand(B, H, n, D))},
    "logarithms": lambda n: {"log_decay": _leaf(-torch.rand(B, H, n, D) * 5)},
}


def _leaf(t: Tensor) -> Tensor:
    return t.double().requires_grad_()


def _rows(n: int, m: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    m = n if m is None else m
    shapes = ((B, H, n, D), (B, HKV, m, D), (B, HKV, m, DV))
    return tuple(_leaf(torch.rand(shape)) for shape in shapes)  # type: ignore[return-value]


def row_by_row(q: Tensor, k: Tensor, v: Tensor, how: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The recurrence as its formula says, on phi(q), phi(k)."""
    q, k = elu(q) + 1, elu(k) + 1
    k, v = (t.repeat_interleave(H // HKV, 1) for t in (k, v))
    n, total = q.shape[2], how.get("normaliser") == "sum"
    if total:
        v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    given_decay = how.get("decay", how["log_decay"].exp() if "log_decay" in how else torch.ones(1).double())
    decay = {
        1: lambda a: a[None, :, None, None].expand(B, H, n, D),
        2: lambda a: a[None, :, None, :].expand(B, H, n, D),
        3: lambda a: a.repeat_interleave(H // a.shape[1], 1)[..., None].expand(B, H, n, D),
        4: lambda a: a.expand(B, H, n, D),
    }[given_decay.ndim](given_decay.expand(H) if given_decay.shape == (1,) else given_decay)
    state = how.get("state", torch.zeros(B, H, D, v.shape[-1]).double())
    documents = how.get("reset", torch.zeros(B, n))
    valid = how.get("valid", torch.ones(B, n)) != 0
    rows = []
    for t in range(n):
        fresh = (documents[:, t] != documents[:, t - 1]) if t else torch.zeros(B, dtype=torch.bool)
        state = torch.where(fresh[:, None, None, None], 0.0, state)
        before = state
        added = decay[:, :, t, :, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        state = torch.where(valid[:, t, None, None, None], added, state)
        rows.append((q[:, :, t, None] @ (before if how.get("read") == "before" else state))[:, :, 0])
    o = torch.stack(rows, 2) if n else q.new_zeros(B, H, 0, v.shape[-1])
    if total:
        norm = o[..., -1:] + how.get("eps", 0.0)
        o = o[..., :-1] / torch.where(norm != 0, norm, 1.0)
    return o, state


FORMS = {
    "plain": {},
    "sum": {"normaliser": "sum", "eps": 0.1},
    "before": {"read": "before"},
    "sum before, packed": {"normaliser": "sum", "read": "before", "reset": True},
    "packed from a state": {"reset": True, "state": True},
    "padded sum from a state": {"normaliser": "sum", "valid": True, "state": True},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("n", [1, 11])
def test_values_and_gradients(n: int, decay: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reattend.compiler.primitives.scan_meaning.CHUNK", 4)  # several chunks and a ragged last one
    monkeypatch.setattr("reattend.compiler.primitives.scan_meaning.CHANNEL_CHUNK", 3)
    q, k, v = _rows(n)
    how: dict[str, Any] = {**FORMS[form], **DECAYS[decay](n)}
    leaves = [q, k, v, *(t for t in how.values() if isinstance(t, Tensor))]
    if "reset" in how:
        how["reset"] = (torch.rand(B, n) < 0.2).cumsum(-1)
    if "valid" in how:
        how["valid"] = torch.rand(B, n) < 0.7
    if "state" in how:
        how["state"] = _leaf(torch.rand(B, H, D, DV + (how.get("normaliser") == "sum")))
        leaves.append(how["state"])
    got = scan(q, k, v, feature=lambda x: elu(x) + 1, outputs=("o", "state"), **how)
    expected = row_by_row(q, k, v, how)
    probes = [torch.rand_like(e) for e in expected]
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)
    mine, theirs = (
        torch.autograd.grad(
            sum((x * w).sum() for x, w in zip(xs, probes, strict=True)),
            leaves,
            allow_unused=True,
            materialize_grads=True,
        )
        for xs in (got, expected)
    )
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-7)


@pytest.mark.parametrize("normaliser", ["none", "sum"])
@pytest.mark.parametrize("packed", [False, True])
def test_noncausal_rows_read_their_whole_document(normaliser: str, packed: bool) -> None:
    q, k, v = _rows(9, 9 if packed else 13)
    ids = torch.tensor([[0, 0, 0, 4, 4, 2, 2, 2, 2], [7, 7, 7, 7, 7, 7, 7, 7, 1]]) if packed else None
    got = scan(q, k, v, causal=False, normaliser=normaliser, reset=ids)
    weights = q @ k.repeat_interleave(2, 1).mT
    if ids is not None:
        weights = weights * (ids[:, None, :, None] == ids[:, None, None, :])
    if normaliser == "sum":
        weights = weights / weights.sum(-1, keepdim=True)
    expected = weights @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)
    probe = torch.rand_like(expected)
    for a, b in zip(*(torch.autograd.grad((x * probe).sum(), (q, k, v)) for x in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_the_reference_of_one_matrix_agrees() -> None:
    forms = product(("none", "sum"), ("after", "before"), (True, False), (1, D))
    for normaliser, read, causal, channels in forms:
        if causal or read == "after":
            q, k, v = (t.detach() for t in _rows(70))
            tables = [torch.rand(B, H, 70, channels).double(), (torch.rand(B, 70) < 0.1).cumsum(-1)]
            spec = ScanSpec(causal, decay="t0" if causal else "", documents="t1", normaliser=normaliser, read=read,
                            outputs=("o", "state", "norm")).text  # fmt: skip
            groups = [[q], [k, v], tables]
            for a, b in zip(scan_meaning(groups, spec), scan_reference(groups, spec), strict=True):
                torch.testing.assert_close(a, b)


@given(cuts=st.lists(st.integers(0, 9), max_size=4), seed=st.integers(0, 99))
def test_pieces_give_what_the_whole_gives(cuts: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = (t.detach() for t in _rows(9))
    decay = torch.rand(B, H, 9).double()
    o, state = scan(q, k, v, decay=decay, normaliser="sum", outputs=("o", "state"))
    rows, carried = [], None
    edges = [0, *sorted(cuts), 9]
    for start, stop in pairwise(edges):
        cut = slice(start, stop)
        piece, carried = step(
            q[:, :, cut], k[:, :, cut], v[:, :, cut], carried, decay=decay[:, :, cut], normaliser="sum"
        )
        rows.append(piece)
    torch.testing.assert_close(torch.cat(rows, 2), o)
    torch.testing.assert_close(carried, state)


def test_extreme_decays_stay_finite() -> None:
    q, k, v = (torch.rand(1, 1, 300, 4, requires_grad=True) for _ in range(3))
    for how in (
        {"log_decay": torch.full((1, 1, 300, 4), -1e4)},
        {"log_decay": torch.full((1, 1, 300), -math.inf)},
        {"decay": torch.zeros(1, 1, 300, 4)},
        {"log_decay": torch.full((1, 1, 300), -40.0)},
    ):
        a = next(iter(how.values())).requires_grad_()
        o = scan(q, k, v, **how)
        torch.testing.assert_close(o, (q * k).sum(-1, keepdim=True) * v)  # only the own key is left
        gradients = torch.autograd.grad(o.sum(), (q, k, v, a))
        assert all(bool(g.isfinite().all()) for g in gradients)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor made."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.size = max(
            [
                self.size,
                *(t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)),
            ]
        )
        return out


@pytest.mark.parametrize("channels", [1, 8])
def test_no_matrix_of_rows_by_rows(channels: int) -> None:
    n = 2048
    q = torch.rand(1, 1, n, 8)
    with Largest() as seen:
        scan_meaning([[q], [q, q], [torch.rand(1, 1, n, channels)]], ScanSpec(decay="t0", normaliser="sum").text)
    assert n * 8 <= seen.size <= n * 16


def test_precision_of_halves_is_that_of_the_inputs() -> None:
    q, k, v = (t.detach().float() for t in _rows(200))
    whole = scan(q, k, v, decay=torch.rand(H), normaliser="sum", outputs=("o", "state"))
    torch.manual_seed(0)
    for kind, tolerance in ((torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
        decay = torch.rand(H)
        o, state = scan(*(t.to(kind) for t in (q, k, v)), decay=decay, normaliser="sum", outputs=("o", "state"))
        o32, state32 = scan(q, k, v, decay=decay, normaliser="sum", outputs=("o", "state"))
        assert o.dtype == kind and state.dtype == torch.float32
        torch.testing.assert_close(o.float(), o32, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(state, state32, atol=tolerance, rtol=tolerance)
    assert whole[0].shape == (B, H, 200, DV)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "both decays": ({"decay": torch.ones(H), "log_decay": torch.ones(H)}, "decay and log_decay"),
    "unordered decay": ({"decay": torch.ones(H), "causal": False}, "without an order"),
    "unordered read": ({"read": "before", "causal": False}, "without an order"),
    "normaliser": ({"normaliser": "sums"}, "did you mean 'sum'"),
    "decay of heads": ({"decay": torch.ones(3)}, r"a decay of shape \(3,\): H = 4 or 2"),
    "decay of dimensions": ({"decay": torch.ones(1, 1, 1, 1, 1)}, "5 dimensions"),
    "reset": ({"reset": torch.zeros(2, 3)}, r"reset of shape \(2, 3\)"),
    "state": ({"state": torch.zeros(B, H, D, DV), "normaliser": "sum"}, r"fits|\(B, 4, 5, 4\)"),
    "output": ({"outputs": ("stat",)}, "did you mean 'state'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_scan_refuses_in_words(name: str) -> None:
    how, words = REFUSED[name]
    with pytest.raises(Refused, match=words):
        scan(*_rows(5), **how)
    with pytest.raises(Refused, match="6 queries, 5 keys"):
        scan(*_rows(6, 5))


# --- prefix -----------------------------------------------------------------------------------------------------------


def _prefix_rows(n: int) -> dict[str, list[Tensor]]:
    x, v = _leaf(torch.randn(B, H, n, D)), _leaf(torch.randn(B, H, n, D))
    logits = torch.randn(B, H, n).double() * 9
    logits[:, :, :2] = -math.inf
    return {
        "sum": [x],
        "max": [x],
        "affine": [_leaf(torch.rand(B, H, n, D)), x],
        "softmax": [logits.requires_grad_(), v],
    }


def _stretch(monoid: str, rows: list[Tensor], inside: slice) -> Tensor:
    """What the rows of one stretch combine to, by the formula."""
    x = [t[:, :, inside] for t in rows]
    if monoid == "sum":
        return x[0].sum(2)
    if monoid == "max":
        return x[0].amax(2)
    if monoid == "softmax":
        return torch.nan_to_num(torch.softmax(x[0], -1))[:, :, None].matmul(x[1])[:, :, 0]
    after = x[0].flip(2).cumprod(2).roll(1, 2).flip(2)
    after[:, :, -1] = 1.0
    return (after * x[1]).sum(2)


@pytest.mark.parametrize("monoid", ["sum", "max", "affine", "softmax"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("n", [1, 6, 13])
def test_prefixes(n: int, packed: bool, monoid: str) -> None:
    rows = _prefix_rows(n)[monoid]
    ids = torch.arange(n) // 5 if packed else None
    got = prefix(monoid, *rows, reset=ids)
    o = got[0] if monoid == "softmax" else got
    expected = torch.stack([_stretch(monoid, rows, slice(t // 5 * 5 if packed else 0, t + 1)) for t in range(n)], 2)
    torch.testing.assert_close(o, expected)
    probe = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad((x * probe).sum(), rows) for x in (o, expected)), strict=True):
        torch.testing.assert_close(a, torch.nan_to_num(b))
    if monoid == "softmax" and not packed:
        torch.testing.assert_close(got[1], rows[0].logcumsumexp(-1))


@pytest.mark.parametrize("monoid", ["sum", "max", "affine", "softmax"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_prefixes_continue_from_a_state(packed: bool, reverse: bool, monoid: str) -> None:
    rows = [t.detach() for t in _prefix_rows(11)[monoid]]
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2]) if packed else None

    def run(cut: slice, state: list[Tensor] | None) -> list[Tensor]:
        found = prefix(monoid, *(t[:, :, cut] for t in rows), reverse=reverse, state=state,
                       reset=None if ids is None else ids[cut])  # fmt: skip
        return list(found) if isinstance(found, tuple) else [found]

    whole = run(slice(None), None)
    early, late = (slice(6, None), slice(0, 6)) if reverse else (slice(0, 6), slice(6, None))
    first = run(early, None)
    last = run(late, [t[:, :, :1] if reverse else t[:, :, -1:] for t in first])
    for a, b, c in zip(whole, first, last, strict=True):
        torch.testing.assert_close(torch.cat((c, b) if reverse else (b, c), 2), a)


def test_prefix_refuses_in_words() -> None:
    x = torch.zeros(1, 1, 3, 2)
    with pytest.raises(Refused, match="did you mean 'softmax'"):
        prefix("softmx", x)
    with pytest.raises(Refused, match="1 tensors: 2"):
        prefix("affine", x)
    with pytest.raises(Refused, match="rows \\(B, H, N, D\\)"):
        prefix("softmax", x, x)


# --- as operators -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["scan", "prefix"])
def test_op_is_well_behaved(op: str) -> None:
    q, k, v = (torch.randn(2, 2, 5, 3, requires_grad=True) for _ in range(3))
    ids, state = torch.tensor([0, 0, 1, 1, 1]), torch.randn(2, 2, 3, 4, requires_grad=True)
    decay = torch.rand(2, 2, 5, 1, requires_grad=True)
    spec = ScanSpec(decay="t0", documents="t1", state="t2", normaliser="sum", eps=9.0, outputs=("o", "state", "norm"))
    arguments = {
        "scan": (q, [k, v], [decay, ids, state], spec.text),
        "prefix": ([q[..., 0].detach().requires_grad_(), v], [ids], '{"documents":"t0","monoid":"softmax"}'),
    }[op]
    torch.library.opcheck({"scan": scan_op, "prefix": prefix_op}[op].op, arguments)


class Both(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        o, state = scan(q, k, v, decay=a, feature=lambda x: elu(x) + 1, normaliser="sum", outputs=("o", "state"))
        p, lse = prefix("softmax", q[..., 0], v, state=(o[:, :, :1], o[:, :, :1, 0]))
        return o, state, p, lse, prefix("affine", a[..., None], v, reverse=True)


def test_exported_with_open_sizes_and_compiled() -> None:
    def inputs(b: int, n: int) -> tuple[Tensor, ...]:
        return *(torch.randn(b, 2, n, 3) for _ in range(3)), torch.rand(b, 2, n)

    auto = torch.export.Dim.AUTO
    ep = torch.export.export(Both(), inputs(2, 6), dynamic_shapes=({0: auto, 2: auto},) * 4, strict=False)
    compiled = torch.compile(Both(), backend="aot_eager", dynamic=True, fullgraph=True)
    for size in ((3, 9), (2, 70)):
        x = tuple(t.requires_grad_() for t in inputs(*size))
        expected = Both()(*x)
        for found in (ep.module()(*x), compiled(*x)):
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)
        sums = [sum(t.square().sum() for t in outputs) for outputs in (expected, compiled(*x))]
        for a, b in zip(*(torch.autograd.grad(s, x) for s in sums), strict=True):
            torch.testing.assert_close(a, b)


def test_no_rows_leave_the_state_as_it_was() -> None:
    q, state = torch.zeros(2, 2, 0, 3), torch.randn(2, 2, 3, 3)
    o, after = scan(q, q, q, state=state, outputs=("o", "state"))
    assert o.shape == (2, 2, 0, 3) and torch.equal(after, state) and after is not state
    assert prefix("sum", q).shape == q.shape


@pytest.mark.parametrize("kind", ["none", "per head", "per head and channel"])
@pytest.mark.parametrize("n", [1, 3, 9])
def test_fewer_queries_than_keys_are_the_last_rows(kind: str, n: int) -> None:
    q, k, v = _rows(9)
    how: dict[str, Any] = {"feature": lambda x: torch.relu(x) + 1.0, "normaliser": "sum", **DECAYS[kind](9)}
    how["valid"] = torch.tensor([0, 1, 1, 0, 1, 1, 1, 1, 1])
    whole, state, norm = scan(q, k, v, outputs=("o", "state", "norm"), **how)
    o, last, divisor = scan(q[:, :, 9 - n :], k, v, outputs=("o", "state", "norm"), **how)
    torch.testing.assert_close((o, last, divisor), (whole[:, :, 9 - n :], state, norm[:, :, 9 - n :]))
    with pytest.raises(Refused, match="at most as many queries as keys"):
        scan(q, k[:, :, :5], v[:, :, :5])
    with pytest.raises(Refused, match="a decay of 4 rows, 9 keys"):
        scan(q[:, :, 5:], k, v, decay=torch.rand(B, H, 4).double())
