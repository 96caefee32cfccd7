"""What makes a graph of its own, what is refused, and what such a refusal names; two threads at once."""

from __future__ import annotations

import copy
import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reattend
from reattend.compiler.capture import Captured, capture
from reattend.compiler.hosted import host
from reattend.compiler.refusal import Refused
from reattend.compiler.signature import Call
from reattend.compiler.turns import Turns


def identity(model: nn.Module, call: Call) -> Captured:
    return capture(model, call.args, call.kwargs)


class Scaled(nn.Module):
    """A Python number scales the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Any = 1.0, times: int = 1, keep: Tensor | None = None) -> Tensor:
        out = self.linear(x) * scale * times
        return out if keep is None else out * keep


class Attends(nn.Module):
    """Self-attention over rows or over the pixels of an image, causal where asked."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        rows = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
        q, k, v = self.qkv(rows).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return out.transpose(1, 2).flatten(2)


def everywhere(attention: Any) -> dict[str, Any]:
    return {"version": 1, "sites": [{"match": "*", "attention": attention}]}


X = torch.randn(3, 4)


def refusal(call: Any) -> str:
    with pytest.raises(Refused) as caught:
        call()
    return str(caught.value)


# --- the limit and freeze() -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "values"), [("scale", [0.1 * k for k in range(1, 6)]), ("times", range(2, 7))])
def test_a_number_that_changes_with_every_call_hits_a_limit_that_names_it(name: str, values: Any) -> None:
    fast = host(Scaled().eval(), identity, limit=3)
    first, *rest = values
    fast(X, **{name: first})
    for value in rest[:2]:
        fast(X, **{name: value})
    said = refusal(lambda: fast(X, **{name: rest[2]}))
    assert "signature 4 of at most 3" in said and f"{name} is {rest[2]!r}, captured: {first!r}, {rest[0]!r}" in said
    assert f"give {name} as a tensor" in said and "max_signatures=6" in said
    assert len(fast.signatures) == 3
    again = torch.tensor(rest[2])
    other = host(Scaled().eval(), identity, limit=1)
    other.linear = fast.linear
    for value in values:
        torch.testing.assert_close(other(X, **{name: again * value}), fast.linear(X) * again * value)
    assert len(other.signatures) == 1


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: m(X, 2.0), "scale is 2.0, captured: not given"),
        (lambda m: m(X.double()), "x is float64 2d, captured: float32 2d"),
        (lambda m: m(X[None]), "x is float32 3d, captured: float32 2d"),
        (lambda m: m(X, keep=X), "keep is float32 2d, captured: not given"),
        (lambda m: m.train()(X), "mode is train, captured: eval"),
        (lambda m: m.bfloat16()(X), "weights is bfloat16, captured: float32"),
    ],
    ids=["constant", "dtype", "rank", "tensor", "mode", "weights"],
)
def test_frozen_and_full_name_the_argument_that_differs(call: Any, says: str) -> None:
    full, frozen = (host(Scaled().eval(), identity, limit=1) for _ in range(2))
    full(X), frozen(X)
    frozen.freeze()
    for fast, way_out in ((full, "max_signatures=2"), (frozen, "before freeze()")):
        said = refusal(lambda fast=fast: call(fast))
        assert says in said and "(x: float32 2d) eval float32" in said and way_out in said


def test_the_call_closest_to_those_captured_is_compared() -> None:
    fast = host(Scaled().eval(), identity, limit=2)
    fast(X)
    fast(X, 2.0, 3, X)
    said = refusal(lambda: fast(X, 2.0, 4, X))
    assert "times is 4, captured: not given, 3" in said and "scale is" not in said


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_one_graph_serves_sizes_of_zero_one_two_and_many() -> None:
    model = Attends().eval()
    fast = reattend.optimize(model, "exact", torch.randn(2, 5, 8), measure=False)
    for batch, length in ((1, 1), (2, 1), (1, 7), (0, 3), (2, 2), (5, 300)):
        x = torch.randn(batch, length, 8)
        torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=0)
    assert len(fast.signatures) == 1


