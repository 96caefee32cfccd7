"""What cannot stand is refused with what would fit: causal sites, no grid, odd agent numbers, windows, channels."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from small_models import Attend

import reattend.passes  # noqa: F401 - fills the registry
from reattend.api import optimize
from reattend.compiler.functional import attention
from reattend.compiler.layers import module
from reattend.compiler.mechanism import mechanism
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
        ("titans", "chunk_size", (5,), "a whole number or a list of 2"), ("s2", "local_blocks", (), "a list of 2"),
        ("ls", "long_heads", ("x",), "a list, each a whole number"),
        ("neighborhood", "window", ("x",), "a whole number"),
    ],
)  # fmt: skip
def test_a_knob_of_another_kind(slug: str, knob: str, value: Any, fits: str) -> None:
    q, k, v = problem(6)
    with pytest.raises(Refused, match=f"{knob}={re.escape(repr(value))}.*{fits}"):
        attention(q, k, v, slug, causal=True, **{knob: value})


@pytest.mark.parametrize(
    ("slug", "knob", "value", "fits"),
    [
        ("sigmoid", "softmax_scale", 1e30, "up to 1e"), ("agent_sd", "k_scale2", -1e30, "up to 1e"),
        ("gpsa", "qk_scale", -1e300, "up to"),
        ("based", "eps", -1.0, "0 or more"), ("titans", "norm_eps", -1e-5, "0 or more"),
        ("flow", "sum_eps", -1, "0 or more"),
        ("lightning", "block", 0, "1 or more"), ("lightning", "gate_rank", -1, "0 or more"),
        ("davit", "groups", -1, "1 or"),
        ("sigmoid", "length", -1, "0 or more"), ("lssar", "offset_free_rows", -1, "0 or more"),
        ("moa", "length", 0, "1 or"),
        ("urpe", "max_distance", -1, "1 or more"), ("inline", "prefix_tokens", -1, "0 or more"),
        ("transnext", "fixed_pool_size", -1, "1 or more"), ("titans", "expansion_factor", -1.0, "0 or more"),
    ],
)  # fmt: skip
def test_a_knob_out_of_its_range(slug: str, knob: str, value: Any, fits: str) -> None:
    q, k, v = problem(6)
    with pytest.raises(Refused, match=f"{slug}: {knob}={re.escape(repr(value))}.*{fits}"):
        attention(q, k, v, slug, **{knob: value})


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


@pytest.mark.parametrize("knobs", [{"feature_dim": 400_000}, {"feature_dim": 10**13}], ids=["forward", "parameters"])
def test_more_memory_than_there_is_is_said_at_the_site(knobs: dict[str, Any]) -> None:
    recipe = {"version": 1, "target": "eager", "sites": [{"match": "*", "attention": {"based": knobs}}]}
    model = Attend(16, 2, causal=True).eval()
    with pytest.raises(Refused, match=r"based.*feature_dim=\d+.* more memory than there is: smaller knobs"):
        optimize(model, recipe, (torch.randn(1, 12, 16),), measure=False)


def test_a_meaning_that_asks_for_more_memory_than_there_is() -> None:
    with pytest.raises(Refused, match=r"causal-self.*based\(feature_dim=10000000000000.*more memory than there is"):
        attention(*problem(6), "based", causal=True, ports={"x": hidden(6)}, feature_dim=10**13)


@pytest.mark.parametrize(
    ("slug", "knobs", "says"),
    [
        ("kd_gqa", {"num_kv_heads": -1}, "num_kv_heads=-1"),
        ("hyper", {"lsh_num_projs": 100}, "lsh_num_projs=100"),
        ("stickbreaking_moa", {"heads_per_expert": 0}, "heads_per_expert=0"),
        ("stickbreaking_moa", {"heads_per_expert": -1}, "heads_per_expert=-1"),
        ("stickbreaking_moa", {"att_hidden": 0}, "att_hidden=0"),
        ("stickbreaking_moa", {"gate_hidden": 0}, "gate_hidden=0"),
        ("qk_norm", {"eps": -1.0}, "eps=-1.0"),
        ("halo", {"scale": 0.0}, "scale=0.0"),
        ("halo", {"scale": 1e-40}, "scale=1e-40"),
        ("agent", {"dwc_kernel": -1}, "dwc_kernel=-1"),
        ("biformer", {"lepe_kernel": -1}, "lepe_kernel=-1"),
    ],
)
def test_sizes_that_no_tensor_has(slug: str, knobs: dict[str, Any], says: str) -> None:
    with pytest.raises(Refused, match=re.escape(says)):
        attention(*problem(6), mechanism(slug, **knobs), causal=True)
