"""Masks written by hand: each spelling becomes the predicate it means, and what has none stays a tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export

from reattend.compiler.masks import MaskVerdict, fold_masks, simplify_indices
from reattend.compiler.primitives.attend import run
from reattend.compiler.primitives.attend_spec import AttendSpec
from reattend.compiler.symbol_text import parse

N = 12
BOOLEAN = AttendSpec(score="s * 0.5", keep="t0[b, h, i, j]")
ADDITIVE = AttendSpec(score="s * 0.5 + t0[b, h, i, j]")
IDS = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3, [0] * 2 + [1] * 10])
PADDING = torch.tensor([[1] * 12, [0] * 4 + [1] * 8])
LOWEST = torch.finfo(torch.float32).min


class Masked(nn.Module):
    """Attention with a mask computed from q and the data."""

    def __init__(self, mask: Callable[..., Tensor], spec: AttendSpec, keys: int) -> None:
        super().__init__()
        self.mask, self.spec, self.keys = mask, spec, keys

    def forward(self, q: Tensor, k: Tensor, data: tuple[Tensor, ...]) -> Tensor:
        found = self.mask(q, *data) if self.keys == 0 else self.mask(q, k, *data)
        found = found[(None,) * (4 - found.ndim)]
        index = ", ".join("0" if size == 1 else x for x, size in zip("bhij", found.shape, strict=True))
        spec = replace(self.spec, **{f: getattr(self.spec, f).replace("b, h, i, j", index) for f in ("score", "keep")})
        k = k if self.keys else q
        return run(q, [k, k], [found], spec)  # type: ignore[no-any-return]


def folded(
    mask: Callable[..., Tensor], *data: Tensor, spec: AttendSpec = BOOLEAN, keys: int = 0, dynamic: bool = True
) -> tuple[MaskVerdict, AttendSpec, list[str], fx.GraphModule]:
    """The verdict, the spec, the names of the tables, after numbers were compared with the module's own."""
    torch.manual_seed(0)
    q = torch.randn(2, 4, N, 8)
    k = torch.randn(2, 4, keys, 8) if keys else torch.zeros(2, 1)
    module = Masked(mask, spec, keys)
    auto = {0: Dim.AUTO, 2: Dim.AUTO}
    opened = tuple(dict.fromkeys(range(d.ndim), Dim.AUTO) for d in data)
    shapes = (auto, auto if keys else {0: Dim.AUTO}, opened) if dynamic else None
    with torch.no_grad():
        exported = export(module, (q, k, data), strict=False, dynamic_shapes=shapes).module()
    assert isinstance(exported, fx.GraphModule)
    for node in list(exported.graph.nodes):
        if "_assert_tensor_metadata" in str(node.target):
            exported.graph.erase_node(node)
    (verdict,) = fold_masks(exported)
    exported.graph.lint()
    torch.testing.assert_close(exported(q, k, data), module(q, k, data), rtol=1e-5, atol=1e-5)
    (site,) = [n for n in exported.graph.nodes if n.target is torch.ops.reattend.attend.default]
    return verdict, AttendSpec.of(site.args[3]), [t.name for t in site.args[2]], exported


def square(q: Tensor) -> tuple[Tensor, Tensor]:
    count = torch.arange(q.shape[2])
    return count[:, None], count[None, :]


def causal(q: Tensor) -> Tensor:
    i, j = square(q)
    return j <= i


def additive(keep: Tensor, lowest: float = LOWEST) -> Tensor:
    return torch.zeros(keep.shape).masked_fill(~keep, lowest)


