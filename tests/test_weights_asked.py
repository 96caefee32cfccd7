"""Attention weights: the original's where the recipe is exact and the model gives them, else a refusal; never None."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import reattend
from reattend.compiler.refusal import Refused
from reattend.models.zoo import zoo

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


def hosted(name: str, spelling: str) -> tuple[Any, Any, dict[str, Any]]:
    family = zoo()[name]
    model, kwargs = family.build(spelling), family.inputs()[1]
    return model, reattend.optimize(model, "exact", kwargs, measure=False), kwargs


@pytest.mark.parametrize("name", ["bert", "deberta_v2"])
@pytest.mark.parametrize("way", ["field", "tuple"])
def test_an_exact_recipe_gives_the_weights_that_the_model_gives(name: str, way: str) -> None:
    model, fast, kwargs = hosted(name, "eager")
    asked = kwargs | {"output_attentions": True, "return_dict": way == "field"}
    with torch.no_grad():
        got, meant = fast(**asked), model(**asked)
    ours, theirs = (o.attentions if way == "field" else o[2 if name == "bert" else 1] for o in (got, meant))
    assert len(ours) == len(theirs) == 2
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    torch.testing.assert_close(got[0], meant[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", ["argument", "tuple", "config"])
def test_the_fused_op_has_no_weights_to_give_and_says_so(way: str) -> None:
    _, fast, kwargs = hosted("bert", "sdpa")
    if way == "config":
        fast.config._attn_implementation = "eager"  # as transformers asks for, before it lets the flag be set
        fast.config.output_attentions = True
        fast.config._attn_implementation = "sdpa"
    else:
        kwargs = kwargs | {"output_attentions": True, "return_dict": way == "argument"}
    with pytest.raises(Refused, match=r"output_attentions=True.*no weights to give.*eager"):
        fast(**kwargs)
