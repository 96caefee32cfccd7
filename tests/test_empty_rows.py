"""Rows that keep no key: a finite fill gives them equal weights in the model, and so they have after raising too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reattend.compiler.capture import capture
from reattend.compiler.masks import fold_masks
from reattend.compiler.primitives.attend_meaning import attend_meaning
from reattend.compiler.primitives.attend_spec import AttendSpec
from reattend.compiler.raising import raise_sites

LOWEST = torch.finfo(torch.float32).min
C, H = 16, 2


class Masked(nn.Module):
    """Self-attention of x under a mask on its scores, `ids` (B, N) being whatever the mask is made of."""

    def __init__(self, scores: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.scores, self.qkv, self.o = scores, nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, H, C // H).permute(2, 0, 3, 1, 4)
        weights = self.scores(q @ k.mT * 0.7, ids).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


def order(s: Tensor) -> tuple[Tensor, Tensor]:
    count = torch.arange(s.shape[-1])
    return count[:, None], count[None, :]


def outer(s: Tensor, p: Tensor) -> Tensor:
    """As deberta does: padding queries keep nothing."""
    return s.masked_fill(~(p.bool()[:, None, None, :] & p.bool()[:, None, :, None]), LOWEST)


def keys(s: Tensor, p: Tensor) -> Tensor:
    return s + (1.0 - p[:, None, None, :].float()) * LOWEST


def keys_lightly(s: Tensor, p: Tensor) -> Tensor:
    return s + (1.0 - p[:, None, None, :].float()) * -10000.0


def causal_keys(s: Tensor, p: Tensor) -> Tensor:
    i, j = order(s)
    return torch.where((j <= i) & p.bool()[:, None, None, :], s, LOWEST)


def causal_additive(s: Tensor, p: Tensor) -> Tensor:
    i, j = order(s)
    keep = (j <= i) & p.bool()[:, None, None, :]
    return s + torch.where(keep, 0.0, LOWEST)


def two_fills(s: Tensor, p: Tensor) -> Tensor:
    """The later fill wins where both hold; the higher one draws the weight of a row that keeps nothing."""
    i, j = order(s)
    return s.masked_fill(j > i, -1e30).masked_fill(~p.bool()[:, None, None, :], LOWEST)


def two_sums(s: Tensor, p: Tensor) -> Tensor:
    """Sums of both fills are lower than either."""
    i, j = order(s)
    return s + torch.where(j > i, -1e30, 0.0) + (1 - p[:, None, None, :].float()) * -1e30


def infinite_then_finite(s: Tensor, p: Tensor) -> Tensor:
    i, j = order(s)
    return s.masked_fill(~p.bool()[:, None, None, :], -1e9).masked_fill(j > i, float("-inf"))


def filled_before_scaling(s: Tensor, p: Tensor) -> Tensor:
    return outer(s, p) * 0.125 + 1.0


def strictly_before(s: Tensor, p: Tensor) -> Tensor:
    i, j = order(s)
    return s.masked_fill(j >= i, -1e9) + 0.0 * p[:, None, None, :]


def window_of_padding(s: Tensor, p: Tensor) -> Tensor:
    i, j = order(s)
    near = (i - j).abs() < 2
    return torch.where(near & p.bool()[:, None, None, :], s, torch.finfo(s.dtype).min)


def documents(s: Tensor, p: Tensor) -> Tensor:
    same = (p[:, None, :] == p[:, :, None]) & (p[:, None, :] > 0)
    return s + (~same[:, None]).float() * -1e9


FORMS = [outer, keys, causal_keys, two_fills, strictly_before, documents]
MORE = [keys_lightly, causal_additive, two_sums, infinite_then_finite, filled_before_scaling, window_of_padding]
PADDINGS = {
    "right": lambda b, n: (torch.arange(n) < max(1, n - 3)).long().expand(b, n),
    "left": lambda b, n: (torch.arange(n) >= n // 2).long().expand(b, n),
    "all of one row": lambda b, n: torch.stack([torch.ones(n).long()] * (b - 1) + [torch.zeros(n).long()]),
    "holes": lambda b, n: (torch.arange(b * n).view(b, n) % 3 != 1).long(),
}


@pytest.mark.parametrize(
    "scores", [*FORMS, *(pytest.param(f, marks=pytest.mark.slow) for f in MORE)], ids=lambda f: f.__name__
)
def test_the_folded_graph_gives_what_the_model_gives(scores: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Masked(scores).eval()
    with torch.no_grad():
        captured = capture(model, (torch.randn(2, 9, C), PADDINGS["right"](2, 9)))
        assert len(raise_sites(captured.graph).nodes) == 1
        raised = [captured.graph(*given)[0] for given in calls()]
        fold_masks(captured.graph)
        for given, before in zip(calls(), raised, strict=True):
            wanted = model(*given)
            assert (before - wanted).abs().max() <= 1e-5, tuple(given[0].shape)
            assert (captured.graph(*given)[0] - wanted).abs().max() <= 1e-5, tuple(given[0].shape)


def calls() -> list[tuple[Tensor, Tensor]]:
    sizes = [(2, 9), (2, 1), (1, 2), (3, 7), (2, 16)]
    torch.manual_seed(1)
    return [(torch.randn(b, n, C), made(b, n)) for b, n in sizes for made in PADDINGS.values() if b > 1 or n > 2]


def test_causal_alone_needs_no_fill() -> None:
    def causal(s: Tensor, p: Tensor) -> Tensor:
        i, j = order(s)
        return torch.where(j <= i, s, LOWEST) + 0.0 * p[:, None, None, :]

    captured = capture(Masked(lambda s, p: torch.where(order(s)[1] <= order(s)[0], s, LOWEST)).eval(), calls()[0])
    raise_sites(captured.graph)
    fold_masks(captured.graph)
    (node,) = [n for n in captured.graph.graph.nodes if n.target is torch.ops.reattend.attend.default]
    spec = AttendSpec.of(node.args[3])
    assert (spec.keep, spec.empty, list(node.args[2])) == ("j <= i", "", [])


@pytest.mark.parametrize("heads", [2, 1])
def test_kernels_agree_with_the_meaning(heads: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 300, 8), torch.randn(2, heads, 300, 8), torch.randn(2, heads, 300, 5)
    padding = torch.ones(2, 300)
    padding[0, :40] = 0
    padding[1] = 0
    for keep in ("(0 != t0[b, j]) & (j <= i)", "0 != t0[b, j]"):
        spec = AttendSpec(score="s * 0.5", keep=keep, empty=f"s * 0.5 + where({keep}, 0.0, -1000000000.0)")
        (wanted,) = attend_meaning([[q], [k, v], [padding]], spec.text)
        (found,) = torch.ops.reattend.attend(q, [k, v], [padding], spec.text)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert (wanted[1].std(-2) < 1e-6).all()  # every query of a sequence of padding averages


transformers_cases: dict[str, tuple[str, str, dict[str, Any]]] = {
    "deberta_v2": ("DebertaV2Model", "DebertaV2Config",
                   dict(relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8)),
    "bert": ("BertModel", "BertConfig", {}),
    "llama": ("LlamaModel", "LlamaConfig", {}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # the library's own
@pytest.mark.parametrize("name", transformers_cases)
def test_padded_rows_of_models_in_eager_spelling(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    model_class, config_class, more = transformers_cases[name]
    config = getattr(transformers, config_class)(vocab_size=100, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32, **more)  # fmt: skip
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    ids, padding = torch.arange(24).view(2, 12) % 97 + 3, torch.ones(2, 12).long()
    padding[0, :3] = 0
    padding[1, 8:] = 0
    captured = capture(model, (), {"input_ids": ids, "attention_mask": padding})
    raise_sites(captured.graph)
    verdicts = fold_masks(captured.graph)
    with torch.no_grad():
        for cut in (12, 5, 1):
            given = ids[:, -cut:], padding[:, :cut]
            wanted = model(input_ids=given[0], attention_mask=given[1])[0]
            found = captured.graph(*given)[0]
            assert (found - wanted).abs().max() <= 1e-5, verdicts


def test_the_report_compares_the_graph_with_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that lost the fill is told apart from the model, though every rewrite would match the graph."""
    from dataclasses import replace

    import reattend
    from reattend.compiler import pipeline

    x, p = calls()[1]
    model = Masked(outer).eval()
    report = reattend.optimize(model, "exact", (x, p), measure=False).report
    assert report.captured is not None and report.captured.max_abs <= 1e-5 and not report.warnings
    assert "against the model itself" in report.text()

    def forgetting(graph_module: Any) -> Any:
        found = fold_masks(graph_module)
        for node in graph_module.graph.nodes:
            if node.target is torch.ops.reattend.attend.default:
                node.args = (*node.args[:3], replace(AttendSpec.of(node.args[3]), empty="").text)
        graph_module.recompile()
        return found

    monkeypatch.setattr(pipeline, "fold_masks", forgetting)
    report = reattend.optimize(Masked(outer).eval(), "exact", (x, p), measure=False).report
    assert any("the captured graph is not the model" in warning for warning in report.warnings)
