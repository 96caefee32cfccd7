"""Modality-mutual masks, row by row; what reaches whom, by perturbation; padding; a llama with a picture's span."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import reattend
from reattend.compiler.functional import attention
from reattend.compiler.problem import problem
from reattend.compiler.refusal import Refused

SPANS = {"image_start": 2, "image_end": 5, "text_end": 7}


def allowed(i: int, j: int) -> bool:
    return j <= i or (2 <= i < 5 and 5 <= j < 7)


def test_it_is_its_formula() -> None:
    q, k, v = problem(9, kv_heads=2, dtype=torch.float64)
    seen = torch.ones(2, 9, dtype=torch.bool)
    seen[1, [0, 6]] = False
    got = attention(*(t.float() for t in (q, k, v)), "mma", causal=True, mask=seen, **SPANS)
    for b in range(2):
        for h in range(4):
            for i in range(9):
                keys = [j for j in range(9) if allowed(i, j) and seen[b, j]]
                if keys:
                    w = torch.softmax(k[b, h // 2, keys] @ q[b, h, i] / 8**0.5, 0)
                    assert torch.allclose(got[b, h, i].double(), w @ v[b, h // 2, keys], atol=1e-5)
                else:
                    assert not got[b, h, i].any()


def changed_rows(token: int) -> set[int]:
    q, k, v = problem(9)

    def answer(t: Tensor, u: Tensor) -> Tensor:
        return attention(q, t, u, "mma", causal=True, **SPANS)

    other, plain = (t.clone() for t in (k, v))
    other[:, :, token] *= -2
    plain[:, :, token] += 1
    return set((answer(k, v) - answer(other, plain)).abs().amax((0, 1, 3)).gt(1e-6).nonzero().flatten().tolist())


def test_the_question_reaches_the_image_and_the_answer_does_not() -> None:
    assert changed_rows(5) == {2, 3, 4, 5, 6, 7, 8}
    assert changed_rows(7) == {7, 8}
    assert changed_rows(3) == {3, 4, 5, 6, 7, 8}


@pytest.mark.parametrize(
    ("knobs", "causal", "match"),
    [
        ({"image_start": 3, "image_end": 2, "text_end": 4}, True, "image_start <= image_end"),
        (SPANS, False, "widens plain causal"),
        ({"text_end": 12}, True, "this site has 9 tokens"),
    ],
)
def test_spans_that_do_not_fit_are_refused(knobs: dict[str, Any], causal: bool, match: str) -> None:
    q, k, v = problem(9)
    with pytest.raises(Refused, match=match):
        attention(q, k, v, "mma", causal=causal, **knobs)


def test_in_a_llama_only_the_image_changes_in_the_first_layer() -> None:
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
                       vocab_size=60, num_hidden_layers=1)
    ).eval()  # fmt: skip
    ids = torch.randint(1, 60, (2, 9))
    recipe = {"version": 1, "sites": [{"match": "*", "attention": {"mma": SPANS}}]}
    fast = reattend.optimize(model, recipe, {"input_ids": ids})
    logits = fast(input_ids=ids).logits
    moved = (logits - model(input_ids=ids).logits).abs().amax((0, 2)) > 1e-5
    assert moved.tolist() == [2 <= i < 5 for i in range(9)]
    logits.square().mean().backward()
