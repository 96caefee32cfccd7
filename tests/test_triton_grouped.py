"""Rows of groups that a kernel reads where they lie mean what they mean copied out: values, gradients, whole models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import triton_interpreter  # noqa: F401 (kernels run in Python)
from kernel_calls import drawn, said, same, whole, wide
from torch import Tensor

import reattend
from reattend.codegen.triton import launch, launch_gradient
from reattend.codegen.triton.blocks import Blocks
from reattend.compiler.ports import ATTEND
from reattend.compiler.primitives import attend as attend_front
from reattend.compiler.primitives.attend import Relative, attend, attend_op
from reattend.compiler.primitives.attend_grouped import copied_out
from reattend.compiler.primitives.attend_spec import AttendSpec
from reattend.compiler.refusal import Refused
from reattend.compiler.symbols import table

B, G, S, M, N = 2, 3, 21, 40, 12  # samples, groups of each, rows of a group, rows of a sample, queries of a group
NEAR = torch.rand(B * G, S) < 0.7
HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "flags": {"keep": lambda b, j: table(NEAR)[b, j]},
    "band": {"keep": lambda i, j: (i - j < 5) & (j - i < 9)},
    "relative": {"relative": [Relative(drawn(2, 30, 16), lambda i, j: j - i + 12)]},
    "sigmoid": {"weight": torch.sigmoid, "normaliser": "none"},
    "one query": {},
}


def asked(monkeypatch: pytest.MonkeyPatch, how: str, rows: Tensor, of_keys: int = 2) -> tuple[Any, str]:
    q = drawn(B * G, 2, 1 if how == "one query" else N, 16)
    k, v = (drawn(B, of_keys, M, d) for d in (16, 20))
    copied = [[q], [t.repeat_interleave(G, 0)[:, :, :S] for t in (k, v)], []]
    (_, _, tables), text = said(
        monkeypatch, attend_front, "attend_op", lambda: attend(*copied[0], *copied[1], **HOW[how])
    )
    spec = replace(AttendSpec.of(text), group_rows=f"t{len(tables)}")
    return [[q], [k, v], [*tables, rows]], spec.text


@pytest.mark.parametrize("of_keys", [1, 2])
@pytest.mark.parametrize("own", [False, True], ids=["for all samples", "of each sample"])
@pytest.mark.parametrize("how", HOW)
def test_groups_are_read_where_they_lie(how: str, own: bool, of_keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = whole(-2, M + 2, B * G if own else G, S)
    groups, text = asked(monkeypatch, how, rows, of_keys)
    assert launch.refuses(groups, text) is None
    expected = attend_op.meaning(wide(groups), text)
    same(launch.run(groups, text, blocks=Blocks(16, 16, 4, 1)), expected, 5e-6)
    if how == "one query":
        same(launch.run(groups, text, blocks=Blocks(16, 16, 4, 1), shares=2), expected, 5e-6)


@pytest.mark.parametrize("how", ["flags", "relative"])
def test_their_gradients_go_to_where_they_lie(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, text = asked(monkeypatch, how, whole(-2, M + 2, G, S))
    results = launch.run(groups, text)
    (q,), kv, _ = groups
    go = drawn(*results[0].shape)
    found = launch_gradient.gradients(groups, text, results, {0: go}, [0, 1, 2])
    leaves = [t.double().requires_grad_() for t in (q, *kv)]
    meant = attend_op.meaning([leaves[:1], leaves[1:], [*wide(groups)[2]]], text)
    expected = torch.autograd.grad(meant[0], leaves, go.double())
    assert found is not None
    same(list(found), list(expected), 2e-5)


def test_rows_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (q, kv, tables), text = asked(monkeypatch, "plain", whole(0, M, G, S))
    with pytest.raises(Refused, match="q of a batch of 5"):
        attend_front.run(q[0][:5], kv, tables, AttendSpec.of(text))
    with pytest.raises(Refused, match="group_rows of shape"):
        attend_front.run(q[0], kv, [tables[0][0]], AttendSpec.of(text))


SWAPS = {
    "halo": "{halo: {block: 4, halo: 2}}",
    "halo of zeros": "{halo: {block: 4, halo: 2, pad_mode: zero, rel_pos: false}}",
    "davit": "{davit: {window: 4}}",
    "hilo": "{hilo: {window: 2}}",
    "biformer": "{biformer: {regions: [2, 2], topk: 2}}",
}


@pytest.mark.parametrize(
    "how", [how if how in ("halo", "biformer") else pytest.param(how, marks=pytest.mark.slow) for how in SWAPS]
)
def test_a_graph_for_a_gpu_reads_groups_itself(how: str) -> None:
    """And means the same on a processor, in calls of other sizes and with gradients."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, depth=1, num_classes=5).eval()
    images, recipe = torch.randn(2, 3, 64, 64), "version: 1\ntarget: {}\nsites: [{{match: '*', attention: {}}}]"
    plain, read = (reattend.optimize(model, recipe.format(t, SWAPS[how]), (images,)) for t in ("eager", "triton"))
    calls = read.graph.graph.find_nodes(op="call_function", target=ATTEND)
    assert any(AttendSpec.of(str(call.args[3])).group_rows for call in calls)
    for batch in (2, 3):
        images = torch.randn(batch, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(read(images), plain(images), atol=2e-5, rtol=0)
    grads = []
    for fast in (read, plain):
        fast.zero_grad()
        fast(images).square().sum().backward()
        grads.append([p.grad.clone() for p in fast.parameters() if p.grad is not None])
    torch.testing.assert_close(grads[0], grads[1], atol=2e-4, rtol=1e-3)


def test_what_attends_copied_rows_can_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, text = asked(monkeypatch, "flags", whole(-2, M + 2, G, S))
    copied, plain = copied_out(groups, text)
    assert [t.shape for t in copied[1]] == [(B * G, 2, S, 16), (B * G, 2, S, 20)]
    assert not AttendSpec.of(plain).group_rows
    same(attend_op(*groups[0], *groups[1:], text), attend_op.meaning(wide(copied), plain), 5e-6)