def test_another_image_size_has_a_graph_of_its_own_once() -> None:
    model = Attends().eval()
    fast = reattend.optimize(model, "exact", torch.randn(2, 8, 4, 4), measure=False, max_signatures=2)
    for height, width in ((4, 4), (6, 4), (4, 4), (6, 4)):
        x = torch.randn(3, 8, height, width)
        torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=0)
    assert len(fast.signatures) == 2 and "x dim 2 = 6" in str(fast.signatures[1])
    said = refusal(lambda: fast(torch.randn(2, 8, 9, 4)))
    assert "at most 2" in said and "x dim 2 is 9, captured: not given, 6" in said


def test_a_size_that_the_model_does_not_take_names_both_sizes_and_its_own_error() -> None:
    fast = host(Scaled().eval(), identity)
    fast(X)
    said = refusal(lambda: fast(torch.randn(3, 5)))
    assert said.startswith("x: dim 1 is 5: captured with 4") and "RuntimeError" in said
    assert len(fast.signatures) == 1


# --- a recipe that cannot hold ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_a_noncausal_mechanism_does_not_hold_for_a_causal_call() -> None:
    fast = reattend.optimize(Attends().eval(), everywhere({"agent": {"agent_num": 4}}), torch.randn(2, 9, 8))
    said = refusal(lambda: fast(torch.randn(2, 9, 8), causal=True))
    assert "does not hold" in said and "agent is noncausal" in said and "causal=True" in said
    assert len(fast.signatures) == 1


def test_rules_that_decide_otherwise_in_a_new_signature_do_not_hold() -> None:
    rules = [
        {"match": {"kind": "causal-self"}, "attention": {"window": {"window": 2, "sinks": 0}}},
        {"match": {"kind": "noncausal-self"}, "attention": "sigmoid"},
    ]
    fast = reattend.optimize(Attends().eval(), {"version": 1, "sites": rules}, torch.randn(2, 9, 8), measure=False)
    said = refusal(lambda: fast(torch.randn(2, 9, 8), causal=True))
    assert "does not hold" in said and "sigmoid" in said and "window" in said


