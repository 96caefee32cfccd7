"""Which sites a match means: globs, layers, comparisons, features; and what is no selector."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reattend.compiler.path_glob import glob
from reattend.compiler.positions import positions
from reattend.compiler.refusal import Refused
from reattend.compiler.selectors import selector


@dataclass(frozen=True)
class At:
    """A site, as far as matching goes."""

    path: str
    index: int = 0
    heads: int = 8
    kv_heads: int = 8
    dim: int = 64
    pattern: str = "causal-self"
    features: frozenset[str] = frozenset()


def chosen(written, sites):
    match = selector(written)
    return [n for n, (site, place) in enumerate(zip(sites, positions(sites))) if match.matches(site, place)]


def paths(*names):
    return [At(name, n) for n, name in enumerate(names)]


LLAMA = paths(*(f"model.layers.{n}.self_attn" for n in range(12)))


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("*", "a.b.c", True),
        ("a.*", "a.b.c", True),
        ("a.*", "a", False),
        ("a.*", "ab.c", False),
        ("a.**", "a.b.c", True),
        ("a.*.c", "a.b.c", True),
        ("a.*.d", "a.b.c.d", False),
        ("a.**.d", "a.b.c.d", True),
        ("a.**.d", "a.d", True),
        ("**.d", "d", True),
        ("**.d", "a.b.d", True),
        ("**.d", "a.bd", False),
        ("a**d", "a.b.d", True),
        ("a**.d", "ab.d", True),
        ("a**.d", "abd", False),
        ("l.{2..31}.*", "l.31.attn", True),
        ("l.{2..31}.*", "l.3.attn", True),
        ("l.{2..31}.*", "l.32.attn", False),
        ("l.{2..31}.*", "l.1.attn", False),
        ("l.{0..30..2}.*", "l.4.attn", True),
        ("l.{0..30..2}.*", "l.5.attn", False),
        ("l.{1,10}.a", "l.10.a", True),
        ("l.{q,k}_proj", "l.k_proj", True),
        ("l.{0,4..6}", "l.5", True),
        ("l.?.a", "l.3.a", True),
        ("l.?.a", "l.31.a", False),
        ("l.*attn*", "l.self_attn_2", True),
        ("exact.path", "exact.path", True),
        ("exact.path", "exactxpath", False),
    ],
)
def test_a_glob_matches(pattern, path, matches):
    assert glob(pattern).matches(path) is matches


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("model.layers.[0-15].*", "it means 0, 1 and 5): write {0..15}"),
        ("l.{2-31}", "{2..31}"),
        ("l.{5..2}", "first <= last"),
        ("l.{0..9..0}", "first <= last"),
        ("l.{0..999999}", "'0..999999' in a path"),
        ("l.{}", "'{}' in a path"),
        ("l.{1,}", "'{1,}' in a path"),
        ("l.{1", "'{' without its partner"),
        ("l.{a{b}}", "without its partner"),
        ("", "a path of 0 characters"),
        ("x" * 500, "a path of 500 characters"),
    ],
)
def test_what_is_no_glob_is_refused(pattern, says):
    with pytest.raises(Refused) as refused:
        selector(pattern)
    assert says in str(refused.value)


@given(st.text("ab.*", min_size=1, max_size=10), st.text("ab.", min_size=1, max_size=12))
def test_a_glob_means_what_the_regular_expression_means(pattern, path):
    body, rest = (pattern[:-3], r"\..+") if pattern.endswith(".**") else (pattern, "")
    body, rest = (body[:-2], r"\..+") if not rest and body.endswith(".*") else (body, rest)
    expression = re.sub(
        r"(^|(?<=\.))\*\*\.|\*+|\.",
        lambda found: {"**.": r"(.*\.)?", "*": r"[^.]*", ".": r"\."}.get(found[0], ".*"),
        body,
    )
    everything = pattern in ("*", "**")
    assert glob(pattern).matches(path) is (everything or bool(re.fullmatch(expression + rest, path)))


def test_no_pattern_makes_matching_slow():
    start = time.perf_counter()
    assert not glob("*a" * 190 + "b").matches("a" * 400)
    assert not glob("**a" * 130 + "b").matches("a" * 400)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("layer", "numbers"),
    [
        ("0-1", [0, 1]),
        ("2-31", list(range(2, 12))),
        ("0,3,5-7", [0, 3, 5, 6, 7]),
        ("-1", [11]),
        ("-3--1", [9, 10, 11]),
        ("8--1", [8, 9, 10, 11]),
        ("even", [0, 2, 4, 6, 8, 10]),
        ("odd", [1, 3, 5, 7, 9, 11]),
        ("even,11", [0, 2, 4, 6, 8, 10, 11]),
        ("0..2", [0, 1, 2]),
        (3, [3]),
        ([3, "5-6"], [3, 5, 6]),
        ("40", []),
    ],
)
def test_layers(layer, numbers):
    assert chosen({"layer": layer}, LLAMA) == numbers
    assert chosen({"index": layer}, LLAMA) == numbers


@pytest.mark.parametrize(
    ("names", "layers", "stages"),
    [
        (
            ["encoder.layers.0.a", "encoder.layers.1.a", "decoder.layers.0.a", "decoder.layers.0.b"],
            [0, 1, 0, 0],
            [None] * 4,
        ),
        ([f"layers.{s}.blocks.{b}.attn" for s in (0, 1) for b in (0, 1)], [0, 1, 2, 3], [0, 0, 1, 1]),
        ([f"enc.{s}.{b}.attn.self" for s, b in ((0, 0), (0, 1), (1, 0))], [0, 1, 2], [0, 0, 1]),
        (["b.0.layer.0.Self", "b.0.layer.1.Cross", "b.1.layer.0.Self", "b.1.layer.1.Cross"], [0, 0, 1, 1], [None] * 4),
        (["down.0.attn.0.blocks.0.a1", "down.0.attn.0.blocks.0.a2", "mid.attn.0.blocks.0.a1"], [0, 0, 1], [0, 0, 0]),
        (["stages.0.0.grid", "stages.0.0.block", "stages.0.1.grid", "stages.0.1.block"], [0, 0, 1, 1], [0] * 4),
        (["attn", "h.3"], [None, 3], [None, None]),
        (["shared.0.attn", "shared.0.attn#1", "shared.0.attn#2"], [0, 0, 0], [None] * 3),
        ([], [], []),
    ],
)
def test_the_layer_is_read_from_the_paths(names, layers, stages):
    found = positions(paths(*names))
    assert [at.layer for at in found] == layers
    assert [at.stage for at in found] == stages


def test_each_stack_has_its_own_last_layer():
    sites = paths(*(f"encoder.layers.{n}.a" for n in range(4)), *(f"decoder.layers.{n}.a" for n in range(2)))
    assert chosen({"layer": "-1"}, sites) == [3, 5]
    assert chosen({"layer": "-1", "part": "decoder"}, sites) == [5]


def test_a_stage_is_the_first_of_several_numbers():
    swin = paths(*(f"layers.{s}.blocks.{b}.attn" for s in range(3) for b in range(2)))
    assert chosen({"stage": "0,-1"}, swin) == [0, 1, 4, 5]
    assert chosen({"layer": "-1"}, swin) == [5]
    assert chosen({"stage": 0}, LLAMA) == []


def test_conditions_on_shape_kind_and_features():
    sites = [
        At("a", heads=4),
        At("b", heads=8, pattern="noncausal-self", features=frozenset({"bias"})),
        At("c", heads=16, kv_heads=4, pattern="noncausal-cross", features=frozenset({"bias", "padding"})),
    ]
    assert chosen({"heads": ">=8"}, sites) == [1, 2]
    assert chosen({"heads": ">4 <16"}, sites) == [1]
    assert chosen({"heads": [4, "16"]}, sites) == chosen({"heads": "4,16"}, sites) == [0, 2]
    assert chosen({"heads": "4-8"}, sites) == [0, 1]
    assert chosen({"heads": "!=8", "kv_heads": 4}, sites) == [2]
    assert chosen({"dim": 64}, sites) == [0, 1, 2]
    assert chosen({"kind": "causal-self"}, sites) == [0]
    assert chosen({"kind": "noncausal"}, sites) == [1, 2]  # not: ends with "causal"
    assert chosen({"kind": ["causal", "cross"]}, sites) == [0, 2]
    assert chosen({"has": "bias"}, sites) == [1, 2]
    assert chosen({"has": ["bias", "padding"]}, sites) == [2]
    assert chosen({"without": "padding", "kind": "self"}, sites) == [0, 1]


def test_a_part_is_whole_segments():
    sites = paths("model.decoder.layers.0.encoder_attn", "model.encoder.layers.0.self_attn", "vision.encoder2.x")
    assert chosen({"part": "encoder"}, sites) == [1]
    assert chosen({"part": ["encoder.layers", "vision"]}, sites) == [1, 2]


def test_a_pattern_without_a_call_number_means_every_call():
    sites = paths("h.0.attn", "h.0.attn#1", "h.1.attn")
    assert chosen("h.0.attn", sites) == [0, 1]
    assert chosen("h.0.attn#1", sites) == [1]
    assert chosen({"path": ["h.1.*", "h.0.attn#1"]}, sites) == [1, 2]


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ({"layr": 3}, "key 'layr': did you mean 'layer'?"),
        ({"layer": "5-2"}, "layer: '5-2'"),
        ({"layer": "first"}, "layer: 'first'"),
        ({"layer": "-1-3"}, "layer: '-1-3'"),
        ({"layer": ""}, "layer: ''"),
        ({"layer": True}, "layer: True"),
        ({"layer": 1.5}, "layer: 1.5"),
        ({"layer": []}, "layer: []"),
        ({"layer": "9" * 5000}, "layer: '999"),
        ({"heads": ">8 foo"}, "heads: '>8 foo'"),
        ({"heads": "=>8"}, "heads: '=>8'"),
        ({"heads": "-8"}, "heads: '-8'"),
        ({"heads": "8-4"}, "heads: '8-4'"),
        ({"kind": "causal-slef"}, "did you mean 'causal-self'?"),
        ({"has": "bais"}, "did you mean 'bias'?"),
        ({"part": "a.*"}, "part: 'a.*'"),
    ],
)
def test_a_condition_that_is_not_understood_is_refused(written, says):
    with pytest.raises(Refused) as refused:
        selector(written)
    assert says in str(refused.value)


def test_a_selector_is_a_value():
    assert selector("*") == selector({"path": "*"}) == selector({"path": ["a.*", "*"]})
    assert selector({"layer": [0, 1]}) == selector({"layer": "0, 1"})
    assert selector({"layer": 3, "kind": "causal"}) == selector({"kind": ["causal"], "layer": "3"})
    assert hash(selector({"has": ["rope", "bias"]})) == hash(selector({"has": ["bias", "rope"]}))
    assert str(selector("*")) == "*"
    assert str(selector({"layer": "2-31", "has": ["rope", "bias"]})) == "{has: [bias, rope], layer: 2-31}"
    for written in (
        "a.*",
        "*",
        {"layer": "3"},
        {"path": ["a", "b"]},
        {"heads": ">=8 <64", "kind": ["cross", "causal"]},
    ):
        assert selector(selector(written).plain()) == selector(written)
