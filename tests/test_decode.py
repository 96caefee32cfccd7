"""Decoding token by token gives what the whole sequence gives, and keeps no more than later tokens can reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reattend import Refused, attend, attention
from reattend.compiler.decode import Decoder
from reattend.compiler.decode_ways import KeptKeys
from reattend.compiler.live import KEPT
from reattend.compiler.mechanism import Mechanism, Param, mechanism
from reattend.compiler.place import stand, started
from reattend.compiler.primitives.attend_spec import AttendSpec
from reattend.compiler.primitives.scan import scan
from reattend.compiler.problem import hidden, problem
from reattend.compiler.reach import Reach, kept_keys, key_positions, moves_freely, reach
from reattend.compiler.site import Site

SITE = Site("layer", 0, heads=4, kv_heads=2, dim=8, v_dim=8, scale=8**-0.5, pattern="causal-self")
CAUSAL = "j <= i"


def in_parts(decoder: Decoder, qkv: tuple[Tensor, Tensor, Tensor], cuts: list[int]) -> Tensor:
    """The sequence cut at these places: the first part by prefill, the others by step."""
    rows = []
    for start, stop in pairwise([0, *cuts, qkv[0].shape[2]]):
        run = decoder.step if start else decoder.prefill
        rows.append(run(*(t[:, :, start:stop] for t in qkv)))
    return torch.cat(rows, 2)


def spec(keep: str, score: str = "s") -> str:
    return AttendSpec(score, keep).text


# --- reach ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "expected", "free"),
    [
        (CAUSAL, Reach(None, 0, 0), True),
        ("(j <= i) & (i <= j + 5)", Reach(5, 0, 0), True),
        ("(j <= i) & ((i <= j + 5) | (j <= 1))", Reach(5, 0, 2), True),
        ("(j <= i) & ((i <= j + 5) | (j <= 1)) & (i <= j + 9)", Reach(9, 0, 0), False),
        ("(j <= i) & ((i <= j + 5) | (j <= 1)) & (t0[b, j] != 0)", Reach(5, 0, 2), False),
        ("(j <= i) & (t0[b, i] == t0[b, j])", Reach(None, 0, 0), False),
        ("(j <= i) & ((i - j) % 3 == 0)", Reach(None, 0, 0), False),
        ("", Reach(), True),
    ],
)
def test_reach_is_read_off_the_predicate(keep: str, expected: Reach, free: bool) -> None:
    assert reach(spec(keep)) == expected
    assert moves_freely(spec(keep)) is free


def test_a_score_that_knows_a_position_does_not_move() -> None:
    assert not moves_freely(spec(CAUSAL, "s + (j - i) * 0.5"))
    assert not moves_freely(AttendSpec("s", CAUSAL, after="w * (i + 1)").text)
    assert not moves_freely(AttendSpec("s", CAUSAL, k_positions="t0").text)


@given(back=st.integers(0, 6), sinks=st.integers(0, 4), length=st.integers(0, 20))
def test_nothing_that_can_be_reached_is_dropped(back: int, sinks: int, length: int) -> None:
    bound = Reach(back, 0, sinks)
    kept = kept_keys(length, bound)
    reached = [j for j in range(length) if length - j <= back or j < sinks]
    assert kept is not None and kept.tolist() == reached
    places = key_positions(len(reached) + 2, length, 2, bound)
    assert places.tolist() == [*reached, length, length + 1]


def test_without_a_bound_everything_is_kept() -> None:
    assert kept_keys(9, AttendSpec("s", CAUSAL)) is None


# --- decode = prefill -------------------------------------------------------------------------------------------------

MECHANISMS: list[Mechanism] = [
    mechanism("window", window=6, sinks=2),
    mechanism("window", window=1, sinks=0),
    mechanism("window", window=3, sinks=5),
    mechanism("window", window=100, sinks=1),
    mechanism("softmax"),
    mechanism("sigmoid", bias=-2.0),
    mechanism("sigmoid", sim="softmax", sink="kv_bias"),
    mechanism("sigmoid", normalize="position"),
    mechanism("linear"),
    mechanism("linear", feature_map="relu", eps=1e-3),
]


@pytest.mark.parametrize("chosen", MECHANISMS, ids=repr)
def test_decode_is_prefill(chosen: Mechanism) -> None:
    qkv = problem(40, kv_heads=2, dtype=torch.float64)
    params = started(chosen.params(SITE), qkv[0])
    whole = attention(*qkv, chosen, causal=True, params=params)
    decoder = Decoder(chosen, SITE, params=params)
    for cuts in (list(range(1, 40)), [9, 10, 11, 25], []):
        torch.testing.assert_close(in_parts(decoder, qkv, cuts), whole, atol=1e-6, rtol=1e-5)


@settings(max_examples=10)
@given(
    window=st.integers(1, 12),
    sinks=st.integers(0, 5),
    cuts=st.lists(st.integers(1, 29), unique=True, max_size=12).map(sorted),
    kv_heads=st.sampled_from([1, 2, 4]),
)
def test_any_window_in_any_parts(window: int, sinks: int, cuts: list[int], kv_heads: int) -> None:
    qkv = problem(30, kv_heads=kv_heads, dtype=torch.float64)
    chosen = mechanism("window", window=window, sinks=sinks)
    decoder = Decoder(chosen, replace(SITE, kv_heads=kv_heads))
    whole = attention(*qkv, chosen, causal=True)
    torch.testing.assert_close(in_parts(decoder, qkv, cuts), whole, atol=1e-9, rtol=1e-9)
    assert decoder.state["k"].shape[2] == min(30, window - 1 + sinks)


def test_a_window_is_a_ring_that_does_not_grow() -> None:
    decoder = Decoder(mechanism("window", window=6, sinks=2), SITE)
    q, k, v = problem(200, kv_heads=2)
    decoder.prefill(q[:, :, :50], k[:, :, :50], v[:, :, :50])
    for n in range(50, 200):
        decoder.step(*(t[:, :, n : n + 1] for t in (q, k, v)))
        # 2 sinks and the 5 keys that stand before the next token in its window of 6
        assert decoder.state["k"].shape == decoder.state["v"].shape == (2, 2, 7, 8)
        assert decoder.state_bytes == 2 * (2 * 2 * 7 * 8) * 4
        assert decoder.state["k"].untyped_storage().nbytes() == decoder.state_bytes // 2
    torch.testing.assert_close(decoder.state["k"], k[:, :, [0, 1, 195, 196, 197, 198, 199]])
    assert decoder.seen == 200


def test_a_scan_keeps_its_state_alone() -> None:
    decoder = Decoder(mechanism("linear"), SITE)
    sizes = []
    for count in (5, 50):
        decoder.prefill(*problem(count, kv_heads=2))
        sizes.append(decoder.state_bytes)
    assert sizes == [2 * 4 * 8 * 9 * 4] * 2


@dataclass(frozen=True)
class Slanted(Mechanism):
    """A window whose score falls with distance and rises with the key's position: rows of a ring are no positions."""

    slug = "slanted"
    honours = KEPT

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def keep(i: Any, j: Any) -> Any:
            return (i - j < 5) | (j < 2)

        return attend(q, k, v, keep=keep, score=lambda s, i, j: s - 0.5 * (i - j) + 0.01 * j * i, site=site)


