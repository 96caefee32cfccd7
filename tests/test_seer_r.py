"""SeerAttention-R against its gate written out token by token, and decoded from its compressed cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from language_swaps import close, row_by_row, swapped
from test_seer import POOL, turned
from torch import Tensor

import reattend.passes  # noqa: F401 - fills the registry
from reattend.compiler.decode import Decoder
from reattend.compiler.functional import attention, attention_and_aux
from reattend.compiler.mechanism import mechanism
from reattend.compiler.place import stand
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused

Given = tuple[Tensor, Tensor, Tensor, dict[str, Tensor], dict[str, Tensor], Any]


def parts(n: int, kv: int, **knobs: Any) -> Given:
    q, k, v = problem(n, kv_heads=kv)
    nope = problem(n, kv_heads=kv, seed=9)
    ports = {"q_nope": nope[0], "k_nope": nope[1]}
    site = stand(q, k, v, ports=ports, causal=True).site
    draw = torch.Generator().manual_seed(6)
    p = {name: torch.randn(d.shape, generator=draw) for name, d in mechanism("seer_r", **knobs).params(site).items()}
    return q, k, v, ports, p, site


def gate(ports: dict[str, Tensor], p: dict[str, Tensor], b: int, g: int, i: int, **knobs: Any) -> list[float]:
    """S of one token over the blocks up to its own, one of which may be open."""
    size, pool = knobs["block_size"], knobs.get("q_head_pool", "Qproj")
    q, k = ports["q_nope"][b].double(), ports["k_nope"][b].double()
    group = q.shape[0] // k.shape[0]
    heads = [q[g * group + r, i] for r in range(group)]
    W = p.get("gate_q_weight", torch.zeros(9)).double()
    if pool == "Qproj":
        Q = torch.stack([x @ W[g, r] for r, x in enumerate(heads)]).sum(0)
    else:
        Q = torch.stack(heads).mean(0)
        Q = Q @ W[g] if pool == "Qavgproj" else Q

    def normed(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean() + 1e-6).sqrt() * p[name].double() if knobs.get("qk_norm") else x

    Q = turned(normed(Q, "gate_q_norm"), i)
    S = []
    for c in range(i // size + 1):
        last = c * size + size - 1
        if last > i:
            S.append(0.0)
            continue
        names = [name for name in POOL if name in knobs.get("k_pool", "maxminavg")]
        K = torch.cat([POOL[name](k[g, c * size : last + 1]) for name in names]) @ p["gate_k_weight"][g].double()
        late = knobs.get("late_blocks_at_end") and last >= knobs.get("prompt", 0)
        S.append(float(Q @ turned(normed(K, "gate_k_norm"), last if late else c * size)) * len(Q) ** -0.5)
    return S


CASES = [
    {"block_size": 2, "gate_dim": 4, "threshold": 0.2},
    {"block_size": 3, "gate_dim": 4, "threshold": 0.25, "q_head_pool": "Qavgproj", "k_pool": "maxmin", "qk_norm": True},
    {"block_size": 2, "gate_dim": 8, "method": "token_budget", "token_budget": 5, "q_head_pool": "Qavg"},
    {"block_size": 2, "gate_dim": 4, "threshold": 0.2, "late_blocks_at_end": True, "prompt": 5},
]


@pytest.mark.parametrize("knobs", CASES, ids=str)
@pytest.mark.parametrize(("n", "kv"), [(11, 2), (12, 4), (9, 1)])
def test_gate(knobs: dict[str, Any], n: int, kv: int) -> None:
    q, k, v, ports, p, _ = parts(n, kv, **knobs)
    got = attention(q, k, v, "seer_r", causal=True, params=p, ports=ports, **knobs)
    size, some = knobs["block_size"], False
    for b in range(2):

        def seen(h: int, i: int, b: int = b) -> list[int]:
            nonlocal some
            S = gate(ports, p, b, h * kv // 4, i, **knobs)
            if knobs.get("method") == "token_budget":
                blocks = sorted(range(len(S)), key=lambda c: -S[c])[: knobs["token_budget"] // size]
            else:
                shares = torch.softmax(torch.tensor(S), 0)
                blocks = [c for c in range(len(S)) if shares[c] > knobs["threshold"]]
            if i < knobs.get("prompt", 0):
                blocks = list(range(len(S)))
            some |= len({*blocks, i // size}) < len(S)
            return [j for j in range(i + 1) if j // size in {*blocks, i // size}]

        assert close(got[b : b + 1], row_by_row(*(t[b : b + 1] for t in (q, k, v)), seen))
    assert some, "a gate that leaves nothing out tests nothing"


@pytest.mark.parametrize("knobs", CASES, ids=str)
@pytest.mark.parametrize("pieces", [(5, 1, 1, 1, 1, 1, 1), (5, 2, 4), (4, 1, 6)])
def test_decoded_from_one_key_a_block(knobs: dict[str, Any], pieces: tuple[int, ...]) -> None:
    q, k, v, ports, p, site = parts(11, 2, **knobs)
    whole = attention(q, k, v, "seer_r", causal=True, params=p, ports=ports, **{**knobs, "prompt": pieces[0]})
    decoder = Decoder(mechanism("seer_r", **knobs), site, params=p)
    rows = [dict(zip("qkv", part, strict=True)) for part in zip(*(t.split(pieces, 2) for t in (q, k, v)), strict=True)]
    nope = [
        dict(zip(ports, part, strict=True)) for part in zip(*(t.split(pieces, 2) for t in ports.values()), strict=True)
    ]
    got = [decoder.prefill(*rows[0].values(), **nope[0])]
    got += [decoder.step(*of.values(), **more) for of, more in zip(rows[1:], nope[1:], strict=True)]
    assert close(torch.cat(got, 2), whole)
    size = knobs["block_size"]
    assert decoder.state["gate"].shape == (2, 2, 11 // size, knobs["gate_dim"])
    assert decoder.state["open"].shape == (2, 2, 11 % size, 8)


def test_what_teaches_the_gate() -> None:
    knobs = {"block_size": 2, "gate_dim": 4, "gate_loss_scale": 3.0, "distill": True}
    q, k, v, ports, p, _ = parts(7, 2, **knobs)
    p = {name: t.requires_grad_() for name, t in p.items()}
    o, aux = attention_and_aux(q, k, v, "seer_r", causal=True, params=p, ports=ports, **knobs)
    assert close(o, attention(q, k, v, "softmax", causal=True))
    terms, still = [], {name: t.detach() for name, t in p.items()}
    for b in range(2):
        for g in range(2):
            for i in range(7):
                T = torch.zeros(4, dtype=torch.float64)
                for h in (2 * g, 2 * g + 1):
                    w = torch.softmax(k[b, g, : i + 1].double() @ q[b, h, i].double() * 8**-0.5, 0)
                    T = torch.maximum(
                        T, torch.tensor([w[2 * c : 2 * c + 2].max() if c < i // 2 else 0.0 for c in range(4)])
                    )
                T = T / (T.sum() + 1e-9)
                S = torch.tensor((gate(ports, still, b, g, i, **knobs) + [0.0] * 4)[:4], dtype=torch.float64)
                S[i // 2 :] = -1e9
                logs = torch.log_softmax(S, 0)
                terms += [T[c] * (T[c].log() - logs[c]) if T[c] > 0 else T[c] * 0 for c in range(4)]
    assert torch.allclose(aux.losses["gate"].double(), 3 * torch.stack(terms).mean(), atol=1e-5)
    assert all(g.any() for g in torch.autograd.grad(aux.losses["gate"], list(p.values())))


@pytest.mark.slow
def test_in_a_llama() -> None:
    from hosted_models import ids

    knobs: dict[str, Any] = {"block_size": 2, "gate_dim": 4, "taught": ("gate_q_weight", "gate_k_weight")}
    model, fast = swapped("seer_r", threshold=0.0, **knobs)
    x = ids(2, 17)
    assert close(fast(input_ids=x).logits, model(input_ids=x).logits), "untaught, it sees everything"
    _, sparse = swapped("seer_r", threshold=0.3, **knobs)
    assert (sparse(input_ids=x).logits - model(input_ids=x).logits).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("knobs", "match"),
    [
        ({"k_pool": "avgmax"}, "in this order"),
        ({"q_head_pool": "Qavg"}, "Qavgproj projects"),
        ({"gate_dim": 3}, "even"),
    ],
)
def test_refused(knobs: dict[str, Any], match: str) -> None:
    q, k, v, ports, *_ = parts(4, 2)
    with pytest.raises(Refused, match=match):
        attention(q, k, v, "seer_r", causal=True, ports=ports, **knobs)
