"""Generated C++ means what the primitives mean: every feature of a spec against float64, odd sizes, poisoned memory."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_calls import (
    AFTERWARDS,
    ATTENDS,
    BIAS,
    RELATIVES,
    ROWS,
    SCANS,
    SLOPE,
    B,
    D,
    Dv,
    H,
    M,
    N,
    drawn,
    minimum,
    must_build,
    said,
    same,
    wide,
)
from processes import at_once

from reattend.codegen import relative
from reattend.codegen.cpu import asked
from reattend.codegen.cpu import attend as attending
from reattend.codegen.cpu import attend_backward as backwards
from reattend.codegen.cpu import scan as scanning
from reattend.codegen.cpu import toolchain as tools
from reattend.compiler.doctor import cpu_flags
from reattend.compiler.primitives import attend as attend_front
from reattend.compiler.primitives import scan as scan_front
from reattend.compiler.primitives.attend import Relative, attend
from reattend.compiler.primitives.attend_meaning import attend_meaning
from reattend.compiler.primitives.scan import scan
from reattend.compiler.primitives.scan_meaning import scan_meaning
from reattend.compiler.refusal import Refused
from reattend.compiler.symbols import build, table

pytestmark = pytest.mark.skipif(tools.toolchain() is None, reason="no C++ compiler on this machine")


@pytest.mark.parametrize("name", ATTENDS)
def test_attend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn(B, H, N, D), drawn(B, M, 2, D).transpose(1, 2), drawn(B, 2, M, Dv)
    groups, text = said(monkeypatch, attend_front, "attend_op", lambda: attend(q, k, v, **ATTENDS[name]))
    assert attending.refuses(groups, text) is None
    same(attending.run(groups, text), attend_meaning(wide(groups), text), 2e-6)


@pytest.mark.parametrize("name", ["softplus", "log"])
def test_logarithms_of_every_size(name: str) -> None:
    """One key of 1: the weight is the function of the query, over all of float32's range and what lies beside it."""
    beside = torch.tensor([0.0, 1.0, -1.0, math.inf, -math.inf, math.nan])
    near = 1 + torch.arange(-500, 500) * 2.0**-23
    far = torch.logspace(-37.9, 38, 20000, dtype=torch.float64).float()
    x = torch.cat((torch.linspace(-60, 60, 20000), near, far, beside))
    one = torch.ones(1, 1, 1, 1)
    seen: list[tuple[Any, str]] = []
    with pytest.MonkeyPatch.context() as patched:
        seen.append(said(patched, attend_front, "attend_op", lambda: attend(
            x.view(1, 1, -1, 1), one, one, weight=lambda s: build(name, s), normaliser="none", scale=1.0)))  # fmt: skip
    (got,) = attending.run(*seen[0])
    expected = {"softplus": torch.nn.functional.softplus, "log": torch.log}[name](x.double())
    # of exp(-60) the argument is rounded, where it is made one of exp2: 60 * 2 ** -24
    torch.testing.assert_close(got.flatten().double(), expected, rtol=5e-6, atol=0.0, equal_nan=True)


MORE = AFTERWARDS | RELATIVES | {
    "a factor of the distance": {"after": lambda w, h, i, j: w * table(BIAS)[h, i - j + M] / (h + 2), "causal": True},
    "distances, heads last": {"score": lambda s, h, i, j: s + table(BIAS.mT)[j - i + N, h]},
    "distances without a side": {"score": lambda s, h, i, j: s * table(BIAS)[h, abs(i - j)], "causal": True},
    "every second distance": {"score": lambda s, h, i, j: s + table(BIAS)[h, abs(i - 2 * j)]},
    "a factor without bound beyond the keys": {"after": lambda w, j: w / (M - j)},
    "distances and documents": RELATIVES["distances of keys"] | {"keep": ATTENDS["documents"]["keep"]},
}  # fmt: skip
SAID = ("changed afterwards", "scaled afterwards", "distances of keys", "a factor of the distance",
        "distances, heads last", "distances without a side", "every second distance",
        "a factor without bound beyond the keys", "distances and documents")  # fmt: skip