@pytest.mark.parametrize("cuts", [list(range(1, 60)), [7, 30, 31]])
def test_positions_stay_right_after_many_wraps(cuts: list[int]) -> None:
    decoder = Decoder(Slanted(), SITE)
    assert isinstance(decoder.way, KeptKeys) and not decoder.way.free and decoder.way.bound == Reach(4, 0, 2)
    qkv = problem(60, kv_heads=2, dtype=torch.float64)
    torch.testing.assert_close(
        in_parts(decoder, qkv, cuts), attention(*qkv, Slanted(), causal=True), atol=1e-9, rtol=1e-9
    )
    assert decoder.state["k"].shape[2] == 6


def test_the_bias_and_padding_of_a_site_are_looked_up_by_position() -> None:
    bias = torch.randn(1, 4, 30, 30, dtype=torch.float64)
    padding = torch.rand(2, 30) < 0.7
    stands = AttendSpec("s * 0.25 + t1[0, h, i, j]", "(j <= i) & (t0[b, j] != 0)")
    site = replace(SITE, scale=0.25, features=frozenset({"bias", "padding"}))
    chosen = mechanism("window", window=4, sinks=1)
    qkv = problem(30, kv_heads=2, dtype=torch.float64)
    decoder = Decoder(chosen, site, spec=stands, tables=(padding, bias))
    whole = attention(*qkv, chosen, causal=True, scale=0.25, mask=padding, bias=bias)
    torch.testing.assert_close(in_parts(decoder, qkv, [5, 6, 7, 20]), whole, atol=1e-9, rtol=1e-9)
    assert decoder.state["k"].shape[2] == 4


