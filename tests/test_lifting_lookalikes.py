"""What looks like attention and is none is left alone, and the nearest miss says why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reattend.compiler.capture import capture
from reattend.compiler.lifting import raise_sites

B, N, C, H, D = 2, 6, 16, 4, 4


class Parts(nn.Module):
    """Layers to write look-alikes with."""

    def __init__(self, form: Callable[[Parts, Tensor], Any]) -> None:
        super().__init__()
        self.form = form
        self.q, self.k, self.v, self.o = (nn.Linear(C, C) for _ in range(4))
        self.gate, self.one, self.mix = nn.Linear(C, H), nn.Linear(C, 1), nn.Conv2d(H, H, 1)
        self.experts = nn.ModuleList([nn.Linear(C, C) for _ in range(H)])
        self.slots, self.memory = nn.Parameter(torch.randn(C, 5)), nn.Parameter(torch.randn(5, C))

    def forward(self, x: Tensor) -> Any:
        return self.form(self, x)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (f(x).view(-1, N, H, D).transpose(1, 2) for f in (self.q, self.k, self.v))
        return q, k, v


@dataclass(frozen=True)
class LookAlike:
    name: str
    form: Callable[[Parts, Tensor], Any]
    reason: str  # part of a miss's; "" where not even a softmax is there


def over_heads(score: Callable[[Tensor], Tensor], weights: Callable[[Tensor], Any] = lambda w: w) -> Any:
    """weights(softmax(score(q k))) v: what is left out tells the look-alike apart."""

    def form(m: Parts, x: Tensor) -> Any:
        q, k, v = m.heads(x)
        return weights(score(q @ k.mT).softmax(-1)) @ v

    return form


def router(m: Parts, x: Tensor) -> Tensor:
    return torch.einsum("bne,bnce->bnc", m.gate(x).softmax(-1), torch.stack([e(x) for e in m.experts], -1))


def top_router(m: Parts, x: Tensor) -> Tensor:
    best, _ = m.gate(x).softmax(-1).topk(2, -1)
    return best.sum(-1, keepdim=True) * x


def learned_pooling(m: Parts, x: Tensor) -> Tensor:
    return m.one(x).softmax(1).mT @ x


def slot_attention(m: Parts, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return (q @ k.mT).softmax(2) @ v


def among_heads(m: Parts, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return (q @ k.mT).softmax(1) @ v


def weights_returned(m: Parts, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    w = (q @ k.mT).softmax(-1)
    return w @ v, w


def mean_returned(m: Parts, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    w = (q @ k.mT).softmax(-1)
    return w @ v, w.mean(1)


def scores_returned(m: Parts, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    s = q @ k.mT * 0.5
    return s.softmax(-1) @ v, s


def scores_summed(m: Parts, x: Tensor) -> Any:
    q, k, v = m.heads(x)
    s = q @ k.mT
    return s.softmax(-1) @ v, s.sum()


def two_products(m: Parts, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    w = (q @ k.mT).softmax(-1)
    return w @ v + w @ k


def contrastive(m: Parts, x: Tensor) -> Tensor:
    return (F.normalize(m.q(x)) @ F.normalize(m.k(x)).mT / 0.07).softmax(-1)


def linear_attention(m: Parts, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def channels(m: Parts, x: Tensor) -> Tensor:
    q, k, v = (t.mT for t in m.heads(x))
    return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1) @ v


def talking_heads(m: Parts, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return m.mix(q @ k.mT).softmax(-1) @ v


def talking_weights(m: Parts, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return m.mix((q @ k.mT).softmax(-1)) @ v


def best_keys(m: Parts, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    s = q @ k.mT
    return s.masked_fill(s < s.topk(2, -1).values[..., -1:], -torch.inf).softmax(-1) @ v


def gumbel(m: Parts, x: Tensor) -> Tensor:
    noise = -torch.log(-torch.log(torch.rand(H).clamp(1e-6, 1 - 1e-6)))
    return (m.gate(x) + noise).softmax(-1) @ m.gate.weight


def learned_memory(m: Parts, x: Tensor) -> Tensor:
    return (x @ m.slots).softmax(-1) @ m.memory


def one_more(m: Parts, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    e = (q @ k.mT).exp()
    return (e / (e.sum(-1, keepdim=True) + 1.0)) @ v


def per_query_values(m: Parts, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return torch.einsum("bhij,bhijd->bhid", (q @ k.mT).softmax(-1), v.unsqueeze(2) - v.unsqueeze(3))


def distances(m: Parts, x: Tensor) -> Tensor:
    return (-torch.cdist(m.q(x), m.k(x))).softmax(-1) @ m.v(x)


def changed_beside(m: Parts, x: Tensor) -> Tensor:
    """The weights, seen through another view, are changed before they are used."""
    q, k, v = m.heads(x)
    w = (q @ k.mT).softmax(-1)
    turned = w.mT
    turned.add_(1.0)
    return w @ v


def part_of_the_scores(m: Parts, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return (q @ k.mT)[..., :4].softmax(-1) @ v[:, :, :4]


def part_of_the_heads(m: Parts, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    s = q @ k.mT
    return (s[:, :3] + s[:, :3].tanh()).softmax(-1) @ v[:, :3]


def no_softmax(m: Parts, x: Tensor) -> Tensor:
    q, k, v = m.heads(x)
    return q @ k.mT / N @ v


LOOK_ALIKES = [
    LookAlike("mixture of experts", router, "an einsum that does not contract one axis against two free ones"),
    LookAlike("top-2 router", top_router, "no product with values behind the softmax"),
    LookAlike("pooling by a learned layer", learned_pooling, "no product of queries and keys"),
    LookAlike("slot attention", slot_attention, "softmax over axis 2, the product with the values contracts axis 3"),
    LookAlike("softmax over heads", among_heads, "softmax over axis 1, the product with the values contracts axis 3"),
    LookAlike("weights returned", weights_returned, "the scores or weights %softmax are returned"),
    LookAlike("mean weights returned", mean_returned, "%softmax are also used by %mean"),
    LookAlike("scores returned", scores_returned, "the scores or weights %mul are returned"),
    LookAlike("scores summed into a loss", scores_summed, "%matmul are also used by %sum_1"),
    LookAlike("weights meet two products", two_products, "its weights meet 2 products"),
    LookAlike("contrastive logits", contrastive, "no product with values behind the softmax"),
    LookAlike("two softmaxes of linear attention", linear_attention, "no product of queries and keys"),
    LookAlike("attention over channels", channels, "contracts the tokens: channel attention"),
    LookAlike("talking heads", talking_heads, "no product of queries and keys"),
    LookAlike("talking weights", talking_weights, "no product with values behind the softmax"),
    LookAlike("the best keys only", best_keys, "are also used by %"),
    LookAlike("squared weights", over_heads(lambda s: s, lambda w: w.pow(2)), "no product with values"),
    LookAlike("running sum of scores", over_heads(lambda s: s.cumsum(-1)), "no product of queries and keys"),
    LookAlike("gumbel classifier", gumbel, "no product of queries and keys"),
    LookAlike("learned memory", learned_memory, "keys and values are weights (slots, memory)"),
    LookAlike("a sum with one more", one_more, "the sum of the exponentials is changed by %add"),
    LookAlike("values per query", per_query_values, "an einsum that does not contract one axis against two free ones"),
    LookAlike("distances", distances, "no product of queries and keys"),
    LookAlike("changed through a view", changed_beside, "also used by %"),
    LookAlike("part of the scores", part_of_the_scores, "only a part of the product"),
    LookAlike("part of the weights", over_heads(lambda s: s, lambda w: w[:, :, :, :1] * w.new_ones(N)), "contracts axis none"),
    LookAlike("part of the heads", part_of_the_heads, "only a part of the product"),
    LookAlike("no softmax", no_softmax, ""),
]  # fmt: skip


@pytest.mark.parametrize("look_alike", LOOK_ALIKES, ids=lambda s: s.name)
def test_look_alike(look_alike: LookAlike) -> None:
    model, x = Parts(look_alike.form).eval(), torch.randn(B, N, C)
    captured = capture(model, (x,), dynamic=False)
    with torch.no_grad():
        torch.manual_seed(1)
        wanted = captured.graph(x)
        raised = raise_sites(captured.graph)
        torch.manual_seed(1)
        found = captured.graph(x)
    reasons = [miss.reason for miss in raised.misses]
    assert raised.nodes == ()
    assert any(look_alike.reason in reason for reason in reasons) or not (look_alike.reason or reasons), reasons
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted))
