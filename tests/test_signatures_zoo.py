"""Families of models, optimized without inputs, at every kind of call: the original's answer, or a refusal by name."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reattend
from reattend.models.zoo import zoo
from reattend.models.zoo_calls import KINDS, answer, answers, compared, named, reference

FAST = {
    "llama": ("labels", "padding", "bf16"),
    "bert": ("positional", "embeds", "hidden", "tuple", "weights"),
    "whisper": ("decoder",),
    "vit": ("call", "batch 1", "image"),
    "timm_vit": ("call", "longer", "image", "bf16"),
    "timm_levit": ("call", "train"),
    "mha": ("call", "longer", "train"),
}
NO_ATTENTION = ("timm_convnext", "timm_efficientvit")
REFUSES = {("weights", "refused"), ("image", "refused"), ("train", "refused")}  # train: wav2vec2 draws whole layers


def hosted(name: str) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    package = {"timm": "timm", "dit": "diffusers", "unet": "diffusers"}.get(name.split("_")[0], "transformers")
    pytest.importorskip(package)
    model = reference(zoo()[name])
    fast = reattend.optimize(copy.deepcopy(model), "exact", measure=False, max_signatures=32)
    return model, fast, named(model, zoo()[name].inputs())


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("name", FAST)
def test_family(name: str) -> None:
    model, fast, given = hosted(name)
    for kind in (k for k in KINDS if k.name in FAST[name]):
        found = answer(kind, model, fast, given)
        assert found.verdict in ("ok", "as original") or (kind.name, found.verdict) in REFUSES, found
        assert found.verdict != "as original" or kind.name == "image", found
    if name == "llama":
        assert fast.report.verdict().startswith("2 of 2 sites rewritten")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in zoo() if name not in NO_ATTENTION])
def test_every_kind_of_call(name: str) -> None:
    model, fast, given = hosted(name)
    found = list(answers(model, fast, ((), given)))
    assert not [a for a in found if a.verdict == "wrong"]
    refused = {(a.kind, a.verdict) for a in found if a.verdict == "refused"}
    assert refused <= REFUSES and (("train", "refused") not in refused or name == "wav2vec2")
    assert sum(a.verdict == "ok" for a in found) >= 5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("name", NO_ATTENTION)
def test_a_model_without_attention_is_refused_by_name(name: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(reattend.Refused, match="no attention found"):
        reattend.optimize(reference(zoo()[name]), "exact", measure=False)(*zoo()[name].inputs()[0])


# --- dropout ----------------------------------------------------------------------------------------------------------


class Drops(nn.Module):
    """Attention whose weights are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        rate = 0.3 if self.training else 0.0
        out = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=rate)
        return out.transpose(1, 2).flatten(2)


def test_dropout_is_random_in_train_and_right_in_the_mean_and_spread() -> None:
    model = Drops().eval()
    x = torch.randn(2, 5, 8)
    fast = reattend.optimize(copy.deepcopy(model), "exact", x, measure=False)
    with torch.no_grad():
        plain = model(x)
        model.train(), fast.train()
        many = x.repeat(2000, 1, 1)  # as many draws as rows
        ours, theirs = (m(many).unflatten(0, (2000, 2)) for m in (fast, model))
        assert not torch.equal(fast(x), fast(x))
    error = theirs.std(0) / math.sqrt(2000)
    assert bool(((ours.mean(0) - plain).abs() < 6 * error + 1e-6).all())  # six standard errors
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.2, atol=1e-6)  # std of 2000 draws: to 2 %, tails 10 %


# --- what the comparison itself can see -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "found", "says"),
    [
        ({"a": torch.zeros(2)}, {"b": torch.zeros(2)}, "gives"),
        ((torch.zeros(2), None), (torch.zeros(2), torch.zeros(2)), "gives"),
        ([torch.zeros(2)], (torch.zeros(2),), "gives"),
        (torch.zeros(2), torch.zeros(3), "[3], not"),
        (torch.zeros(2), torch.zeros(2).double(), "float64"),
        (torch.zeros(2), torch.full((2,), 1e-4), "apart"),
        (torch.zeros(2), torch.full((2,), math.nan), "inf apart"),
    ],
    ids=["names", "none", "type", "shape", "dtype", "values", "nan"],
)
def test_a_difference_is_seen(wanted: Any, found: Any, says: str) -> None:
    seen = compared("call", wanted, found, 1e-5)
    assert seen.verdict == "wrong" and says in seen.reason
    assert compared("call", wanted, wanted, 1e-5).verdict == "ok"
