"""flex_attention: what its score and mask functions say becomes the site's score and predicate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from reattend.compiler.capture import capture
from reattend.compiler.primitives.attend_spec import AttendSpec
from reattend.compiler.raising import raise_sites

H, D = 4, 8
pytestmark = pytest.mark.filterwarnings("ignore:.*flex_attention.*")  # called without torch.compile it says so


class Flexible(nn.Module):
    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.run = run
        self.bias = nn.Parameter(torch.randn(H, 31))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x, x.flip(1), x.flip(2))


def capped_with_a_table(m: Flexible, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v, lambda s, b, h, i, j: torch.tanh(s / 5) * 5 + m.bias[h, i - j + 15])


def fewer_key_heads(_: Flexible, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    near = lambda s, b, h, i, j: torch.where((i - j < 3) & (j <= i), s, -torch.inf)
    return flex_attention(q, k[:, :2], v[:, :2], near, scale=0.25, enable_gqa=True)


def causal_blocks(_: Flexible, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, q.shape[2], q.shape[2], device="cpu")
    return flex_attention(q, k, v, block_mask=mask)


def documents(_: Flexible, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    starts = (q[:, 0, :, 0] > 0).cumsum(1)
    same = lambda b, h, i, j: (starts[b, i] == starts[b, j]) | (i // 2 == j // 2)
    mask = create_block_mask(same, q.shape[0], None, q.shape[2], q.shape[2], device="cpu")
    return flex_attention(q, k, v, block_mask=mask)


@dataclass(frozen=True)
class Form:
    run: Callable[..., Tensor]
    score: str = f"s * {1 / math.sqrt(D)!r}"
    keep: str = ""


FORMS = [
    Form(capped_with_a_table, f"t0[h, i - j + 15] + tanh(s * {1 / math.sqrt(D)!r} / 5) * 5"),
    Form(fewer_key_heads, "s * 0.25", "(i <= j + 2) & (j <= i)"),
    Form(causal_blocks, keep="j <= i"),
    Form(documents, keep="(i // 2 == j // 2) | (t0[b, i] == t0[b, j])"),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.run.__name__)
def test_flex_attention(form: Form) -> None:
    model = Flexible(form.run).eval()
    with torch.no_grad():
        captured = capture(model, (torch.randn(2, H, 7, D),))
        raised = raise_sites(captured.graph)
        for length in (7, 5, 12):
            x = torch.randn(3, H, length, D)
            assert (captured.graph(x)[0] - model(x)).abs().max() <= 1e-5
    (node,), misses = raised.nodes, raised.misses
    spec = AttendSpec.of(node.args[3])
    assert (spec.score, spec.keep, misses) == (form.score, form.keep, ())
    assert not any("vmap" in str(n.target) for n in captured.graph.graph.nodes), "the block mask is gone"


def test_a_normaliser_that_is_read_is_named() -> None:
    def run(_: Flexible, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = flex_attention(q, k, v, return_lse=True)
        return out * lse.unsqueeze(-1)

    with torch.no_grad():
        raised = raise_sites(capture(Flexible(run), (torch.randn(2, H, 7, D),)).graph)
    assert raised.nodes == () and "normaliser is read" in str(raised.misses[0])
