"""HyperAttention against its steps written out row by row: hash, blocks, samples, halves, the reference's habits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hosted_models import ids, llama
from language_swaps import close
from small_models import stack
from torch import Tensor, nn

import reattend
from reattend.compiler.functional import attention
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused

KNOBS = {"lsh_num_projs": 3, "block_size": 3, "sample_size": 4, "min_seq_len": 2}
PROJ = torch.randn(1, 1, 8, 3, generator=torch.Generator().manual_seed(1))
Row = tuple[Tensor, Tensor]  # numerator and denominator of a softmax


def bucket(x: Tensor) -> int:
    """The number whose reflected binary code has the sides of x as bits."""
    code = sum(int(x @ PROJ[0, 0, :, r].double() > 0) << r for r in range(3))
    table = [0, 1]
    for n in (1, 2):
        table = table + [t + 2**n for t in reversed(table)]
    return table[code]


def seen(q: Tensor, keys: list[tuple[Tensor, Tensor, float]]) -> Row:
    """Keys with a value and a weight each."""
    w = [c * torch.exp(q @ k * 8**-0.5) for k, _, c in keys]
    zero = (torch.zeros(8, dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    return (sum((a * v for a, (_, v, _) in zip(w, keys, strict=True)), zero[0]), sum(w, zero[1]))


def block_and_sample(
    q: Tensor, k: Tensor, v: Tensor, at: list[int], places: list[int] | None = None, **habits: bool
) -> list[Row]:
    """One head: every query's sums over its block and its samples."""
    n, m, size, count = len(q), len(k), KNOBS["block_size"], KNOBS["sample_size"]
    if n < KNOBS["min_seq_len"]:
        return [seen(x, [(k[j], v[j], 1.0) for j in range(m)]) for x in q]
    order = sorted(range(m), key=lambda j: bucket(k[j]))
    blocks = -(-m // size)
    rows = -(-n // size) * size // blocks
    ranks = sorted(range(n), key=lambda i: bucket(q[i]))
    answers = []
    for i in range(n):
        own = ranks.index(i) // rows if places is None else places[i]
        near = [(k[order[t]], v[order[t]], 1.0) for t in range(own * size, min(m, (own + 1) * size))]
        if habits.get("pad_keys_visible"):
            near += [(torch.zeros_like(k[0]), torch.zeros_like(v[0]), 1.0)] * (size - len(near))
        hides = habits.get("mask_block_samples", True)
        far = [(k[order[t]], v[order[t]], m / count) for t in at if not (hides and t // size == own)]
        answers.append(seen(q[i], near + (far if n > rows and m > size else [])))
    return answers


def places_of(q: Tensor, past: Tensor) -> list[int]:
    """Where each query's bucket stands among those of the past, in blocks; within a bucket by the query's number."""
    known = sorted(bucket(x) for x in past)
    found = []
    for i, x in enumerate(q):
        first = sum(b < bucket(x) for b in known)
        last = sum(b <= bucket(x) for b in known)
        place = first + (last - first) * i // len(q)
        found.append(min(place // KNOBS["block_size"], (len(known) - 1) // KNOBS["block_size"]))
    return found


@pytest.mark.parametrize(("n", "m"), [(9, 9), (11, 11), (4, 5), (8, 3)])
@pytest.mark.parametrize("habits", [{}, {"pad_keys_visible": True}, {"mask_block_samples": False}], ids=str)
def test_blocks_and_samples(n: int, m: int, habits: dict[str, bool]) -> None:
    q, k, v = problem(n, m, kv_heads=2)
    at = torch.randint(m, (2, 4, 4), generator=torch.Generator().manual_seed(2))
    got = attention(q, k, v, "hyper", params={"lsh_proj": PROJ}, ports={"sample_idx": at}, **KNOBS, **habits)
    expected = torch.empty_like(q, dtype=torch.float64)
    for b in range(2):
        for h in range(4):
            head = (q[b, h].double(), k[b, h // 2].double(), v[b, h // 2].double())
            rows = block_and_sample(*head, at[b, h].tolist(), **habits)
            expected[b, h] = torch.stack([num / den for num, den in rows])
    assert close(got, expected)


def halved(q: Tensor, k: Tensor, v: Tensor, samples: dict[str, list[int]], way: str, ranked: bool) -> list[Row]:
    """One head, causal: the sums of each row; `way` names a part of the sequence, "" all, "01" first half's second."""
    n = len(q)
    if n <= KNOBS["min_seq_len"]:
        return [seen(q[i], [(k[j], v[j], 1.0) for j in range(i + 1)]) for i in range(n)]
    if n % 2:
        q, k, v = (torch.cat((t, torch.zeros_like(t[:1]))) for t in (q, k, v))
    half = len(q) // 2
    early, late = (
        halved(q[s], k[s], v[s], samples, way + w, ranked) for s, w in ((slice(half), "0"), (slice(half, None), "1"))
    )
    places = None if ranked else places_of(q[half:], q[:half])
    far = block_and_sample(q[half:], k[:half], v[:half], samples[way], places)
    return (early + [(a + c, b + d) for (a, b), (c, d) in zip(late, far, strict=True)])[:n]


@pytest.mark.parametrize("n", [8, 13])
@pytest.mark.parametrize("ranked", [False, True])
def test_halves(n: int, ranked: bool) -> None:
    q, k, v = problem(n, heads=2)
    sizes, depth = [n], 0
    while sizes[-1] > KNOBS["min_seq_len"]:
        sizes.append(-(-sizes[-1] // 2))
        depth += 1
    calls = [
        torch.randint(sizes[d + 1], (2, 2 * 2**d, 4), generator=torch.Generator().manual_seed(d))
        for d in reversed(range(depth))
    ]
    knobs = {**KNOBS, "ranked_queries": ranked}
    ports = {"sample_idx": torch.cat([at for at, m in zip(calls, sizes[::-1], strict=False) if m > 3], 1)}
    got = attention(q, k, v, "hyper", causal=True, params={"lsh_proj": PROJ}, ports=ports, **knobs)
    expected = torch.empty_like(q, dtype=torch.float64)
    for b in range(2):
        for h in range(2):
            samples = {
                format(part, f"0{d}b") if d else "": calls[depth - 1 - d][b, h * 2**d + part].tolist()
                for d in range(depth)
                for part in range(2**d)
            }
            rows = halved(q[b, h].double(), k[b, h].double(), v[b, h].double(), samples, "", ranked)
            expected[b, h] = torch.stack([num / den for num, den in rows])
    assert close(got, expected)


def test_only_the_reference_lets_later_queries_choose() -> None:
    q, k, v = problem(64)
    late = q.clone()
    late[:, :, 60:] = -5 * late[:, :, 60:]
    knobs = {**KNOBS, "min_seq_len": 8, "sample_size": 0}
    for ranked, same in ((False, True), (True, False)):
        one, two = (attention(t, k, v, "hyper", causal=True, ranked_queries=ranked, **knobs) for t in (q, late))
        assert torch.equal(one[:, :, :60], two[:, :, :60]) == same


def test_the_mean_over_many_draws_is_the_sum_over_all_keys() -> None:
    """What is sampled is unbiased: the weight of a sampled key times the chance that it is drawn is its own weight."""
    q, k, v = problem(8, heads=1, batch=1)
    knobs = {"lsh_num_projs": 2, "block_size": 2, "sample_size": 4000, "min_seq_len": 1}
    torch.manual_seed(3)
    got = attention(q, k, v, "hyper", **knobs)
    error = (got - attention(q, k, v, "softmax")).abs().max()
    assert error < 0.1, "4000 draws of 8 keys: each is drawn 500 times, within 22 or so"
    assert error > 0


class OfOneLength(nn.Module):
    """A causal stack over pages of 13 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = stack(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.stack(x.reshape(-1, 13, 32))


RECIPE = {"version": 1, "sites": [{"match": "*", "attention": {"hyper": {**KNOBS, "min_seq_len": 4}}}]}


def test_in_a_model_of_one_length() -> None:
    model, x = OfOneLength(), torch.randn(2, 13, 32)
    fast = reattend.optimize(model, RECIPE, (x,), measure=False)
    full, got = model(x), fast(x)
    assert (got - full).abs().max() > 1e-4
    assert close(got[:, :4], full[:, :4]), "the first half of a half is exact"
    got.square().mean().backward()
    assert all(torch.isfinite(t.grad).all() for t in fast.parameters() if t.requires_grad)


def test_open_lengths_are_refused() -> None:
    with pytest.raises(Refused, match="known length"):
        reattend.optimize(llama(), RECIPE, {"input_ids": ids(2, 13)}, measure=False)


@pytest.mark.parametrize(
    ("knobs", "n", "m", "match"), [({}, 4, 12, "do not fall"), ({"block_size": 0}, 5, 5, "at least 1")]
)
def test_refused(knobs: dict[str, Any], n: int, m: int, match: str) -> None:
    q, k, v = problem(n, m)
    with pytest.raises(Refused, match=match):
        attention(q, k, v, "hyper", **{**KNOBS, **knobs})