@pytest.mark.parametrize("halves", ["", "emulated"])
@pytest.mark.parametrize("name", SAID)
def test_factors_of_weights_and_relative_terms(name: str, halves: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = torch.bfloat16 if halves else torch.float32
    q, k, v = (t.to(kind) for t in (drawn(B, H, N, D), drawn(B, M, 2, D).transpose(1, 2), drawn(B, 2, M, Dv)))
    groups, text = said(monkeypatch, attend_front, "attend_op", lambda: attend(q, k, v, **MORE[name]))
    assert attending.refuses(groups, text) is None
    found = attending.run(groups, text, halves=halves)
    same(found, attend_meaning(wide(groups), text), 8e-3 if halves else 2e-6)


def _above(y: Any, n: int) -> Any:
    return torch.where(y > 0, torch.log(torch.where(y > 0, y, 1.0)) * n, -math.inf)


POWERS: dict[str, dict[str, Any]] = {  # scores whose weights are powers
    "of softplus": {"score": lambda s: _above(torch.nn.functional.softplus(s) - 1, 15), "causal": True},
    "with a sink": {"score": lambda s: _above(s, 3), "sink": lambda h: h - 4.0},
    "far apart": {"score": lambda s, i, j: _above(s * torch.exp2((i - 2 * j) // 8 * 1.0), 4), "causal": True},
}  # fmt: skip


@pytest.mark.parametrize("name", POWERS)
def test_scores_that_are_multiples_of_a_logarithm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn(2, 2, 290, 16), drawn(2, 2, 290, 16), drawn(2, 2, 290, 8)
    given = POWERS[name] | {"outputs": ("o", "lse")}
    groups, text = said(monkeypatch, attend_front, "attend_op", lambda: attend(q, k, v, **given))
    must_build(monkeypatch, attending)
    assert "POWER = 0;" not in attending.source(text, "")
    near = 3e-6 if "sink" in given else 2e-6  # a sink is its root to the n-th power: n times the root's rounding
    same(attending.run(groups, text), attend_meaning(wide(groups), text), near)


FAR = drawn(2, 300)  # of distances, which move by one from a key to the next or, beyond a table, by none
LINES: dict[str, dict[str, Any]] = {
    "upwards": {"score": lambda s, h, i, j: s + table(FAR)[h, j - i + 150]},
    "downwards, clipped": {"score": lambda s, h, i, j: s + table(FAR[:, :40])[h, i - j]},
    "there and back, clipped": {"score": lambda s, h, i, j: s + table(FAR[:, :9])[h, abs(i - j)], "align": "end"},
    "in steps": {"score": lambda s, h, i, j: s * table(FAR)[h, j // 3 + 4] + table(FAR)[h, 2 * (i - j)]},
    "heads last": {"after": lambda w, h, i, j: w * table(FAR.mT)[i - j + 140, h], "causal": True},
    "of a key": {"keep": lambda b, i, j: table(torch.arange(2 * 290).view(2, -1) // 17)[b, j] <= i // 9},
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_what_is_looked_up_along_the_keys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn(2, 2, 290, 16), drawn(2, 2, 290, 16), drawn(2, 2, 290, 8)
    groups, text = said(monkeypatch, attend_front, "attend_op", lambda: attend(q, k, v, **LINES[name]))
    must_build(monkeypatch, attending)
    same(attending.run(groups, text), attend_meaning(wide(groups), text), 2e-6)


SHARED, OWN = drawn(1, 33, D) / 5, drawn(H, 150, D) / 5  # rows that distances ask about, of all heads and of each
IN_TURN: dict[str, dict[str, Any]] = {
    "clipped distances": {"relative": [Relative(SHARED, lambda i, j: i - j)], "causal": True},
    "distances of both sides": {"relative": [Relative(OWN, lambda i, j: abs(j - i) + 3)], "outputs": ("lse", "o")},
    "two terms": {"relative": [Relative(OWN, lambda i, j: 140 - i + j), Relative(SHARED, lambda h, i, j: (i - h) % 9)],
                  "score": lambda s, i, r0, r1: torch.tanh(s + r0) * 2 + r1 * (i % 3)},
}  # fmt: skip


@pytest.mark.parametrize("name", IN_TURN)
def test_relative_terms_of_some_rows_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked, "_MOST", 0)  # rows of R, beyond which torch makes the products
    monkeypatch.setattr(relative, "_AT_ONCE", 1)
    monkeypatch.setattr(relative, "_FEWEST", 40)
    q, k, v = drawn(B, H, N, D), drawn(B, M, 2, D).transpose(1, 2), drawn(B, 2, M, Dv)
    groups, text = said(monkeypatch, attend_front, "attend_op", lambda: attend(q, k, v, **IN_TURN[name]))
    assert relative.rows_at_once(groups, text) == 40
    same(attending.run(groups, text), attend_meaning(wide(groups), text), 2e-6)


LONG = drawn(H, 700, D) / 5
BLOCK_BY_BLOCK = IN_TURN | {
    "long rows of distances": {"relative": [Relative(LONG, lambda i, j: 600 - i + j)], "causal": True},
    "by the way to the keys ahead": {"relative": [Relative(LONG, lambda i, j: j - i)], "keep": lambda i, j: j >= i},
    "in a band": {"relative": [Relative(LONG, lambda i, j: 2 * (i - j))], "keep": lambda i, j: (j <= i) & (i - j < 70)},
    "without bounds": {"relative": [Relative(LONG, lambda h, i, j: (i * j + h) % 691)]},
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCK_BY_BLOCK)
def test_relative_terms_of_a_block_of_queries(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn(1, H, 410, D), drawn(1, 410, 2, D).transpose(1, 2), drawn(1, 2, 410, Dv)
    groups, text = said(monkeypatch, attend_front, "attend_op", lambda: attend(q, k, v, **BLOCK_BY_BLOCK[name]))
    must_build(monkeypatch, attending)
    assert asked.inside(groups, text, "")
    same(attending.run(groups, text), attend_meaning(wide(groups), text), 2e-6)


@pytest.mark.parametrize("name", sorted(set(MORE) - set(SAID)))
def test_what_a_weight_becomes_otherwise_is_left_to_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn(B, H, N, D), drawn(B, 2, M, D), drawn(B, 2, M, Dv)
    groups, text = said(monkeypatch, attend_front, "attend_op", lambda: attend(q, k, v, **MORE[name]))
    assert attending.why_not(text)


HALVES = ["emulated", *(["dots"] if "avx512_bf16" in cpu_flags() else [])]  # how this processor can multiply bfloat16
UNITS = ("causal", "window", "softcap", "relu squared", "rows without a key", "gathered rows", "two segments")


@pytest.mark.parametrize("halves", HALVES)
@pytest.mark.parametrize("name", UNITS)
def test_the_layout_of_matrix_units(name: str, halves: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units are loops here; products of bfloat16 numbers are exact in float32, weights are rounded."""
    q, k, v = (t.bfloat16() for t in (drawn(B, H, N, D), drawn(B, M, 2, D).transpose(1, 2), drawn(B, 2, M, Dv)))
    groups, text = said(monkeypatch, attend_front, "attend_op", lambda: attend(q, k, v, **ATTENDS[name]))
    kv = [t.bfloat16() for t in groups[1]]
    must_build(monkeypatch, attending)
    found = attending.run([[q], kv, groups[2]], text, halves=halves)
    same(found, attend_meaning(wide([[q], kv, groups[2]]), text), 8e-3)


@pytest.mark.parametrize(
    "sizes", [(1, 1, 8, 8), (1, 300, 64, 64), (49, 7, 7, 5), (129, 128, 33, 16), (0, 5, 8, 8), (800, 800, 511, 500)]
)  # keys that are far: blocks of queries in turn
def test_attend_sizes(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    n, m, d, dv = sizes
    q, k, v = drawn(1, 6, n, d), drawn(1, 3, m, d), drawn(1, 3, dv, m).mT
    groups, text = said(monkeypatch, attend_front, "attend_op", lambda: attend(q, k, v, causal=True, align="end"))
    found = attending.run(groups, text)
    assert found[0].shape == (1, 6, n, dv)
    if n:
        same(found, attend_meaning(wide(groups), text), 2e-6)


def test_scores_of_every_distance_from_the_highest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights down to nothing; a query that is no number has no output, and no other row knows of it."""
    q, k, v = torch.ones(1, 1, 3, 1), torch.linspace(-300, 0, 4001)[None, None, :, None], drawn(1, 1, 4001, 5)
    q[0, 0, 1], k[0, 0, 7] = math.nan, -math.inf
    groups, text = said(monkeypatch, attend_front, "attend_op", lambda: attend(q, k, v, scale=math.log(2)))
    (found,), (expected,) = attending.run(groups, text), attend_meaning(wide(groups), text)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6, equal_nan=True)
    assert found[0, 0, 1].isnan().all() and found[0, 0, 2].isfinite().all()


def test_one_weight_of_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each query has a key at 0 and one further down, whose value alone is not 0: its weight comes out."""
    q, k = torch.linspace(-300, 0, 30001)[None, None, :, None], torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)
    groups, text = said(monkeypatch, attend_front, "attend_op", lambda: attend(q, k, k, scale=math.log(2)))
    (found,) = attending.run(groups, text)
    weight = torch.exp2(q.double())
    # of 2 ** -100 the score is rounded where it is made one of powers of 2
    torch.testing.assert_close(found.double(), weight / (1 + weight), rtol=2e-5, atol=1.2e-38)


@pytest.mark.parametrize("lie", ["rows", "heads inside", "an odd step", "columns"])
@pytest.mark.parametrize("halves", ["", *HALVES])
def test_however_keys_lie_in_memory(lie: str, halves: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole vectors of keys are turned in registers, what is left one by one: 72 and 41 are no multiples of any."""
    k = {"rows": drawn(1, 2, 41, 72), "heads inside": drawn(1, 41, 2, 72).transpose(1, 2),
         "an odd step": drawn(1, 2, 41, 75)[..., :72], "columns": drawn(1, 2, 72, 41).mT}[lie]  # fmt: skip
    q, k, v = (t.bfloat16() if halves else t for t in (drawn(1, 2, 19, 72), k, drawn(1, 2, 41, 16)))
    groups, text = said(monkeypatch, attend_front, "attend_op", lambda: attend(q, k, v))
    groups = [[q], [k, v], groups[2]]
    must_build(monkeypatch, attending)
    same(attending.run(groups, text, halves=halves), attend_meaning(wide(groups), text), 8e-3 if halves else 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (drawn(1, 2, 65, 32).to(dtype) for _ in range(3))
    groups, text = said(monkeypatch, attend_front, "attend_op", lambda: attend(q, k, v, causal=True))
    (o,) = attending.run(groups, text)
    assert o.dtype == dtype
    same([o], attend_meaning(wide(groups), text), 8e-3)  # one rounding to bfloat16


LEARNED = (
    "full", "causal", "causal at the end", "window", "both sides", "softcap", "alibi", "documents", "mod and div",
    "functions", "sigmoid", "relu squared", "sink", "rows without a key", "tiles", "tiles of no whole vector",
    "slopes", "relative bias", "a table of heads", "changed afterwards", "scaled afterwards", "clipped distances",
    "distances of keys", "a learned factor", "a factor of distances", "a product of tables",
)  # fmt: skip
TAUGHT = {  # what tables learn in scores and factors, there or not where a key is hidden
    "a learned factor": {"after": lambda w, h, i: w * (table(ROWS)[h, i] + table(SLOPE)[h]), "causal": True},
    "a factor of distances": {"after": lambda w, h, i, j: w * table(BIAS)[h, i - j + M], "causal": True},
    "clipped distances": {"relative": [Relative(drawn(H, 21, D) / 5, lambda i, j: i - j)], "causal": True},
    "a product of tables": {
        "score": lambda s, h, i, j: s * table(SLOPE)[h] + table(BIAS)[h, j] * table(ROWS)[h, j % 50] * (i - j) * 0.01,
        "causal": True,
    },
}


@pytest.mark.parametrize("name", LEARNED)
def test_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn(B, H, N, D), drawn(B, M, 2, D).transpose(1, 2), drawn(B, 2, M, Dv)
    how = (ATTENDS | AFTERWARDS | RELATIVES | TAUGHT)[name]
    groups, text = said(monkeypatch, attend_front, "attend_op", lambda: attend(q, k, v, **how))
    kept = [torch.where(t.isfinite(), drawn(*t.shape), 0.0) for t in attend_meaning(wide(groups), text)]
    floats = [n for n, t in enumerate(t for group in groups for t in group) if t.is_floating_point()]
    must_build(monkeypatch, backwards)
    found = backwards.gradients(groups, text, attending.run(groups, text), dict(enumerate(kept)), floats)
    assert found is not None
    every = wide(groups)
    leaves = [t.requires_grad_() for group in every for t in group if t.is_floating_point()]
    outputs = attend_meaning(every, text)
    total = sum((torch.where(t.isfinite(), t, 0.0) * g.double()).sum() for t, g in zip(outputs, kept, strict=True))
    expected = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)  # type: ignore[arg-type]
    same(list(found), list(expected), 5e-6)  # type: ignore[arg-type]


def test_gradients_of_few_heads_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn(1, 2, 300, 20), drawn(1, 1, 300, 20), drawn(1, 1, 300, 12)
    groups, text = said(monkeypatch, attend_front, "attend_op", lambda: attend(q, k, v, causal=True))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    found = backwards.gradients(groups, text, [], {0: torch.ones(1, 2, 300, 12)}, (1, 2))
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    outputs = attend_meaning([[leaves[0]], leaves[1:], []], text)
    same(list(found or ()), list(torch.autograd.grad(outputs[0].sum(), leaves[1:])), 5e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [21, 301])
def test_a_scan_of_no_whole_vector(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands behind a row in memory does not matter, whatever was there before."""
    q, k, v, held = drawn(B, H, N, width), drawn(B, H, N, width), drawn(B, H, N, 9), torch.full((1 << 20,), torch.nan)
    del held
    how: dict[str, Any] = {"feature": torch.exp, "normaliser": "sum"}
    groups, text = said(monkeypatch, scan_front, "scan_op", lambda: scan(q, k, v, **how))
    assert scanning.refuses(groups, text) is None
    same(scanning.run(groups, text), scan_meaning(wide(groups), text), 1e-5)


@pytest.mark.parametrize("name", SCANS)
def test_scan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn(B, H, N, D), drawn(B, N, 2, D).transpose(1, 2), drawn(B, 2, N, Dv)
    groups, text = said(monkeypatch, scan_front, "scan_op", lambda: scan(q, k, v, **SCANS[name]))
    assert scanning.refuses(groups, text) is None
    same(scanning.run(groups, text), scan_meaning(wide(groups), text), 1e-5)


def test_large_calls_take_it_and_can_be_trained_through() -> None:
    q, k, v = (drawn(1, 2, 400, 32).requires_grad_() for _ in range(3))
    from reattend.compiler.primitives.operator import watched

    with watched() as ran:
        o = attend(q, k, v, causal=True, keep=lambda i, j: i - j < 50)
    assert [call.kernel for call in ran] == ["generated C++"]
    found = torch.autograd.grad(o.sum(), (q, k, v))
    plain = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = torch.autograd.grad(attend(*plain, causal=True, keep=lambda i, j: i - j < 50).sum(), plain)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=0)


def test_what_cannot_be_said_is_refused_with_the_reason() -> None:
    assert attending.why_not('{"score": "s", "empty": "0.0"}') == "a score for empty rows"
    assert attending.why_not('{"outputs": ["weights"], "score": "s"}') == "outputs weights"


def test_many_threads_call_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn(1, 2, 64, 16), drawn(1, 2, 64, 16), drawn(1, 2, 64, 16)
    groups, text = said(monkeypatch, attend_front, "attend_op", lambda: attend(q, k, v, causal=True))
    expected, wrong = attending.run(groups, text)[0], []

    def call() -> None:
        wrong.extend(1 for _ in range(20) if not torch.equal(attending.run(groups, text)[0], expected))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


ANSWER = 'extern "C" int answer() { return 42; }'


def test_a_torn_library_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REATTEND_CACHE", str(tmp_path))
    found = tools.toolchain()
    assert found is not None and found.build(ANSWER).answer() == 42
    (built,) = (tmp_path / "cpu").glob("*.so")
    for damage in (b"", built.read_bytes()[:5000], b"x" * 5000):
        built.unlink()  # its pages are in use here
        built.write_bytes(damage)
        assert found.build(ANSWER).answer() == 42
    assert [p.name for p in (tmp_path / "cpu").iterdir()] == [built.name]  # nothing is left lying about


def test_processes_build_at_once(tmp_path: Path) -> None:
    work = "from reattend.codegen.cpu.toolchain import toolchain", f"print(toolchain().build({ANSWER!r}).answer())"
    assert at_once(4, *work, cache=tmp_path) == ["42"] * 4


def test_a_text_that_does_not_build_is_kept_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REATTEND_CACHE", str(tmp_path))
    found = tools.toolchain()
    assert found is not None
    with pytest.raises(Refused, match=r"failed: .*error.*please report"):
        found.build("int broken(")
    assert [p.suffix for p in (tmp_path / "cpu").iterdir()] == [".cpp"]


def test_without_a_compiler_torch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attending, "toolchain", lambda: None)
    q = drawn(1, 2, 400, 32)
    from reattend.compiler.primitives.operator import watched

    with watched() as ran:
        attend(q, q, q, causal=True, keep=lambda i, j: i - j < 50)
    assert ran[0].kernel == "sdpa in blocks of rows" and ("generated C++", "no C++ compiler") in ran[0].refused


SPREADS: dict[str, dict[str, Any]] = {
    "softmax": {"causal": True},
    "softcap": {"causal": True, "score": lambda s: torch.tanh(s / 3) * 3},
    "relu": {"causal": True, "weight": torch.relu, "normaliser": "none"},
    "minimum": {"causal": True, "score": lambda s, i: minimum(s, i * 1.0)},
}


@pytest.mark.parametrize("name", SPREADS)
@pytest.mark.parametrize("port", range(3))
def test_what_is_no_number_is_not_hidden(name: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ports = [drawn(1, 2, 100, 16) for _ in range(3)]
    ports[port][0, 1, 37, 5] = math.nan
    groups, text = said(monkeypatch, attend_front, "attend_op", lambda: attend(*ports, **SPREADS[name]))
    (found,), (expected,) = attending.run(groups, text), attend_meaning(wide(groups), text)
    assert torch.equal(found.isnan(), expected.isnan()) and bool(expected.isnan().any())


def test_sizes_in_a_score_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    q = drawn(1, 2, 8, 16)
    how: dict[str, Any] = {"score": lambda s, M: s * torch.log(M + 1.0)}
    groups, text = said(monkeypatch, attend_front, "attend_op", lambda: attend(q, q, q, **how))
    assert "`M` in a kernel" in str(attending.refuses(groups, text))


def test_a_home_that_cannot_be_written_to_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REATTEND_CACHE", str(tmp_path / "file"))
    function, reason = tools.built(lambda: ANSWER)
    assert function is None and "Not a directory" in str(reason)
