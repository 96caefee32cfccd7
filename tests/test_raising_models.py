"""Families of models: exactly their attentions are raised, and the output stays what it was."""

from __future__ import annotations

import pytest
import torch

from reattend.models.zoo import zoo
from reattend.models.zoo_raised import raised_row

FAST = (
    "llama",
    "gpt_oss",
    "t5",
    "bert_padded",
    "mixtral",
    "swin",
    "clip",
    "timm_vit",
    "mha",
    "nanogpt",
    "einops",
    "diffllama",
)
ALL = [(name, spelling) for name, family in zoo().items() for spelling in family.spellings]


def raised_as_it_should(name: str, spelling: str) -> None:
    package = {"timm": "timm", "dit": "diffusers", "unet": "diffusers"}.get(name.split("_")[0], "transformers")
    pytest.importorskip(package)
    row = raised_row(zoo()[name], spelling)
    assert row.raised == row.sites, row.notes
    assert row.difference <= 1e-5


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize(("name", "spelling"), [case for case in ALL if case[0] in FAST])
def test_family(name: str, spelling: str) -> None:
    raised_as_it_should(name, spelling)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "spelling"), [case for case in ALL if case[0] not in FAST])
def test_other_family(name: str, spelling: str) -> None:
    raised_as_it_should(name, spelling)


@pytest.mark.filterwarnings("ignore")
def test_a_family_is_the_same_every_time() -> None:
    pytest.importorskip("transformers")
    one, two = (zoo()["llama"].build("sdpa") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert len(zoo()) >= 116