def chunked(q: Tensor, size: int) -> Tensor:
    i, j = square(q)
    return (i // size == j // size) & (j <= i)


def padded(keep: Tensor, padding: Tensor) -> Tensor:
    return keep[None, None] & padding[:, None, None, :].bool()


def documents(ids: Tensor) -> Tensor:
    return ids[:, None, :, None] == ids[:, None, None, :]


def window(q: Tensor, before: int, after: int) -> Tensor:
    i, j = square(q)
    return (i - j < before) & (j - i < after)


PLAIN = {
    "tril": (lambda q: torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(), "j <= i"),
    "tril of floats": (lambda q: torch.tril(torch.ones(q.shape[2], q.shape[2])) == 1, "j <= i"),
    "not triu": (lambda q: ~torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1), "j <= i"),
    "triu == 0": (lambda q: torch.triu(torch.ones(q.shape[2], q.shape[2]), diagonal=1) == 0, "j <= i"),
    "arange": (causal, "j <= i"),
    "arange, expanded": (lambda q: causal(q)[None, None].expand(q.shape[0], 1, -1, -1), "j <= i"),
    "repeated over heads": (lambda q: causal(q)[None, None].repeat(q.shape[0], 4, 1, 1), "j <= i"),
    "cumsum of ones": (lambda q: torch.ones(1, q.shape[2]).long().cumsum(1)[:, :, None] > torch.arange(q.shape[2]),
                       "j <= i"),
    "everything": (lambda q: torch.ones(q.shape[2], q.shape[2], dtype=torch.bool), ""),
    "everything, by comparing": (lambda q: (square(q)[0] >= 0) & (square(q)[1] < q.shape[2]), ""),
    "window": (lambda q: (square(q)[1] <= square(q)[0]) & (square(q)[0] - square(q)[1] < 4),
               "(i <= j + 3) & (j <= i)"),
    "window by tril and triu": (lambda q: torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril().triu(-3),
                                "(i <= j + 3) & (j <= i)"),
    "both ways": (lambda q: (square(q)[0] - square(q)[1]).abs() <= 3, "(i <= j + 3) & (j <= i + 3)"),
    "window and sinks": (lambda q: causal(q) & ((square(q)[0] - square(q)[1] < 4) | (square(q)[1] < 2)),
                         "((i <= j + 3) | (j <= 1)) & (j <= i)"),
    "chunks": (lambda q: chunked(q, 5), "(i // 5 == j // 5) & (j <= i)"),
    "prefix": (lambda q: causal(q) | (square(q)[1] < 3), "(j <= 2) | (j <= i)"),
    "where": (lambda q: torch.where(causal(q), True, False), "j <= i"),
    "logical": (lambda q: torch.logical_not(torch.logical_or(square(q)[1] > square(q)[0], ~causal(q))), "j <= i"),
    "product of floats": (lambda q: (causal(q).float() * 1.0).bool(), "j <= i"),
    "flipped twice": (lambda q: causal(q).flip(0).flip(1).t(), "j <= i"),
    "meshgrid": (lambda q: torch.le(*reversed(torch.meshgrid(torch.arange(q.shape[2]), torch.arange(q.shape[2]),
                                                             indexing="ij"))), "j <= i"),
    "blocks, reshaped": (lambda q: causal(q).reshape(q.shape[2], 1, q.shape[2]).flatten(0, 1), "j <= i"),
    "dilated": (lambda q: ((square(q)[0] - square(q)[1]) % 2 == 0) & causal(q), "((i - j) % 2 == 0) & (j <= i)"),
    "from the end of a larger one": (lambda q: torch.ones(q.shape[2] + 3, q.shape[2] + 3).bool().tril()[3:, 3:],
                                     "j <= i"),
    "first column joined": (lambda q: torch.cat([torch.ones(q.shape[2], 1, dtype=torch.bool), causal(q)[:, 1:]], 1),
                            "(j <= 0) | (j <= i)"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_plain_masks(name: str) -> None:
    mask, keep = PLAIN[name]
    verdict, spec, tables, _ = folded(mask)
    assert (spec.keep, tables) == (keep, []), verdict
    assert verdict.keep == keep and verdict.proof == "symbolic" and len(verdict.sizes) == 3


@pytest.mark.parametrize(
    ("name", "lowest"),
    [("tril", LOWEST), ("window", -1e9), ("chunks", float("-inf")), ("everything", LOWEST), ("prefix", LOWEST)],
)
def test_additive_masks(name: str, lowest: float) -> None:
    mask, keep = PLAIN[name]
    verdict, spec, tables, _ = folded(lambda q: additive(mask(q), lowest), spec=ADDITIVE)
    assert (spec.keep, spec.score, tables) == (keep, "s * 0.5", []), verdict


DATA: dict[str, tuple[Callable[..., Tensor], Tensor, str]] = {
    "padding": (lambda q, p: padded(torch.ones_like(causal(q)), p), PADDING, "0 != t0[b, j]"),
    "causal and padding": (lambda q, p: padded(causal(q), p), PADDING, "(0 != t0[b, j]) & (j <= i)"),
    "documents": (lambda q, d: documents(d), IDS, "t0[b, i] == t0[b, j]"),
    "causal documents": (lambda q, d: documents(d) & causal(q), IDS, "(j <= i) & (t0[b, i] == t0[b, j])"),
    "prefix lengths": (lambda q, n: causal(q) | (square(q)[1] < n[:, None, None, None]), torch.tensor([3, 5]),
                       "(j < t0[b]) | (j <= i)"),
    "key lengths": (lambda q, n: square(q)[1] < n[:, None, None, None], torch.tensor([7, 12]), "j < t0[b]"),
    "ids compared with a token": (lambda q, d: (d != 2)[:, None, None, :] & causal(q), IDS,
                                  "(2 != t0[b, j]) & (j <= i)"),
    "indexed": (lambda q, p: causal(q) & p.bool()[torch.arange(p.shape[0])[:, None, None, None],
                                                  torch.arange(p.shape[1])[None, None, None, :]],
                PADDING, "(0 != t0[b, j]) & (j <= i)"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_masks_of_data(name: str) -> None:
    mask, data, keep = DATA[name]
    verdict, spec, tables, _ = folded(mask, data)
    assert (spec.keep, len(tables)) == (keep, 1), verdict
    assert all(v.proof == "symbolic" for v in (verdict,))


def test_queries_at_the_end_of_the_keys() -> None:
    def mask(q: Tensor, k: Tensor) -> Tensor:
        past = k.shape[2] - q.shape[2]
        return torch.arange(k.shape[2])[None, :] <= (torch.arange(q.shape[2]) + past)[:, None]

    for dynamic in (True, False):
        verdict, spec, tables, _ = folded(mask, keys=17, dynamic=dynamic)
        assert (spec.keep, spec.align, tables) == ("j <= i", "end", []), verdict


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_lowest_number_of_a_short_dtype(dtype: torch.dtype) -> None:
    def mask(q: Tensor) -> Tensor:
        return torch.full((q.shape[2], q.shape[2]), torch.finfo(dtype).min, dtype=dtype).triu(1)

    verdict, spec, tables, _ = folded(mask, spec=ADDITIVE)
    assert (spec.keep, spec.score, tables) == ("j <= i", "s * 0.5", []), verdict


def test_a_window_per_head_looks_up_its_width() -> None:
    def mask(q: Tensor) -> Tensor:
        i, j = square(q)
        return (i - j < torch.tensor([2, 4, 8, 16])[:, None, None]) & (j <= i)

    verdict, spec, tables, _ = folded(mask)
    assert spec.keep == "(i - j < t0[h]) & (j <= i)" and len(tables) == 1, verdict


@pytest.mark.parametrize("blocks", [lambda: torch.kron(torch.eye(3), torch.ones(4, 4)).bool(),
                                    lambda: torch.block_diag(*[torch.ones(4, 4)] * 3).bool(),
                                    lambda: (torch.arange(12)[:, None] // 4 == torch.arange(12) // 4).view(3, 4, 12)
                                    .view(12, 12)])  # fmt: skip
def test_blocks_however_they_are_made(blocks: Callable[[], Tensor]) -> None:
    verdict, spec, tables, _ = folded(lambda q: blocks(), dynamic=False)
    assert (spec.keep, tables) == ("i // 4 == j // 4", []), verdict


def test_a_buffer_of_a_triangle() -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bias", torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32))

        def forward(self, q: Tensor) -> Tensor:
            n = q.shape[2]
            return self.bias[:, :, :n, :n] == 1  # type: ignore[index]

    verdict, spec, tables, _ = folded(Buffered())
    assert (spec.keep, tables) == ("j <= i", []), verdict


class Biased(nn.Module):
    def __init__(self, initial: Tensor, learned: bool) -> None:
        super().__init__()
        self.value = nn.Parameter(initial) if learned else nn.Buffer(initial)

    def forward(self, q: Tensor) -> Tensor:
        return self.value.where(causal(q), LOWEST)


def test_a_parameter_is_a_bias_whatever_its_values() -> None:
    verdict, spec, tables, _ = folded(Biased(torch.zeros(N, N), True), spec=ADDITIVE, dynamic=False)
    assert spec.keep == "j <= i" and spec.score == "s * 0.5 + t0[i, j]" and tables == ["mask_value"], verdict
    assert verdict.leftovers == ("t0[i, j]",)


def test_a_buffer_of_arbitrary_values_is_a_bias() -> None:
    verdict, spec, tables, _ = folded(Biased(torch.randn(N, N), False), spec=ADDITIVE, dynamic=False)
    assert spec.keep == "j <= i" and spec.score == "s * 0.5 + t0[i, j]", verdict


def test_alibi_keeps_one_slope_per_head() -> None:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])

    def mask(q: Tensor, slope: Tensor) -> Tensor:
        i, j = square(q)
        return (slope[:, None, None] * (j - i) + additive(j <= i))[None]

    verdict, spec, tables, _ = folded(mask, slopes, spec=ADDITIVE, dynamic=False)
    assert spec.keep == "j <= i" and len(tables) == 1 and "t0[h]" in spec.score, verdict


LEFT_ALONE: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], AttendSpec]] = {
    "a given mask": (lambda q, m: m, (torch.rand(N, N) > 0.4,), BOOLEAN),
    "a given bias": (lambda q, m: m, (torch.randn(N, N),), ADDITIVE),
    "a mask of the queries": (lambda q: q[..., :1] > q[..., :1].transpose(-1, -2), (), BOOLEAN),
    "swin's hundred": (lambda q: (q.sum() > 0) * torch.full((N, N), -100.0).triu(1), (), ADDITIVE),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_has_no_formula_stays(name: str) -> None:
    mask, data, spec = LEFT_ALONE[name]
    verdict, _, tables, _ = folded(mask, *data, spec=spec, dynamic=False)
    assert len(tables) >= 1, verdict


def test_causal_and_a_given_mask_are_told_apart() -> None:
    verdict, spec, tables, _ = folded(lambda q, m: causal(q) & m, torch.rand(N, N) > 0.2, dynamic=False)
    assert spec.keep == "(0 != t0[i, j]) & (j <= i)" and len(tables) == 1, verdict
    assert verdict.leftovers == ("t0[i, j]",)


def test_a_mask_written_in_place_is_recognised_by_its_values() -> None:
    def mask(q: Tensor) -> Tensor:
        found = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        found[:, :3] = True
        return found

    verdict, spec, tables, graph_module = folded(mask)
    assert (spec.keep, tables, verdict.proof) == ("(j <= 2) | (j <= i)", [], "evaluated"), verdict
    assert not [n for n in graph_module.graph.nodes if n.name.startswith(("fill_", "ones", "tril"))]


def test_a_write_that_others_see_stays() -> None:
    class Shared(nn.Module):
        def forward(self, q: Tensor) -> tuple[Tensor, Tensor]:
            table = torch.zeros(q.shape[2], q.shape[2])
            table[:, :2].fill_(1.0)
            keep = (table > 0) | causal(q)
            return run(q, [q, q], [keep[None, None]], AttendSpec(score="s", keep="t0[0, 0, i, j]")), table

    q = torch.randn(2, 4, N, 8)
    graph_module: Any = export(Shared(), (q,), strict=False).module()
    fold_masks(graph_module)
    for found, wanted in zip(graph_module(q), Shared()(q), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_mask_written_in_place_is_never_misread() -> None:
    def mask(q: Tensor) -> Tensor:
        found = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        found[:, 0] = False
        found[0, 0] = True
        return found

    verdict, _, tables, _ = folded(mask)
    assert verdict.proof == "kept as tensor" and "in place" in verdict.reason and len(tables) == 1, verdict


def test_a_query_offset_that_the_spec_has_already() -> None:
    spec = AttendSpec(score="s * 0.5", keep="(j <= i) & t0[0, 0, i - M + N, j]", align="end")
    verdict, found, tables, _ = folded(
        lambda q, k: torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2] - 2),
        spec=spec,
        keys=17,
    )
    assert (found.keep, found.align, tables) == ("j <= i - 2", "end", []), verdict