class Patches(nn.Module):
    """Attention over the patches of an image of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend = nn.Conv2d(3, 8, 4, 4), Attends()

    def forward(self, image: Tensor) -> Tensor:
        return self.attend(self.embed(image))


def test_a_grid_mechanism_with_another_image_size_raises() -> None:
    model = Patches().eval()
    fast = reattend.optimize(model, everywhere({"agent": {"agent_num": 4}}), torch.randn(2, 3, 16, 16), measure=False)
    said = refusal(lambda: fast(torch.randn(2, 3, 24, 24)))
    assert "does not hold at attend" in said and "(1, 2, 4, 4, 1), these sizes need (1, 2, 4, 6, 1)" in said
    assert len(fast.signatures) == 1
    assert reattend.optimize(model, "exact", torch.randn(2, 3, 16, 16))(torch.randn(2, 3, 24, 24)).shape == (2, 36, 8)


# --- captured at the first call ---------------------------------------------------------------------------------------


def test_without_inputs_the_first_call_decides() -> None:
    model = Attends().eval()
    fast = reattend.optimize(model, "exact")
    assert "no call has been captured yet" in refusal(lambda: fast.report)
    assert len(fast.sites) == 0 and fast.signatures == ()
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=0)
    assert fast.report.verdict().startswith("1 of 1 sites rewritten") and len(fast.sites) == 1


def test_without_inputs_a_recipe_that_does_not_fit_is_refused_at_the_first_call() -> None:
    fast = reattend.optimize(Attends().eval(), everywhere({"agent": {"agent_num": 4}}))
    assert "agent is noncausal" in refusal(lambda: fast(torch.randn(2, 5, 8), causal=True))


# --- threads ----------------------------------------------------------------------------------------------------------


def test_threads_that_need_different_graphs_get_right_answers() -> None:
    model = Attends().eval()
    fast = reattend.optimize(model, "exact", torch.randn(2, 5, 8), measure=False)
    weight, bias = model.qkv.weight.detach().clone(), model.qkv.bias.detach().clone()
    wrong: list[str] = []

    def work(number: int) -> None:
        draw = torch.Generator().manual_seed(number)
        for turn in range(6):
            x = torch.randn(2, 3 + turn, 8, generator=draw)
            causal = bool((number + turn) % 2)
            with torch.no_grad():
                apart = float((fast(x, causal=causal) - expected(weight, bias, x, causal)).abs().max())
            if apart > 1e-5:
                wrong.append(f"{number}.{turn}: {apart}")

    threads = [threading.Thread(target=_kept(work, wrong), args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(fast.signatures) == 2


def expected(weight: Tensor, bias: Tensor, x: Tensor, causal: bool) -> Tensor:
    """By plain functions of the weights: the modules themselves may be in a trace just now."""
    q, k, v = nn.functional.linear(x, weight, bias).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2).flatten(2)


def _kept(work: Any, wrong: list[str]) -> Any:
    def run(number: int) -> None:
        try:
            work(number)
        except Exception as error:
            wrong.append(f"{number}: {type(error).__name__}: {error}")

    return run


def test_a_capture_waits_for_calls_and_calls_for_a_capture() -> None:
    turns, seen = Turns(), []
    inside, leave = threading.Event(), threading.Event()

    def call() -> None:
        with turns.beside():
            inside.set()
            leave.wait(5)
            seen.append("call")

    def capturing() -> None:
        with turns.alone():
            seen.append("capture")

    one, two = threading.Thread(target=call), threading.Thread(target=capturing)
    one.start()
    inside.wait(5)
    two.start()
    two.join(0.1)
    assert seen == []
    leave.set()
    one.join(5)
    two.join(5)
    assert seen == ["call", "capture"]


def test_a_capture_inside_a_call_of_its_own_thread_does_not_wait_for_itself() -> None:
    turns = Turns()
    done = []

    def nested() -> None:
        with turns.beside(), turns.alone(), turns.beside(), turns.alone():
            done.append(True)

    threads = [threading.Thread(target=nested) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert done == [True] * 8


class Normed(nn.Module):
    """What autocast makes of the linear layer's dtype, the last cast repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.attends, self.out = Attends(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.out(self.attends(x))
        return nn.functional.layer_norm(hidden.float(), (8,)).to(hidden.dtype) * x.mean()


@pytest.mark.parametrize("around", [True, False], ids=["optimized under autocast", "optimized without"])
def test_autocast_is_a_signature_of_its_own(around: bool) -> None:
    model, x = Normed().eval(), torch.randn(2, 6, 8)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            fast = reattend.optimize(model, "exact", (x,), measure=False)
        for inside in (True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                torch.testing.assert_close(fast(x), model(x), rtol=2**-7 if inside else 1e-5, atol=1e-5)
    assert sorted("autocast bfloat16" in str(key) for key in fast.signatures) == [False, True]


def test_a_length_that_the_model_fixes_may_become_one() -> None:
    class Lengths(nn.Module):
        """The scale follows from the number of tokens: each has a graph of its own."""

        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT * math.log(x.shape[1] + 1)).softmax(-1) @ x

    model = Lengths()
    fast = reattend.optimize(model, "exact", torch.randn(2, 5, 4), measure=False)
    for length in (7, 1, 5):
        x = torch.randn(2, length, 4)
        torch.testing.assert_close(fast(x), model(x))


