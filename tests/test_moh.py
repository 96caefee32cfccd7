"""Mixture of heads against its formulas written out: both routers, their sums, their loss, what is left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import reattend.passes  # noqa: F401 - fills the registry
from reattend.compiler.functional import attention, attention_and_aux
from reattend.compiler.layers import Attention
from reattend.compiler.problem import hidden, problem


def written_out(x: Tensor, p: dict[str, Tensor], heads: int, shared: int, k: int) -> tuple[Tensor, Tensor]:
    """Gates (B, N, H) and the balance loss of the linear router, token by token."""
    gates, chosen, likely = torch.zeros(*x.shape[:2], heads), [], []
    for b in range(x.shape[0]):
        for n in range(x.shape[1]):
            t = x[b, n]
            g_s = shared * torch.softmax(p["w_shared"] @ t, 0) if shared > 1 else torch.ones(shared)
            a1, a2 = 2 * torch.softmax(p["w_balance"] @ t, 0) if shared and k else (torch.tensor(1.0),) * 2
            gates[b, n, :shared] = a1 * g_s
            if k:
                prob = torch.softmax(p["w_router"] @ t, 0)
                top = sorted(range(heads - shared), key=lambda i: (-float(prob[i]), i))[:k]
                mask = torch.zeros(heads - shared)
                mask[top] = 1
                gates[b, n, shared:] = a2 * k * prob * mask / (prob * mask).sum()
                chosen.append(mask)
                likely.append(prob)
    if not k:
        return gates, torch.zeros(())
    P, F = torch.stack(likely).mean(0), torch.stack(chosen).mean(0)
    return gates, (heads - shared) * (P * F).sum()


@pytest.mark.parametrize(("shared", "k"), [(0, 2), (1, 1), (2, 1), (3, 2), (4, 0), (6, 0), (0, 6)])
def test_linear_router(shared: int, k: int) -> None:
    q, keys, v = problem(5, heads=6)
    x = hidden(5)
    draw = torch.Generator().manual_seed(3)
    shapes = {"w_router": (6 - shared, 32) if k else None, "w_shared": (shared, 32) if shared > 1 else None}
    shapes["w_balance"] = (2, 32) if shared and k else None
    params = {name: 0.3 * torch.randn(shape, generator=draw) for name, shape in shapes.items() if shape}
    got, aux = attention_and_aux(
        q, keys, v, "moh", shared_heads=shared, routed_heads=k, load_balance_weight=1.0, ports={"x": x}, params=params
    )
    gates, loss = written_out(x, params, 6, shared, k)
    assert torch.allclose(got, attention(q, keys, v, "softmax") * gates.mT[..., None], atol=1e-5)
    assert torch.allclose(aux.losses["load_balance"], loss, atol=1e-5) if k else not aux.losses


def test_gates_sum_to_what_they_share_out() -> None:
    ones = torch.ones(2, 4, 5, 8)
    q, k, v = problem(5)
    params = {"w_router": torch.randn(3, 32), "w_balance": torch.zeros(2, 32)}
    knobs = {"shared_heads": 1, "routed_heads": 2}
    gates = attention(q, k, v, "moh", ports={"x": hidden(5), "o": ones}, params=params, **knobs)[..., 0]
    assert torch.allclose(gates[:, 0], torch.ones(2, 5)), "one shared head counts fully"
    assert torch.allclose(gates[:, 1:].sum(1), torch.full((2, 5), 2.0), atol=1e-6)
    assert bool(((gates[:, 1:] == 0).sum(1) == 1).all()), "one of three is left out, exactly"


def test_what_is_left_out_gets_no_gradient() -> None:
    q, k, v = (t.requires_grad_() for t in problem(5))
    o = attention(
        q, k, v, "moh", shared_heads=0, routed_heads=1, ports={"x": hidden(5)}, params={"w_router": torch.randn(4, 32)}
    )
    o.square().sum().backward()
    assert q.grad is not None
    assert torch.equal(q.grad.abs().sum(-1) > 0, o.detach().abs().sum(-1) > 0)


def test_balanced_load_of_a_uniform_router_is_k() -> None:
    q, k, v = problem(4)
    x = torch.eye(4).expand(2, 4, 4)  # token t prefers head t, a little
    _, aux = attention_and_aux(q, k, v, "moh", shared_heads=0, routed_heads=1, load_balance_weight=1.0,
                               ports={"x": x}, params={"w_router": 1e-4 * torch.eye(4)})  # fmt: skip
    assert torch.allclose(aux.losses["load_balance"], torch.tensor(1.0), atol=1e-3)


def test_equal_scores_take_the_lower_head() -> None:
    q, k, v = problem(3)
    gates = attention(q, k, v, "moh", shared_heads=0, routed_heads=2, ports={"x": hidden(3), "o": torch.ones_like(q)})
    assert gates[..., 0].tolist() == [[[1.0] * 3, [1.0] * 3, [0.0] * 3, [0.0] * 3]] * 2


def test_long_queries_route_without_learned_tensors() -> None:
    q, k, v = problem(6, kv_heads=2)
    nope = torch.randn_like(q)
    knobs = {"shared_heads": 1, "routed_heads": 1, "router": "q_norm"}
    for ports, scored in (({}, q), ({"q_nope": nope}, nope)):
        best = scored[:, 1:].norm(dim=-1).argmax(1) + 1  # (B, N)
        active = torch.nn.functional.one_hot(best, 4).mT + torch.tensor([1, 0, 0, 0])[:, None]
        got = attention(q, k, v, "moh", ports=ports, **knobs)
        assert torch.allclose(got, attention(q, k, v, "softmax") * active[..., None], atol=1e-6)
        scaled = {name: 3.0 * t for name, t in ports.items()}
        again = attention(q, k, v, "moh", ports={**scaled, "o": torch.ones_like(q)}, **knobs)
        assert torch.equal(again[..., 0], active.float()), "the length of x does not matter"


def test_a_layer_reports_its_loss() -> None:
    layer = Attention("moh", 32, heads=4, shared_heads=1, routed_heads=1)
    layer(hidden(6))
    assert set(layer.losses()) == {"load_balance"} and layer.losses()["load_balance"].requires_grad
