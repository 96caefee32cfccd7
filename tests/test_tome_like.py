"""Token merging against its card: the merge as a linear map, protected tokens, schedules, and in a real encoder."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reattend
from reattend import Refused, mechanism
from reattend.passes.tokens.bipartite import Plan, match, match_at_random, match_every, merge, sources, unmerge


def linear_map(plan: Plan) -> Tensor:
    """P (B, N_out, N) with a 1 where a token goes."""
    return F.one_hot(plan.rows, plan.total).mT.to(torch.float32)


@pytest.mark.parametrize(("n", "r"), [(8, 3), (9, 4), (9, 0), (5, 1)])
@pytest.mark.parametrize("class_token", [True, False])
def test_a_merge_is_a_weighted_mean_by_the_matching_of_the_card(n: int, r: int, class_token: bool) -> None:
    metric, x, size = torch.randn(2, n, 6), torch.randn(2, n, 4), torch.randint(1, 4, (2, n, 1)).float()
    plan = match(metric, r, class_token=class_token, distill_token=False)
    for b in range(2):
        u = F.normalize(metric[b], dim=-1)
        scores = u[::2] @ u[1::2].T
        if class_token:
            scores[0] = -torch.inf
        order = sorted(range(len(scores)), key=lambda a: (-scores[a].max().item(), a))
        merged, kept = order[:r], order[r:]
        kept = sorted(kept) if class_token else kept
        rows = [0] * n
        for row, a in enumerate(kept):
            rows[2 * a] = row
        for k in range(n // 2):
            rows[2 * k + 1] = len(kept) + k
        for a in merged:
            rows[2 * a] = len(kept) + int(scores[a].argmax())
        assert plan.rows[b].tolist() == rows
    P = linear_map(plan)
    out, grown = merge(plan, x, size)
    torch.testing.assert_close(grown, P @ size)
    torch.testing.assert_close(out, P @ (x * size) / (P @ size))
    assert P.sum(1).eq(1).all() and grown.sum() == size.sum()


def test_equal_tokens_come_back_when_they_are_unmerged() -> None:
    x = torch.randn(1, 4, 3).repeat_interleave(2, 1)
    plan = match(x, 4)
    merged, _ = merge(plan, x, torch.ones(1, 8, 1))
    torch.testing.assert_close(unmerge(plan, merged), x)


def test_every_kth_token_stays_and_a_short_tail_is_dropped() -> None:
    x = torch.randn(2, 11, 4)
    plan = match_every(x, 3)
    assert plan.total == 3 and plan.rows[:, [2, 5, 8]].tolist() == [[0, 1, 2]] * 2
    u = F.normalize(x, dim=-1)
    for b in range(2):
        for token in (0, 1, 3, 4, 6, 7):
            assert plan.rows[b, token] == (u[b, token] @ u[b, [2, 5, 8]].T).argmax()
    merged, size = merge(plan, x, torch.ones(2, 11, 1))
    assert size.sum(1).eq(9).all()
    assert unmerge(plan, merged)[:, 9:].eq(0).all()


def test_random_sources_join_the_token_most_like_them() -> None:
    x, uniform = torch.randn(2, 8, 4), torch.rand(2, 8)
    plan = match_at_random(x, 3, uniform)
    order = uniform.argsort(-1)
    u = F.normalize(x, dim=-1)
    for b in range(2):
        kept = order[b, 3:]
        assert plan.rows[b, kept].tolist() == [0, 1, 2, 3, 4]
        for token in order[b, :3]:
            assert plan.rows[b, token] == (u[b, token] @ u[b, kept].T).argmax()


def test_sources_follow_tokens_through_merges() -> None:
    x = torch.randn(2, 9, 4)
    first = match(x, 3, class_token=True)
    merged, size = merge(first, x, torch.ones(2, 9, 1))
    second = match(merged, 2, class_token=True)
    _, size = merge(second, merged, size)
    members = sources(second, sources(first))
    assert members.shape == (2, 4, 9) and members.sum(1).eq(1).all()
    torch.testing.assert_close(members.sum(-1, keepdim=True), size)


def test_class_and_distillation_tokens_stay_in_front() -> None:
    x = torch.randn(2, 10, 4)
    plan = match(x, 3, class_token=True, distill_token=True)
    merged, size = merge(plan, x, torch.ones(2, 10, 1))
    torch.testing.assert_close(merged[:, :2], x[:, :2])
    assert size[:, :2].eq(1).all()


def test_schedules() -> None:
    assert mechanism("tome_like", r=8).schedule(3) == (8, 8, 8)
    assert mechanism("tome_like", r=8, r_inflect=-1.0).schedule(3) == (16, 8, 0)
    assert mechanism("tome_like", r=8, r_inflect=1.0).schedule(3) == (0, 8, 16)
    assert mechanism("tome_like", r=(5, 2)).schedule(4) == (5, 2, 0, 0)


class Encoder(nn.Module):
    """A small ViT over (B, 17 * 32): a class token, sixteen patches."""

    def __init__(self, layers: int = 2, *, causal: bool = False) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2 * layers))
        self.qkv = nn.ModuleList(nn.Linear(32, 96) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(32, 32) for _ in range(layers))
        self.mlp = nn.ModuleList(nn.Linear(32, 32) for _ in range(layers))
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 17, 32)  # an image has one size
        for k, (qkv, out, mlp) in enumerate(zip(self.qkv, self.out, self.mlp)):
            B, N, C = x.shape
            q, key, v = qkv(self.norms[2 * k](x)).reshape(B, N, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
            o = F.scaled_dot_product_attention(q, key, v, is_causal=self.causal)
            x = x + out(o.transpose(1, 2).reshape(B, N, C))
            x = x + mlp(self.norms[2 * k + 1](x))
        return x


def by_hand(model: Encoder, x: Tensor, r: int) -> Tensor:
    x = x.view(-1, 17, 32)
    size = torch.ones(*x.shape[:2], 1)
    for k, (qkv, out, mlp) in enumerate(zip(model.qkv, model.out, model.mlp)):
        B, N, C = x.shape
        q, key, v = qkv(model.norms[2 * k](x)).reshape(B, N, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ key.mT * 8**-0.5 + size.log().mT[:, None]).softmax(-1)
        x = x + out((weights @ v).transpose(1, 2).reshape(B, N, C))
        x, size = merge(match(key.mean(1), r, class_token=True, distill_token=False), x, size)
        x = x + mlp(model.norms[2 * k + 1](x))
    return x


def test_in_a_model_it_is_what_the_card_says() -> None:
    model, x = Encoder().eval(), torch.randn(2, 17 * 32)
    fast = reattend.optimize(model, {"version": 1, "passes": [{"tome_like": {"r": 3}}]}, x, measure=False)
    assert fast(x).shape == (2, 11, 32)
    torch.testing.assert_close(fast(x), by_hand(model, x, 3), atol=1e-5, rtol=1e-5)
    untouched = reattend.optimize(model, {"version": 1, "passes": ["tome_like"]}, x, measure=False)
    torch.testing.assert_close(untouched(x), model(x), atol=1e-6, rtol=1e-6)


def test_the_sources_of_every_row_are_traced() -> None:
    model, x = Encoder().eval(), torch.randn(2, 17 * 32)
    recipe = {"version": 1, "passes": [{"tome_like": {"r": 3, "trace_source": True}}]}
    fast = reattend.optimize(model, recipe, x, measure=False)
    torch.testing.assert_close(fast(x), by_hand(model, x, 3), atol=1e-5, rtol=1e-5)
    first, last = fast.traces().values()
    assert first.shape == (2, 14, 17) and last.shape == (2, 11, 17)
    assert last.sum(1).eq(1).all() and ((last.sum(-1) > 1).sum() > 0)
    assert last[:, 0, 0].eq(1).all()  # the class token is its own row


def test_unmerge_gives_every_token_its_row_back() -> None:
    model, x = Encoder().eval(), torch.randn(2, 17 * 32)
    recipe = {"version": 1, "passes": [{"tome_like": {"r": 3, "unmerge": True}}]}
    fast = reattend.optimize(model, recipe, x, measure=False)
    assert fast(x).shape == (2, 17, 32)
    torch.testing.assert_close(fast(x)[:, 0], by_hand(model, x, 3)[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("algorithm", "left"), [("kth", 5), ("random", 14)])
def test_the_other_algorithms_run_in_a_model(algorithm: str, left: int) -> None:
    model, x = Encoder().eval(), torch.randn(2, 17 * 32)
    knobs = {"r": [3], "algorithm": algorithm, "stride": 3, "class_token": False}
    fast = reattend.optimize(model, {"version": 1, "passes": [{"tome_like": knobs}]}, x, measure=False)
    assert fast(x).shape == (2, left, 32) and fast(x).isfinite().all()


def test_what_no_algorithm_does_is_refused() -> None:
    with pytest.raises(Refused, match="did you mean 'random'"):
        mechanism("tome_like", algorithm="randm")
    with pytest.raises(Refused, match="kth protects no token: class_token: false"):
        mechanism("tome_like", algorithm="kth")
    with pytest.raises(Refused, match="stride=1"):
        mechanism("tome_like", algorithm="kth", class_token=False, stride=1)


def test_a_causal_model_is_refused_by_name() -> None:
    with pytest.raises(Refused, match="noncausal"):
        reattend.optimize(
            Encoder(causal=True).eval(), {"version": 1, "passes": [{"tome_like": {"r": 2}}]}, torch.randn(2, 17 * 32)
        )
