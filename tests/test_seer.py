"""SeerAttention against its gate written out block by block: pools, rotations, both methods, what teaches it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hosted_models import ids
from language_swaps import close, row_by_row, swapped
from torch import Tensor

import reattend.passes  # noqa: F401 - fills the registry
from reattend.compiler.functional import attention, attention_and_aux
from reattend.compiler.mechanism import mechanism
from reattend.compiler.place import stand
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused

POOL = {"max": lambda x: x.amax(0), "min": lambda x: x.amin(0), "avg": lambda x: x.mean(0)}


def parts(n: int, kv: int, **knobs: Any) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """q, k, v, then other numbers as the unrotated ones, and random weights of the gate."""
    q, k, v = problem(n, kv_heads=kv)
    nope = problem(n, kv_heads=kv, seed=9)
    ports = {"q_nope": nope[0], "k_nope": nope[1]}
    site = stand(q, k, v, ports=ports, causal=True).site
    draw = torch.Generator().manual_seed(6)
    p = {name: torch.randn(d.shape, generator=draw) for name, d in mechanism("seer", **knobs).params(site).items()}
    return q, k, v, ports, p


def turned(x: Tensor, place: int) -> Tensor:
    """Pairs (x_d, x_{d + E/2}) as complex numbers, turned by place * 10000^(-2 d / E)."""
    half = len(x) // 2
    pairs = torch.complex(x[:half], x[half:])
    angle = torch.tensor([place * 10000.0 ** (-d / half) for d in range(half)], dtype=torch.float64)
    pairs = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((pairs.real, pairs.imag))


def gate(q: Tensor, k: Tensor, p: dict[str, Tensor], b: int, h: int, size: int, **knobs: Any) -> Tensor:
    """S of one head, -1e9 ahead of the diagonal."""
    n, kv = q.shape[2], k.shape[1]
    starts = list(range(0, n, size))
    g = h * kv // q.shape[1]
    q_names = knobs.get("q_pool", "avg")
    k_names = [name for name in POOL if name in knobs.get("k_pool", "maxminavg")]
    Q, K = [], []
    for s in starts:
        x = torch.cat([POOL[name](q[b, h, s : s + size].double()) for name in POOL if name in q_names])
        x = x @ p["gate_q_weight"][h].double() if "gate_q_weight" in p else x
        y = torch.cat([POOL[name](k[b, g, s : s + size].double()) for name in k_names])
        y = y @ p["gate_k_weight"][g if "gate_q_weight" in p else h].double()
        Q.append(turned(x, s))
        K.append(turned(y, s))
    S = torch.stack(Q) @ torch.stack(K).T * len(Q[0]) ** -0.5
    return S.masked_fill(torch.ones_like(S).triu(1).bool(), -1e9)


CASES = [
    {"block_size": 2, "gate_dim": 4, "threshold": 0.2},
    {"block_size": 3, "gate_dim": 8, "threshold": 0.3, "k_pool": "avg", "last_block_dense": False},
    {"block_size": 2, "gate_dim": 8, "threshold": 0.2, "force_double": True, "q_pool": "maxavg", "k_pool": "maxmin"},
    {"block_size": 2, "gate_dim": 4, "method": "nz_ratio", "nz_ratio": 0.6, "last_block_dense": False},
    {"block_size": 2, "gate_dim": 4, "method": "nz_ratio", "nz_ratio": 0.5},
]


@pytest.mark.parametrize("knobs", CASES, ids=str)
@pytest.mark.parametrize(("n", "kv"), [(11, 2), (12, 4)])
def test_gate(knobs: dict[str, Any], n: int, kv: int) -> None:
    q, k, v, ports, p = parts(n, kv, **knobs)
    size, count = knobs["block_size"], -(-n // knobs["block_size"])
    got = attention(q, k, v, "seer", causal=True, params=p, ports=ports, **knobs)
    some = False
    for b in range(2):

        def seen(h: int, i: int, b: int = b) -> list[int]:
            nonlocal some
            a = i // size
            S = gate(ports["q_nope"], ports["k_nope"], p, b, h, **{"size": size, **knobs})[a]
            if knobs.get("method") == "nz_ratio":
                r = 1 - math.sqrt(1 - knobs["nz_ratio"])
                blocks = sorted(range(count), key=lambda c: -float(S[c]))[: max(1, int(r * count))]
            else:
                blocks = [c for c in range(count) if torch.softmax(S, 0)[c] > knobs["threshold"]]
            if knobs.get("last_block_dense", True) and a >= count - 2:
                blocks = list(range(count))
            some |= any(c not in blocks for c in range(a))
            return [j for j in range(i + 1) if j // size in blocks or j // size == a]

        one = (t[b : b + 1] for t in (q, k, v))
        assert close(got[b : b + 1], row_by_row(*one, seen))
    assert some, "a gate that leaves nothing out tests nothing"


def test_past_gate_never_looks_ahead_and_the_papers_gate_does() -> None:
    q, k, v, ports, p = parts(12, 4, block_size=4, gate_dim=4)
    later = {name: torch.cat((t[:, :, :9], -3 * t[:, :, 9:]), 2) for name, t in ports.items()}
    knobs = {"block_size": 4, "gate_dim": 4, "threshold": 0.4, "last_block_dense": False}
    for past in (True, False):
        one, two = (
            attention(q, k, v, "seer", causal=True, params=p, ports=given, past_gate=past, **knobs)
            for given in (ports, later)
        )
        assert torch.equal(one[:, :, :9], two[:, :, :9]) == past


def test_what_teaches_the_gate() -> None:
    knobs = {"block_size": 2, "gate_dim": 4, "gate_loss_scale": 10.0, "distill": True}
    q, k, v, ports, p = parts(11, 2, **knobs)
    p = {name: t.requires_grad_() for name, t in p.items()}
    o, aux = attention_and_aux(q, k, v, "seer", causal=True, params=p, ports=ports, **knobs)
    assert close(o, attention(q, k, v, "softmax", causal=True))
    K = k.double().repeat_interleave(2, 1)
    A = torch.softmax((q.double() @ K.mT * 8**-0.5).masked_fill(~torch.ones(11, 11).tril().bool(), -math.inf), -1)
    terms = []
    for b in range(2):
        for h in range(4):
            S = gate(ports["q_nope"], ports["k_nope"], p, b, h, size=2)
            for a in range(6 // 4, 6):
                rows = slice(2 * a, 2 * a + 2)
                T = torch.stack([A[b, h, rows, 2 * c : 2 * c + 2].amax() for c in range(6)])
                T = T / T.sum()
                logs = torch.log_softmax(S[a], 0)
                terms += [T[c] * (T[c].log() - logs[c]) if T[c] > 0 else T[c] for c in range(6)]
    expected = 10 * torch.stack(terms).mean()
    assert torch.allclose(aux.losses["gate"].double(), expected, atol=1e-5)
    found = torch.autograd.grad(aux.losses["gate"], list(p.values()))
    assert all(torch.isfinite(g).all() and g.any() for g in found)


def test_blocks_of_one_token_and_no_projection_teach_the_weights_themselves() -> None:
    q, k, v = problem(9)
    eye = torch.eye(8).expand(4, 8, 8)
    at = torch.arange(9)
    angle = at[:, None] * 10000.0 ** (-torch.arange(4) / 4)
    rope = lambda t: torch.cat(
        (t[..., :4] * angle.cos() - t[..., 4:] * angle.sin(), t[..., 4:] * angle.cos() + t[..., :4] * angle.sin()), -1
    )
    knobs = {"block_size": 1, "gate_dim": 8, "k_pool": "avg", "distill": True}
    ports = {"q_nope": q, "k_nope": k}
    _, aux = attention_and_aux(
        rope(q), rope(k), v, "seer", causal=True, params={"gate_k_weight": eye}, ports=ports, **knobs
    )
    assert abs(float(aux.losses["gate"])) < 1e-5, "the gate is the attention"


@pytest.mark.slow
def test_in_a_llama() -> None:
    model, fast = swapped_gate(threshold=0.0)
    x = ids(2, 17)
    assert close(fast(input_ids=x).logits, model(input_ids=x).logits), "untaught, it sees everything"
    _, sparse = swapped_gate(threshold=0.3)
    assert (sparse(input_ids=x).logits - model(input_ids=x).logits).abs().max() > 1e-4


def swapped_gate(threshold: float) -> tuple[Any, Any]:
    return swapped("seer", block_size=2, gate_dim=4, threshold=threshold, taught=("gate_q_weight", "gate_k_weight"))


@pytest.mark.parametrize(
    ("knobs", "match"),
    [({"k_pool": "avgmax"}, "in this order"), ({"method": "top"}, "threshold or"), ({"gate_dim": 3}, "even")],
)
def test_refused(knobs: dict[str, Any], match: str) -> None:
    with pytest.raises(Refused, match=match):
        mechanism("seer", **knobs)