# --- a mechanism's own way --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunningMean(Mechanism):
    """The mean of all values so far, by two primitives where one would do: it brings its own state."""

    slug = "running_mean"

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ones = torch.ones_like(q[..., :1])
        sums, counts = scan(ones, ones[:, : v.shape[1]], v), scan(ones, ones, ones)
        return sums / counts  # type: ignore[no-any-return]


@dataclass(frozen=True)
class RunningMeanInSteps(RunningMean):
    def state(self, site: Site, q: Tensor) -> Mapping[str, Tensor]:
        return {"sum": q.new_zeros(q.shape[0], site.kv_heads, 1, site.v_dim), "count": q.new_zeros(1)}

    def prefill(self, site: Site, p: Any, state: Mapping[str, Tensor], q: Tensor, k: Tensor, v: Tensor) -> Any:
        sums = state["sum"] + v.cumsum(2)
        counts = state["count"] + torch.arange(1, v.shape[2] + 1)
        o = (sums / counts[:, None]).repeat_interleave(q.shape[1] // v.shape[1], 1)
        return o, {"sum": sums[:, :, -1:], "count": counts[-1:]}

    step = prefill


def test_a_mechanism_brings_its_own_state() -> None:
    qkv = problem(12, kv_heads=2, dtype=torch.float64)
    whole = attention(*qkv, RunningMean(), causal=True)
    decoder = Decoder(RunningMeanInSteps(), SITE)
    torch.testing.assert_close(in_parts(decoder, qkv, [4, 5, 9]), whole)
    assert set(decoder.state) == {"sum", "count"}


# --- refusals ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placeless(Mechanism):
    slug = "placeless"

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, causal=True)


@dataclass(frozen=True)
class Centred(Mechanism):
    """Takes the mean of all keys away: a later key changes earlier rows."""

    slug = "centred"

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k - 2 * k.mean(2, keepdim=True), v, score=lambda s, j: s * (1 + j), site=site)


@dataclass(frozen=True)
class Drawn(Mechanism):
    slug = "drawn"

    def draws(self, site: Site) -> Mapping[str, Param]:
        return {"r": Param((site.dim,), torch.Tensor.normal_)}

    def forward(self, site: Any, p: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q * p.r, k, v, site=site)


BOTH_WAYS = replace(SITE, pattern="noncausal-self")
REFUSED = [
    pytest.param(RunningMean(), SITE, "2 primitive calls .*state, prefill and step", id="two scans"),
    pytest.param(Placeless(), SITE, "without site=site", id="no site"),
    pytest.param(Centred(), SITE, "differs from the whole sequence", id="later keys count"),
    pytest.param(Drawn(), SITE, "random", id="random"),
    pytest.param(mechanism("sigmoid", bias="-ln(M)"), SITE, "number", id="length"),
    pytest.param(mechanism("agent"), SITE, "noncausal", id="noncausal only"),
    pytest.param(mechanism("window"), BOTH_WAYS, "causal-self site", id="noncausal site"),
    pytest.param(mechanism("moh"), SITE, "core mechanism", id="a gate"),
]


