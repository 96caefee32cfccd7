"""What looks like attention and is not stays as it is, and the nearest miss says why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reattend.compiler.capture import capture
from reattend.compiler.raising import raise_sites

B, N, C, H, D = 2, 6, 16, 4, 4


@dataclass(frozen=True)
class LookAlike:
    """A module's forward over x (B, N, C), and what the nearest misses say; no reason: not even a softmax is there."""

    name: str
    run: Callable[[Projections, Tensor], Any]
    reasons: tuple[str, ...]


class Projections(nn.Module):
    """Layers to write look-alikes with."""

    def __init__(self, run: Callable[[Projections, Tensor], Any]) -> None:
        super().__init__()
        self.run = run
        self.q, self.k, self.v, self.o = (nn.Linear(C, C) for _ in range(4))
        self.gate = nn.Linear(C, H)
        self.one = nn.Linear(C, 1)
        self.experts = nn.ModuleList([nn.Linear(C, C) for _ in range(H)])
        self.query = nn.Parameter(torch.randn(C))
        self.slots = nn.Parameter(torch.randn(C, 5))
        self.memory = nn.Parameter(torch.randn(5, C))
        self.mix = nn.Conv2d(H, H, 1)
        self.across = nn.Linear(H, H)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)

    def heads(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x).view(x.shape[0], -1, H, D).transpose(1, 2)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.heads(self.q, x), self.heads(self.k, x), self.heads(self.v, x)

    def merged(self, o: Tensor) -> Tensor:
        return self.o(o.transpose(1, 2).flatten(2))


def router(m: Projections, x: Tensor) -> Tensor:
    w = m.gate(x).softmax(-1)
    return torch.einsum("bne,bnce->bnc", w, torch.stack([e(x) for e in m.experts], -1))


def top_router(m: Projections, x: Tensor) -> Tensor:
    w, where = torch.topk(m.gate(x).softmax(-1), 2)
    return w.sum(-1, keepdim=True) * x + where.sum()


def product_router(m: Projections, x: Tensor) -> Tensor:
    w = (x @ m.slots[:, :H]).softmax(-1)
    return torch.einsum("bne,bnec->bnc", w, torch.stack([e(x) for e in m.experts], 2))


def pooling(m: Projections, x: Tensor) -> Tensor:
    return (m.one(x).softmax(1).transpose(1, 2) @ x).squeeze(1)


def vector_pooling(m: Projections, x: Tensor) -> Tensor:
    return torch.einsum("bn,bnc->bc", (x @ m.query).softmax(-1), x)