def test_a_mask_of_numbers_compared_in_the_score() -> None:
    spec = AttendSpec(score="where(t0[b, h, i, j] == 0, -1e9, s * 0.5)")
    verdict, found, tables, _ = folded(lambda q: torch.tril(torch.ones(q.shape[2], q.shape[2])), spec=spec)
    assert (found.keep, found.score, tables) == ("j <= i", "s * 0.5", []), verdict


def test_what_cannot_be_read_is_recognised_by_its_values() -> None:
    def mask(q: Tensor, padding: Tensor) -> Tensor:
        i, j = square(q)
        distance = torch.sort(i - j, descending=False).values.flip(1)
        return ((distance >= 0) & (distance < 4))[None, None] & padding[:, None, None, :].bool()

    verdict, spec, tables, _ = folded(mask, PADDING)
    assert spec.keep == "(0 != t0[b, j]) & (i <= j + 3) & (j <= i)" and len(tables) == 1, verdict
    assert verdict.proof == "evaluated"


@pytest.mark.parametrize(
    ("dropped", "keep"),
    [
        (lambda i, j: (j - i).sign() > 0, "j <= i"),
        (lambda i, j: (i - j).sign() > 0, "i <= j"),
        (lambda i, j: torch.ones(i.shape[0], i.shape[0]).triu(1).to(torch.uint8) == 1, "j <= i"),
    ],
)
def test_what_leaves_out_all_later_keys_has_no_second_bound(
    dropped: Callable[[Tensor, Tensor], Tensor], keep: str
) -> None:
    """At nine tokens `i < j` is `i < j <= i + 8` as well."""
    verdict, spec, tables, _ = folded(lambda q: dropped(*square(q)), spec=replace(BOOLEAN, keep=f"~({BOOLEAN.keep})"))
    assert (spec.keep, tables) == (keep, []), verdict