class Decodes(nn.Module):
    """A decoder that keeps its keys and values by hand, heads before tokens or behind them."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis, self.qkv = axis, nn.Linear(8, 24)

    def forward(self, x: Tensor, past: Any = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = (t if self.axis == 1 else t.transpose(1, 2) for t in self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2))
        if past is not None:
            k, v = (torch.cat(pair, self.axis) for pair in zip(past, (k, v), strict=True))
        kept = k, v
        q, k, v = (t.transpose(1, 2) if self.axis == 1 else t for t in (q, k, v))
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        out = (q @ k.mT / 2).masked_fill(~seen, -math.inf).softmax(-1) @ v
        return out.transpose(1, 2).flatten(2), kept


@pytest.mark.parametrize("axis", [1, 2])
def test_keys_and_values_kept_by_hand_may_grow(axis: int) -> None:
    model = Decodes(axis)
    fast = reattend.optimize(model, "exact", torch.randn(2, 5, 8), measure=False)
    past = ours = None
    for length in (5, 1, 1, 2, 1):
        x = torch.randn(2, length, 8)
        (wanted, past), (found, ours) = model(x, past), fast(x, ours)
        torch.testing.assert_close(found, wanted)
    assert len(fast.signatures) == 2


class Turned(nn.Module):
    """Attention over rows that are turned by a table of angles, made longer where it is too short."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(8.0)[:, None] / 7, persistent=False)

    def forward(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        if x.shape[1] > self.table.shape[0]:
            self.register_buffer("table", torch.arange(2.0 * x.shape[1])[:, None] / 7, persistent=False)
        x = self.linear(x)
        angles = self.table[: x.shape[1]] if places is None else self.table[places]
        x = torch.cat([x[..., :2] * angles.cos() - x[..., 2:] * angles.sin(), x[..., 2:]], -1)
        return (x @ x.mT).softmax(-1) @ x


@pytest.mark.parametrize("first", [5, 13])
def test_a_table_that_a_forward_makes_longer(first: int) -> None:
    model, x = Turned(), torch.randn(2, first, 4)
    fast = reattend.optimize(model, "exact", x, measure=False)
    assert model.table.shape[0] == 8  # type: ignore[union-attr]
    for length in (5, 8, 9, 30, 13, 3):
        x = torch.randn(2, length, 4)
        torch.testing.assert_close(fast(x), copy.deepcopy(model)(x))


class Switches(nn.Module):
    """Attention that a first short call makes another one, for good."""

    def __init__(self) -> None:
        super().__init__()
        self.sparse = True

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] <= 6:
            self.sparse = False
        s = x @ x.mT
        if self.sparse:
            s = s.masked_fill(torch.ones(x.shape[1], x.shape[1]).tril() == 0, -math.inf)
        return s.softmax(-1) @ x


@pytest.mark.parametrize("measure", [False, True])
def test_what_a_call_changes_on_its_model_is_put_back(measure: bool) -> None:
    model, long = nn.Sequential(Switches()).eval(), torch.randn(2, 9, 4)
    fast = reattend.optimize(model, "exact", torch.randn(2, 5, 4), measure=measure)
    assert model[0].sparse and fast[0].sparse
    torch.testing.assert_close(fast(long), copy.deepcopy(model)(long))


def test_a_call_with_gradients_at_other_sizes() -> None:
    class Fixed(nn.Module):
        """Each length has a graph of its own."""

        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT * math.log(x.shape[1] + 1)).softmax(-1) @ x

    fast = reattend.optimize(Fixed(), "exact", torch.randn(2, 5, 4), measure=False)
    weight = torch.randn(4, 4, requires_grad=True)
    fast(torch.randn(2, 7, 4) @ weight).sum().backward()
    assert weight.grad is not None


def test_a_graph_that_fails_where_the_model_runs_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Turned(), torch.randn(2, 5, 4)
    places = torch.arange(5).expand(2, 5)
    fast = reattend.optimize(model, "exact", (x, places), measure=False)
    with pytest.raises(IndexError, match="out of bounds"):  # the model's own
        fast(x, places + 6)

    def broken(*_: Any) -> Any:
        raise IndexError("no such row")

    monkeypatch.setattr("reattend.compiler.hosted.run_graph", broken)
    said = refusal(lambda: fast(x, places))
    assert "its graph fails on float32[2, 5, 4], int64[2, 5]: IndexError: no such row; the model itself runs" in said
