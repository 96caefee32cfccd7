"""Attention written by hand in many ways is raised: one site each, equal numbers, a spec that says it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from raising_forms import SCALE, SPELLINGS, B, D, H, N, Spelling, Written, qkv, soft, square
from torch import Tensor, nn

from reattend.compiler.capture import capture
from reattend.compiler.primitives.attend_spec import AttendSpec
from reattend.compiler.raising import raise_sites


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_spelling(spelling: Spelling) -> None:
    inputs = (spelling.inputs or qkv)()
    with torch.no_grad():
        captured = capture(Written(spelling.run).eval(), inputs)
        wanted = captured.graph(*inputs)[0]
        raised = raise_sites(captured.graph)
        found = captured.graph(*inputs)[0]
    assert len(raised.nodes) == 1, [str(m) for m in raised.misses]
    assert raised.misses == ()
    assert not [n for n in captured.graph.graph.nodes if "softmax" in str(n.target) or "scaled_dot" in str(n.target)]
    node = raised.nodes[0]
    spec = AttendSpec.of(node.args[3])
    assert (spec.score, spec.keep, spec.after) == (spelling.score, spelling.keep, spelling.after)
    assert spec.sink == spelling.sink
    assert node.args[0].meta["val"].shape[1] == spelling.heads
    assert node.args[1][0].meta["val"].shape[1] == spelling.kv_heads
    assert torch.allclose(found, wanted, atol=2e-6, rtol=1e-5)


class Trained(nn.Module):
    """Attention with dropout as it is while training."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.qkv = nn.Linear(H * D, 3 * H * D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, H, D).permute(2, 0, 3, 1, 4)
        p = 0.25 if self.training else 0.0
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return F.dropout(soft(q @ k.mT * SCALE), p, self.training) @ v


@pytest.mark.parametrize("fused", [True, False])
def test_active_dropout_is_drawn_in_the_graph(fused: bool) -> None:
    x = torch.randn(B, 64, H * D)
    with torch.no_grad():
        captured = capture(Trained(fused=fused).train(), (x,))
        raised = raise_sites(captured.graph)
        spec = AttendSpec.of(raised.nodes[0].args[3])
        assert spec.after == "where(t0[b, h, i, j] < 0.75, w / 0.75, 0.0)"
        runs = torch.stack([captured.graph(x)[0] for _ in range(200)])
        plain = Trained.forward
        model = Trained(fused=fused).eval()
        model.load_state_dict(dict(captured.graph.state_dict()))
        wanted = plain(model, x)
    assert not torch.equal(runs[0], runs[1])
    assert (runs.mean(0) - wanted).abs().max() < 0.2 * wanted.abs().max()


def test_heads_that_are_one_dimension_with_the_features_are_heads() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(H * D, H * D) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            length, batch, width = x.shape  # tokens first, heads folded into the batch (torch.nn, bloom, t5, opt)
            q, k, v = (f(x).view(length, batch * H, D).transpose(0, 1) for f in (self.q, self.k, self.v))
            w = torch.bmm(q * SCALE, k.transpose(1, 2)).softmax(-1)
            return self.o(torch.bmm(w, v).transpose(0, 1).reshape(length, batch, width))

    x = torch.randn(N, B, H * D)
    captured = capture(Joined().eval(), (x,))
    wanted = captured.graph(x)[0]
    (node,) = raise_sites(captured.graph).nodes
    assert [str(s) for s in node.args[0].meta["val"].shape][1::2] == [str(H), str(D)]
    assert torch.allclose(captured.graph(x)[0], wanted, atol=1e-6)


def test_a_raised_graph_runs_at_other_sizes() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(H * D, 3 * H * D)

        def forward(self, x: Tensor) -> Tensor:
            b, n, _ = x.shape
            q, k, v = self.qkv(x).view(b, n, 3, H, D).permute(2, 0, 3, 1, 4).flatten(1, 2)
            s = torch.bmm(q, k.transpose(1, 2)).view(b, H, n, n) * SCALE
            s = s + torch.arange(n).view(1, 1, 1, n)
            return torch.bmm(soft(s).view(b * H, n, n), v).view(b, H, n, D).transpose(1, 2).flatten(2)

    model = Layer().eval()
    captured = capture(model, (torch.randn(B, N, H * D),))
    (node,) = raise_sites(captured.graph).nodes
    assert AttendSpec.of(node.args[3]).score.startswith(f"s * {SCALE!r} + t0[")
    for b, n in ((1, 7), (3, 33)):
        x = torch.randn(b, n, H * D)
        assert torch.allclose(captured.graph(x)[0], model(x), atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_half_precision_keeps_its_type(fused: bool) -> None:
    x = torch.randn(B, N, H * D, dtype=torch.bfloat16)
    captured = capture(Trained(fused=fused).to(torch.bfloat16).eval(), (x,))
    wanted = captured.graph(x)[0]
    (node,) = raise_sites(captured.graph).nodes
    found = captured.graph(x)[0]
    assert node.args[0].meta["val"].dtype == found.dtype == torch.bfloat16
    assert torch.allclose(found, wanted, atol=3e-2)
    captured.graph.graph.lint()


def test_gradients_flow_through_a_raised_graph() -> None:
    model = Trained(fused=False).eval()
    x = torch.randn(B, N, H * D)
    captured = capture(model, (x,))
    raise_sites(captured.graph)
    (wanted,) = torch.autograd.grad(model(x).square().sum(), model.qkv.weight)
    (found,) = torch.autograd.grad(captured.graph(x)[0].square().sum(), captured.graph.qkv.weight)
    assert torch.allclose(found, wanted, atol=1e-4, rtol=1e-4)


def test_a_write_that_an_earlier_view_sees_is_left_alone() -> None:
    def seen_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = q @ k.mT * SCALE
        first_row = s[:, :, :1]
        s += 1.0
        return soft(s) @ v + first_row.sum()

    inputs = qkv()
    captured = capture(Written(seen_twice).eval(), inputs)
    wanted = captured.graph(*inputs)[0]
    raised = raise_sites(captured.graph)
    assert raised.nodes == () and len(raised.misses) == 1
    assert torch.equal(captured.graph(*inputs)[0], wanted)


def test_a_finite_fill_stays_where_a_row_keeps_nothing() -> None:
    def strictly_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return soft((q @ k.mT).masked_fill(torch.ones(N, N, dtype=torch.bool).triu(), -1e9)) @ v

    inputs = square()
    captured = capture(Written(strictly_before).eval(), inputs)
    wanted = captured.graph(*inputs)[0]
    (node,) = raise_sites(captured.graph).nodes
    spec = AttendSpec.of(node.args[3])
    assert (spec.score, spec.keep, spec.empty) == ("s", "~t0[i, j]", "where(~t0[i, j], s, -1000000000.0)")
    assert torch.allclose(captured.graph(*inputs)[0], wanted, atol=1e-6)