@pytest.mark.parametrize(("chosen", "site", "says"), REFUSED)
def test_what_cannot_decode_is_refused_by_name(chosen: Mechanism, site: Site, says: str) -> None:
    with pytest.raises(Refused, match=says) as refused:
        Decoder(chosen, site)
    assert chosen.slug in str(refused.value)


def test_queries_without_their_keys_are_refused() -> None:
    q, k, v = problem(3, 4, kv_heads=2)
    with pytest.raises(Refused, match="3 queries, 4 keys"):
        Decoder(mechanism("softmax"), SITE).step(q, k, v)


@pytest.mark.parametrize(
    ("slug", "knobs", "port"),
    [
        ("lightning", {"act": "silu_qkv", "norm": "layernorm", "gate": "sigmoid", "gate_rank": 2}, "x"),
        ("lightning", {"act": "silu_qk", "norm": "simple_rmsnorm", "gate": "linear", "lrpe": True}, "gate"),
        ("based", {"feature_dim": 3}, "x"),
    ],
    ids=str,
)
def test_what_a_forward_reads_of_a_token_is_given_with_it(slug: str, knobs: dict[str, Any], port: str) -> None:
    """A gate made of the hidden state needs that of the new tokens, and no more."""
    q, k, v = problem(11)
    rows = {"x": hidden(11), "gate": problem(11, seed=5)[0]}[port]
    chosen = mechanism(slug, **knobs)
    site = stand(q, k, v, ports={port: rows}, causal=True).site
    draw = torch.Generator().manual_seed(1)
    own = {name: 0.5 * torch.randn(d.shape, generator=draw) for name, d in chosen.params(site).items()}
    whole = attention(q, k, v, chosen, causal=True, params=own, ports={port: rows})
    decoder, got = Decoder(chosen, site, params=own), []
    for first, last in ((0, 4), (4, 5), (5, 6), (6, 9), (9, 11)):
        here = {port: rows.narrow(rows.ndim - 2, first, last - first)}
        call = decoder.step if first else decoder.prefill
        got.append(call(*(t[:, :, first:last] for t in (q, k, v)), **here))
    assert (torch.cat(got, 2) - whole).abs().max() <= 1e-5
    assert set(decoder.state) == {"state"}
    with pytest.raises(Refused, match=port):
        decoder.step(*(t[:, :, :1] for t in (q, k, v)))