def slots(m: Projections, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    return m.merged((q @ k.mT).softmax(-2) @ v)


def slots_renormalised(m: Projections, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    w = (q @ k.mT).softmax(-2) + 1e-8
    return m.merged((w / w.sum(-1, keepdim=True)) @ v)


def over_heads(m: Projections, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    return m.merged((q @ k.mT).softmax(1) @ v)


def returned_weights(m: Projections, x: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = m.qkv(x)
    w = (q @ k.mT).softmax(-1)
    return m.merged(w @ v), w


def mean_weights(m: Projections, x: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = m.qkv(x)
    w = (q @ k.mT).softmax(-1)
    return m.merged(w @ v), w.mean(1)


def returned_scores(m: Projections, x: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = m.qkv(x)
    s = q @ k.mT * 0.5
    return m.merged(s.softmax(-1) @ v), s


def scores_of_next_layer(m: Projections, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    s = q @ k.mT
    y = m.merged(s.softmax(-1) @ v)
    q, k, v = m.qkv(y)
    return m.merged((q @ k.mT + s).softmax(-1) @ v)


def no_values(m: Projections, x: Tensor) -> Tensor:
    q, k, _ = m.qkv(x)
    return (q @ k.mT).softmax(-1)


def contrastive(m: Projections, x: Tensor) -> Tensor:
    image, text = F.normalize(m.q(x[:, 0]), dim=-1), F.normalize(m.k(x[:, 1]), dim=-1)
    return (image @ text.t() * 10.0).softmax(-1)


def classifier(m: Projections, x: Tensor) -> Tensor:
    return (m.gate(x.mean(1)) / 0.7).softmax(-1)


def linear_attention(m: Projections, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    return m.merged(q.softmax(-1) @ (k.softmax(-2).mT @ v))


def channels(m: Projections, x: Tensor) -> Tensor:
    q, k, v = (t.mT for t in m.qkv(x))  # (B, H, D, N)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return m.o(((q @ k.mT).softmax(-1) @ v).permute(0, 3, 1, 2).flatten(2))


def talking_heads(m: Projections, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    return m.merged(m.mix(q @ k.mT).softmax(-1) @ v)


def talking_weights(m: Projections, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    w = m.across((q @ k.mT).softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return m.merged(w @ v)


def heads_mixed_by_product(m: Projections, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    w = torch.einsum("bhij,hg->bgij", (q @ k.mT).softmax(-1), m.across.weight)
    return m.merged(w @ v)


def top_keys(m: Projections, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    best, where = (q @ k.mT).topk(3, -1)
    return m.merged((best.softmax(-1).unsqueeze(-2) @ v.unsqueeze(2).expand(-1, -1, N, -1, -1)
                     .gather(3, where.unsqueeze(-1).expand(-1, -1, -1, -1, D))).squeeze(-2))  # fmt: skip


def gumbel(m: Projections, x: Tensor) -> Tensor:
    noise = -torch.log(-torch.log(torch.rand(H).clamp(1e-6, 1 - 1e-6)))
    return ((m.gate(x) + noise) / 0.5).softmax(-1) @ m.across.weight


def memory(m: Projections, x: Tensor) -> Tensor:
    return (x @ m.slots).softmax(-1) @ m.memory


def distances(m: Projections, x: Tensor) -> Tensor:
    return (-torch.cdist(m.q(x), m.k(x))).softmax(-1) @ m.v(x)


def sum_over_heads(m: Projections, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    return torch.einsum("bhij,bhjd->bid", (q @ k.mT).softmax(-1), v)


def values_per_query(m: Projections, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    w = (q @ k.mT).softmax(-1)
    return m.merged(torch.einsum("bhij,bhijd->bhid", w, v.unsqueeze(2) - v.unsqueeze(3)))


def smoothed(m: Projections, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    s = q @ k.mT
    w = (s - s.amax(-1, keepdim=True)).exp()
    return m.merged((w / (w.sum(-1, keepdim=True) + 1.0)) @ v)


def shifted_along_queries(m: Projections, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    s = q @ k.mT
    return m.merged((s - s.amax(-2, keepdim=True)).softmax(-1) @ v)


def centred_over_heads(m: Projections, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    s = q @ k.mT
    return m.merged((s - s.mean(1, keepdim=True)).softmax(-1) @ v)


def shifted_beside_a_sink(m: Projections, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    s = q @ k.mT
    s = F.pad(s - s.amax(-1, keepdim=True), (0, 1))
    return m.merged(s.softmax(-1)[..., :-1] @ v)


def divided_by_other_rows(m: Projections, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    e = (q[0, 0] @ k[0, 0].mT).exp()
    return m.merged((e / e.sum(-1)) @ v)


def squared(m: Projections, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    return m.merged((q @ k.mT).softmax(-1).pow(2) @ v)


def running_sum(m: Projections, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    return m.merged((q @ k.mT).cumsum(-1).softmax(-1) @ v)


def normed(m: Projections, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    return m.merged(F.normalize((q @ k.mT).exp(), p=2.0, dim=-1) @ v)


def differential(m: Projections, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    first, second = (q[..., :2] @ k[..., :2].mT).softmax(-1), (q[..., 2:] @ k[..., 2:].mT).softmax(-1)
    return m.merged((first - second) @ v)


def no_softmax(m: Projections, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    return m.merged(q @ (k.mT @ v))


def relu_attention(m: Projections, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    return m.merged((q @ k.mT).relu() / N @ v)


def sinkhorn(m: Projections, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    s = q @ k.mT
    for _ in range(2):
        s = s.log_softmax(-1).log_softmax(-2)
    return m.merged(s.exp() @ v)


def linear_by_features(m: Projections, x: Tensor) -> Tensor:
    """softmax(q) over features, softmax(k) over tokens, everything einsum (efficient attention)."""
    q, k, v = m.qkv(x)
    context = torch.einsum("bhnd,bhne->bhde", k.softmax(dim=2), v)
    return m.merged(torch.einsum("bhnd,bhde->bhne", q.softmax(dim=-1), context))


def pooled_features(m: Projections, x: Tensor) -> Tensor:
    w = torch.einsum("bnc,bnd->bcd", m.q(x), m.k(x)).softmax(-1)  # (B, C, C): which features go together
    return m.o(x @ w.mT)


def cross_covariance(m: Projections, x: Tensor) -> Tensor:
    q, k, v = (F.normalize(t, dim=-2) for t in m.qkv(x))
    return m.merged((((q.mT @ k) / 0.5).softmax(-1) @ v.mT).mT)


def experts_weighted(m: Projections, x: Tensor) -> Tensor:
    """Gates from a product with learned expert keys, then matmul with the experts' outputs."""
    gates = (m.q(x) @ m.memory.t() / C**0.5).softmax(-1)
    outputs = torch.stack([m.v(x * (e + 1)) for e in range(5)], -2)
    return (gates.unsqueeze(-2) @ outputs).squeeze(-2)


def sampled(m: Projections, x: Tensor) -> Tensor:
    logits = m.q(x)[:, -1] @ m.slots / 0.8
    top = logits.topk(3).values[..., -1:]
    return logits.masked_fill(logits < top, -float("inf")).softmax(-1)


def temperature_pair(m: Projections, x: Tensor) -> tuple[Tensor, Tensor]:
    q, k = F.normalize(m.q(x), dim=-1), F.normalize(m.k(x), dim=-1)
    s = q @ k.mT * 14.3
    return s.log_softmax(-1), s.log_softmax(-2)


def routed_slots(m: Projections, x: Tensor) -> Tensor:
    """Soft mixture of experts: tokens are dispatched over tokens and combined over slots."""
    s = x @ m.slots
    slots = s.softmax(1).mT @ x
    return s.softmax(-1) @ m.v(slots)


def normalised_twice(m: Projections, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    w = (q @ k.mT).softmax(-1)
    return m.merged((w / w.sum(-2, keepdim=True)) @ v)


def renormalised_with_a_remainder(m: Projections, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    w = (q @ k.mT).softmax(-1) * torch.ones(x.shape[1], x.shape[1]).tril()
    return m.merged((w / (w.sum(-1, keepdim=True) + 0.1)) @ v)


def hard(m: Projections, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x)
    w = (q @ k.mT).softmax(-1)
    return m.merged(F.one_hot(w.argmax(-1), w.shape[-1]).to(v.dtype) @ v)


NO_PRODUCT = "no product of queries and keys"
LOOK_ALIKES = [
    LookAlike("mixture of experts", router, (NO_PRODUCT,)),
    LookAlike("top-2 router", top_router, (NO_PRODUCT,)),
    LookAlike("router by a product", product_router, ("differ from query to query",)),
    LookAlike("pooling by a layer", pooling, (NO_PRODUCT,)),
    LookAlike("pooling by a vector", vector_pooling, (NO_PRODUCT,)),
    LookAlike("slot attention", slots, ("softmax over axis 2, its product with values sums over axis 3",)),
    LookAlike("slot attention, renormalised", slots_renormalised, ("the weights meet %add",)),
    LookAlike("softmax over heads", over_heads, ("softmax over axis 1, the keys of its product",)),
    LookAlike("weights returned", returned_weights, ("the weights are returned",)),
    LookAlike("mean weights returned", mean_weights, ("also used by %mean; need_weights=False",)),
    LookAlike("scores returned", returned_scores, ("the scores are returned",)),
    LookAlike("scores handed on", scores_of_next_layer, ("the scores are also used by %add",)),
    LookAlike("no values", no_values, ("the weights are returned",)),
    LookAlike("contrastive logits", contrastive, ("the weights are returned",)),
    LookAlike("classifier with a temperature", classifier, (NO_PRODUCT,)),
    LookAlike("linear attention", linear_attention, (NO_PRODUCT, NO_PRODUCT)),
    LookAlike("attention over channels", channels, ("the queries are channels of %linear",)),
    LookAlike("talking heads", talking_heads, ("between the product %matmul and the softmax stands %conv2d",)),
    LookAlike("talking weights", talking_weights, ("the weights meet %linear_3 (linear)",)),
    LookAlike("heads mixed by a product", heads_mixed_by_product, ("sums over axis 1",)),
    LookAlike("the best keys only", top_keys, ("stands %topk",)),
    LookAlike("gumbel softmax", gumbel, (NO_PRODUCT,)),
    LookAlike("learned memory", memory, ("are a weight: a gate over learned slots",)),
    LookAlike("distances", distances, (NO_PRODUCT,)),
    LookAlike("sum over heads", sum_over_heads, ("sums over axis 1 and 3",)),
    LookAlike("values per query", values_per_query, ("differ from query to query",)),
    LookAlike("sum with one more", smoothed, ("the sum is changed by %add",)),
    LookAlike("shifted along the queries", shifted_along_queries, ("the scores are also used by %amax",)),
    LookAlike("centred over heads", centred_over_heads, ("the scores are also used by %mean",)),
    LookAlike("shifted beside a sink", shifted_beside_a_sink, ("the scores are also used by %amax",)),
    LookAlike("divided by other rows", divided_by_other_rows, ("they are not divided by their sum",)),
    LookAlike("masked, by more than the sum", renormalised_with_a_remainder, ("something else than their sum",)),
    LookAlike("squared weights", squared, ("the weights meet %pow",)),
    LookAlike("running sum of scores", running_sum, ("stands %cumsum",)),
    LookAlike("exponentials by their norm", normed, ("they are not divided by their sum",)),
    LookAlike("difference of two softmaxes", differential, ("the weights meet %sub",)),
    LookAlike("sinkhorn", sinkhorn, ("stands %log_softmax_2",)),
    LookAlike("softmax of features and of tokens", linear_by_features, (NO_PRODUCT, NO_PRODUCT)),
    LookAlike("features by features", pooled_features, ("attention over channels, not tokens",)),
    LookAlike("cross-covariance", cross_covariance, ("attention over channels, not tokens",)),
    LookAlike("experts by learned keys", experts_weighted, ("differ from query to query",)),
    LookAlike("sampling", sampled, ("the scores are also used by %topk",)),
    LookAlike("contrastive both ways", temperature_pair, ()),
    LookAlike("soft mixture", routed_slots, ("also used by %softmax_1", "also used by %softmax")),
    LookAlike("normalised twice", normalised_twice, ("the weights are also used by %sum_1",)),
    LookAlike("hard attention", hard, ("the weights meet %argmax",)),
    LookAlike("no softmax", no_softmax, ()),
    LookAlike("relu attention", relu_attention, ()),
]  # fmt: skip


@pytest.mark.parametrize("look_alike", LOOK_ALIKES, ids=lambda s: s.name)
def test_look_alike(look_alike: LookAlike) -> None:
    x = torch.randn(B, N, C)
    with torch.no_grad():
        captured = capture(Projections(look_alike.run).eval(), (x,), dynamic=False)
        torch.manual_seed(1)
        wanted = captured.graph(x)
        raised = raise_sites(captured.graph)
        torch.manual_seed(1)
        found = captured.graph(x)
    expected = 1 if look_alike.name == "scores handed on" else 0
    assert len(raised.nodes) == 0 or expected
    said = [m.reason for m in raised.misses]
    assert len(said) >= len(look_alike.reasons), said
    for reason in look_alike.reasons:
        assert any(reason in s for s in said), said
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted))


def test_a_miss_names_module_and_node() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Projections(returned_weights)

        def forward(self, x: Tensor) -> Any:
            return self.inner(x)

    captured = capture(Outer().eval(), (torch.randn(B, N, C),))
    (miss,) = raise_sites(captured.graph).misses
    assert miss.where == "inner"
    assert miss.node in {n.name for n in captured.graph.graph.nodes}
