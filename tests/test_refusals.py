"""What cannot stand is refused with what would fit: causal sites, no grid, odd agent numbers, windows, channels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import reattend.passes  # noqa: F401 - fills the registry
from reattend.compiler.functional import attention
from reattend.compiler.layers import module
from reattend.compiler.problem import hidden, problem
from reattend.compiler.recipe_load import load_recipe
from reattend.compiler.refusal import Refused
from reattend.compiler.steps import vocabulary

NONCAUSAL = {
    "agent": {}, "agent_sd": {}, "inline": {"local_kernel": 0}, "slab": {}, "gpsa": {}, "biformer": {}, "hilo": {},
    "halo": {}, "davit": {}, "super_token": {}, "transnext": {}, "davit-channel": {"kind": "channel"},
}  # fmt: skip
GRIDS = ("agent_sd", "slab", "gpsa", "biformer", "hilo", "halo", "davit", "super_token", "transnext", "inline")
ORDERED = ("lightning", "based", "rat", "stickbreaking", "duo", "moa", "cca", "landmark", "seer")


@pytest.mark.parametrize("slug", list(NONCAUSAL))
def test_noncausal_only_on_a_causal_site(slug: str) -> None:
    q, k, v = problem(6)
    with pytest.raises(Refused, match="causal"):
        attention(q, k, v, slug.partition("-")[0], causal=True, grid=(2, 3), ports={"x": hidden(6)}, **NONCAUSAL[slug])


@pytest.mark.parametrize(
    ("slug", "knob", "value", "fits"),
    [
        ("window", "window", "a", "a whole number"), ("window", "sinks", 2.5, "a whole number"),
        ("window", "window", None, "a whole number"), ("window", "window", True, "a whole number"),
        ("based", "eps", math.inf, "a number"), ("sigmoid", "softmax_scale", math.nan, "a number or null"),
        ("sigmoid", "bias", -math.inf, "a number or a text"), ("linear", "normalize", 2, "true or false"),
    ],
)  # fmt: skip
def test_a_knob_of_another_kind(slug: str, knob: str, value: Any, fits: str) -> None:
    q, k, v = problem(6)
    with pytest.raises(Refused, match=f"{knob}={value!r}.*{fits}"):
        attention(q, k, v, slug, causal=True, **{knob: value})


def test_a_number_without_end_is_no_knob_of_a_recipe() -> None:
    with pytest.raises(Refused, match="scale"):
        load_recipe(
            {"version": 1, "sites": [{"match": "*", "attention": {"aaren": {"scale": math.inf}}}]}, vocabulary()
        )


@pytest.mark.parametrize("slug", ORDERED)
def test_causal_only_on_a_noncausal_site(slug: str) -> None:
    q, k, v = problem(6)
    with pytest.raises(Refused, match="noncausal-self"):
        attention(q, k, v, slug, ports={"x": hidden(6), "q_nope": q, "k_nope": k})


@pytest.mark.parametrize("slug", GRIDS)
def test_no_grid(slug: str) -> None:
    q, k, v = problem(6)
    with pytest.raises(Refused, match="grid"):
        attention(q, k, v, slug, ports={"x": hidden(6)})


@pytest.mark.parametrize("slug", GRIDS)
def test_a_grid_of_another_number_of_tokens(slug: str) -> None:
    q, k, v = problem(7)
    with pytest.raises(Refused, match="7"):
        attention(q, k, v, slug, grid=(2, 3), ports={"x": hidden(7)})


@pytest.mark.parametrize("agents", [2, 5, 48])
def test_agents_of_a_grid_are_a_square(agents: int) -> None:
    q, k, v = problem(6)
    with pytest.raises(Refused, match=f"agent_num={agents} is no square, the agents of a grid are P x P: 9, 16"):
        attention(q, k, v, "agent", grid=(2, 3), agent_num=agents)
    assert attention(q, k, v, "agent", agent_num=agents).shape == v.shape, "in a sequence any number fits"


@pytest.mark.parametrize("knobs", [{"window": 3}, {"window": (2, 4)}, {"window": 2, "dilation": (1, 2)}], ids=str)
def test_windows_beyond_the_grid(knobs: dict[str, Any]) -> None:
    q, k, v = problem(6)
    with pytest.raises(Refused, match=r"larger than the grid \(2 x 3\)"):
        attention(q, k, v, "neighborhood", grid=(2, 3), **knobs)


@pytest.mark.parametrize(
    ("slug", "dims", "knobs", "says"),
    [
        ("complexformer", (7, 7), {}, "pairs channels, heads of 7"),
        ("rat", (7, 7), {}, "rotates pairs of channels, this site has 7"),
        ("rat", (8, 6), {}, "one gate for keys and values, here they have 8 and 6"),
        ("davit", (8, 6), {"kind": "channel"}, "8 channels, 6 of v"),
        ("inline", (8, 6), {"grid": (2, 3)}, "32 channels of x for 4 heads of 6"),
    ],
)
def test_channels_that_a_map_cannot_take(slug: str, dims: tuple[int, int], knobs: dict[str, Any], says: str) -> None:
    q, k = torch.randn(2, 2, 4, 6, dims[0])
    v = torch.randn(2, 4, 6, dims[1])
    with pytest.raises(Refused, match=says):
        attention(q, k, v, slug, causal=slug != "davit" and slug != "inline", ports={"x": hidden(6)}, **knobs)


@pytest.mark.parametrize("slug", ["titans", "lcm", "stickbreaking_moa"])
def test_a_module_without_the_width_that_its_tensors_depend_on(slug: str) -> None:
    with pytest.raises(Refused, match=f"module: {slug} without a width: module.*dim=C"):
        module(slug)