def _rat_state(n: int) -> dict[str, tuple[int, ...]]:
    return {"k": (2, 4, n // 3, 8), "v": (2, 4, n // 3, 8), "pair": (2, 4, 1, 16)}


def _cca_state(n: int) -> dict[str, tuple[int, ...]]:
    groups = max(0, (n - 3) // 2)
    return {"core_k": (2, 4, groups, 8), "core_v": (2, 4, groups, 8), "k": (2, 2, n - 2 * groups, 8)}


def _combiner_state(n: int) -> dict[str, tuple[int, ...]]:
    return {"span_k": (2, 4, n // 3, 8), "span_v": (2, 4, n // 3, 8), "k": (2, 4, n % 3, 8), "v": (2, 4, n % 3, 8)}


def _duo_state(n: int) -> dict[str, tuple[int, ...]]:
    return {"full_k": (2, 1, n, 8), "full_v": (2, 1, n, 8), "near_k": (2, 1, 4, 8), "near_v": (2, 1, 4, 8)}


@pytest.mark.parametrize("cuts", [(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12), (5, 6, 10), (2, 11), (8, 9)])
@pytest.mark.parametrize(
    ("slug", "knobs", "state"),
    [
        ("rat", {"chunk_size": 3}, _rat_state),
        ("rat", {"chunk_size": 3, "rope_base": 0.0}, _rat_state),
        ("cca", {"group_size": 2, "window_size": 3}, _cca_state),
        ("cca", {"group_size": 2, "window_size": 3, "pool_func": "max"}, _cca_state),
        ("combiner", {"seg_len": 3}, _combiner_state),
        ("combiner", {"seg_len": 3, "summary_pool": "deepset-mean"}, _combiner_state),
        ("duo", {"sink_size": 1, "recent_size": 3, "threshold": 0.5}, _duo_state),
        ("duo", {"sink_size": 1, "recent_size": 3}, None),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_what_keeps_more_than_keys_or_a_scan_decodes_too(
    slug: str, knobs: dict[str, Any], state: Any, cuts: Any
) -> None:
    """Summaries of closed chunks, groups and rows beside the open one; full heads beside streaming ones."""
    q, k, v = problem(13, kv_heads=2)
    ports = {"g": problem(13, seed=5)[0], "z": problem(13, seed=6)[0]} if slug == "rat" else {}
    chosen = mechanism(slug, **knobs)
    site = stand(q, k, v, ports=ports, causal=True).site
    draw = torch.Generator().manual_seed(1)
    own = {name: torch.randn(d.shape, generator=draw) for name, d in chosen.params(site).items()}
    if slug == "duo":
        own = {"gate": torch.tensor([0.9, 0.1])}
    whole = attention(q, k, v, chosen, causal=True, params=own, ports=ports)
    decoder, got = Decoder(chosen, site, params=own), []
    for first, last in pairwise([0, *cuts, 13]):
        here = {port: t[:, :, first:last] for port, t in ports.items()}
        call = decoder.step if first else decoder.prefill
        got.append(call(*(t[:, :, first:last] for t in (q, k, v)), **here))
    assert (torch.cat(got, 2) - whole).abs().max() <= 1e-5
    for name, shape in (state(13) if state else {}).items():
        assert tuple(decoder.state[name].shape) == shape, name


def test_a_prompt_may_be_seen_whole_by_streaming_heads() -> None:
    q, k, v = problem(13, kv_heads=2)
    own, knobs = {"gate": torch.tensor([0.0, 1.0])}, {"sink_size": 1, "recent_size": 3, "threshold": 0.5}
    decoder = Decoder(mechanism("duo", prefill="full", **knobs), SITE, params=own)
    prompt = decoder.prefill(*(t[:, :, :9] for t in (q, k, v)))
    assert torch.allclose(prompt, attention(*(t[:, :, :9] for t in (q, k, v)), "softmax", causal=True), atol=1e-5)
    rest = decoder.step(*(t[:, :, 9:] for t in (q, k, v)))
    assert torch.allclose(rest, attention(q, k, v, "duo", causal=True, params=own, **knobs)[:, :, 9:], atol=1e-5)
    assert decoder.state["near_at"].tolist() == [0, 10, 11, 12]


@pytest.mark.parametrize("cuts", [(9, 10, 11, 12), (5, 8), (2, 3, 9)])
def test_streaming_heads_may_see_their_whole_cache(cuts: tuple[int, ...]) -> None:
    """As deployed: what is kept and the new tokens so far, then the sinks and the latest are kept."""
    q, k, v = problem(13, kv_heads=2)
    own, knobs = {"gate": torch.tensor([0.0, 1.0])}, {"sink_size": 1, "recent_size": 3, "threshold": 0.5}
    decoder, held = Decoder(mechanism("duo", whole_cache=True, **knobs), SITE, params=own), list[int]()
    for first, last in pairwise([0, *cuts, 13]):
        here = [t[:, :, first:last] for t in (q, k, v)]
        got = (decoder.step if first else decoder.prefill)(*here)
        for n in range(first, last):
            near, every = [*held, *range(first, n + 1)], list(range(n + 1))
            for h in range(4):
                at = near if h < 2 else every
                w = torch.softmax(k[:, h // 2, at] @ q[:, h, n, :, None] * 8**-0.5, 1)
                assert torch.allclose(got[:, h, n - first], (w * v[:, h // 2, at]).sum(1), atol=1e-5)
        held = [*held, *range(first, last)]
        held = held if len(held) <= 4 else held[:1] + held[-3:]


def test_a_mixture_of_rows_and_columns_does_not_decode() -> None:
    q, k, v = problem(3, kv_heads=2)
    with pytest.raises(Refused, match="variant='fixed'"):
        Decoder(mechanism("combiner", variant="logsparse"), SITE).prefill(q, k, v)