def test_only_the_tensors_that_nothing_else_needs_are_removed() -> None:
    _, _, _, graph_module = folded(causal)
    assert not [n for n in graph_module.graph.nodes if "arange" in n.name or "le" in n.name.split("_")]


@pytest.mark.parametrize(
    ("text", "simple"),
    [
        ("(j >= 0) & (j <= i)", "j <= i"),
        ("(i < N) & (j < M)", "True"),
        ("(j <= i) & (j <= i + 3)", "j <= i"),
        ("(j <= i) | (j <= i + 3)", "j <= i + 3"),
        ("(j <= i) & (i <= j + 3)", "(i <= j + 3) & (j <= i)"),
        ("i < M", "i <= M - 1"),
        ("j < 0", "False"),
        ("t0[b, j] >= 0", "0 <= t0[b, j]"),
        ("t0[b, i] - t0[b, j] == 0", "t0[b, i] == t0[b, j]"),
        ("t0[b, j] - t0[b, i] != 0", "t0[b, i] != t0[b, j]"),
        ("t0[b, i] - t0[b, j] == 1", "1 == t0[b, i] - t0[b, j]"),
        ("(i <= j + 2) | (j <= i)", "True"),
        ("(i <= j + 2) | (j + 4 <= i)", "(i <= j + 2) | (j <= i - 4)"),
        ("(i <= j - 1) & (j <= i - 3)", "False"),
        ("(t0[b, j] == 2) & (j != 0) | (t0[b, j] != 2) | (j == 0)", "True"),
    ],
)
def test_conditions_that_indices_decide(text: str, simple: str) -> None:
    assert simplify_indices(parse(text)).text == simple


def test_one_finding_serves_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from reattend.compiler.masks import fold

    class Layers(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            for _ in range(6):
                keep = causal(q)[None, None]
                q = run(q, [q, q], [keep], AttendSpec(score="s", keep="t0[0, 0, i, j]"))
            return q

    graph_module: Any = export(Layers(), (torch.randn(2, 4, N, 8),), strict=False).module()
    calls: list[str] = []
    original = fold.disagreement
    monkeypatch.setattr(fold, "disagreement", lambda *a, **k: calls.append("x") or original(*a, **k))
    verdicts = fold_masks(graph_module)
    assert [v.keep for v in verdicts] == ["j <= i"] * 6 and len(calls) == 1
    assert len({v.site_node for v in verdicts}) == 6
