"""Located plain data: what comes through, what is refused, and that every refusal says where."""

from __future__ import annotations

import json
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from reattend.compiler.recipe_yaml import MAX_BYTES, read_bytes, read_python, read_text, resolve
from reattend.compiler.refusal import Refused

BOMB = "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
)

REFUSED = [
    ("a: [1, 2", "r:1:9: the file ends too early (in what opens at 1:4)"),
    ("sites:\n  - {match: '*', attention: {win", "r:2:33: the file ends too early"),
    ("a: 'text", "r:1:9: the file ends too early"),
    ("a:\n\t- b", "r:2:1: a tab"),
    ("a: b: c", "r:1:5: not YAML: a second ':'"),
    ("a: [1,\n  2\nb: 3", "r:3:2: not YAML: expected ',' or ']'"),
    ("a:\n  - b\n - c", "r:3:2: not YAML: wrong indentation"),
    ("a: @b", "r:1:4: not YAML: a character that cannot stand here"),
    ("a: 1\nb:\n  c: 1\n  c: 2", "r:4:3: b: key 'c' stands here twice: first at r:3:3"),
    ("a: 1\n'a': 2", "r:2:1: key 'a' stands here twice"),
    ("a: !!python/object/apply:os.system ['true']", "r:1:4: a: tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
    ("a: !!binary aGk=", "r:1:4: a: tag 'tag:yaml.org,2002:binary'"),
    ("a: !own 1", "r:1:4: a: tag '!own'"),
    ("!x a: 1", "r:1:1: tag '!x'"),
    ("a: &x [1, *x]", "r:1:11: a[1]: alias *x stands inside its own anchor"),
    ("a: *x", "r:1:4: a: alias *x without an anchor"),
    (BOMB, "more than 50000 values (aliases expanded)"),
    ("[" * 5000, "nested deeper than 24"),
    ("- " * 5000, "nested deeper than 24"),
    ("? " * 5000, "nested deeper than 24"),
    ("1: a", 'r:1:1: key 1 is no text: write it in quotes: "1"'),
    ("~: a", "r:1:1: key nothing (null) is no text"),
    ("[a, b]: c", "r:1:1: key a list or mapping is no text"),
    ("a: {<<: {b: 1}}", "r:1:5: a: merge key '<<'"),
    ("a: 1\n---\nb: 2", "r:2:1: a second document"),
    ("a: .nan", "r:1:4: a: not a number"),
    ("a: 1e999", "r:1:4: a: 1e999 is larger than any float64"),
    ("a: " + "9" * 5000, "r:1:4: a: a number of 5000 digits"),
    ("a: b\x07", "r:1:5: character U+0007"),
    ('{"a": "\\ud83d"}', "r:1:7: a: half of a surrogate pair"),
    ("x" * (MAX_BYTES + 1), "r: more than 256 KiB"),
    ('? "' + "x" * 300 + '"\n: 1', "r:1:3: key 'xxxxxxxxxxxxxxxxxxxx'... of 300 characters"),
]


@pytest.mark.parametrize(("text", "says"), REFUSED, ids=lambda value: value[:24])
def test_a_text_that_is_no_plain_data_is_refused_with_its_place(text, says):
    start = time.perf_counter()
    with pytest.raises(Refused) as refused:
        read_text(text, "r")
    assert says in str(refused.value)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"PK\x03\x04", "r:1:3: character U+0003"),
        (b"version: 1\nsites: \xc3(", "r:2:8: byte 0xc3 is not UTF-8 text"),
        ("version: 1".encode("utf-16"), "r:1:1: byte 0xff is not UTF-8 text"),
        (b"\x00" * 100, "r:1:1: character U+0000"),
        (b" " * (MAX_BYTES + 1), "r: more than 256 KiB"),
    ],
)
def test_a_binary_file_is_refused_with_its_place(data, says):
    with pytest.raises(Refused) as refused:
        read_bytes(data, "r")
    assert says in str(refused.value)


def test_a_byte_order_mark_is_no_part_of_the_text():
    assert read_bytes("version: 1".encode("utf-8-sig"), "r").plain() == {"version": 1}


def test_scalars_follow_yaml_1_2():
    text = "[1e-3, 010, on, no, 12:30, 2024-01-01, 0x10, ~, null, TRUE, '1', 1_000, .5, 1., +7, -.inf, '']"
    plain = read_text(text, "r").plain()
    expected = [0.001, 10, "on", "no", "12:30", "2024-01-01", "0x10", None, None, True, "1", "1_000", 0.5, 1.0, 7]
    assert plain == [*expected, -float("inf"), ""]
    assert [type(value) for value in plain[:2]] == [float, int]


def test_an_alias_says_what_its_anchor_said_where_it_stands():
    node = read_text("a: &x {b: 1}\nc: *x", "r")
    assert node.plain() == {"a": {"b": 1}, "c": {"b": 1}}
    assert node.value["c"].where == "r:2:4"
    assert node.value["c"].key_where == "r:2:1"


def test_json_may_be_indented_by_tabs_and_escape_what_it_likes():
    assert read_text('{\n\t"a":\t"\\ud83d\\ude00\\/"\n}', "r").plain() == {"a": "😀/"}


def test_nothing_is_read_from_nothing():
    assert read_text("", "r").value is None
    assert read_text("# a comment\n", "r").value is None


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({1: 2}, 'key 1 is no text: write it in quotes: "1"'),
        ({"a": {"b": {1, 2}}}, "a.b: a set"),
        ({"a": [0, object()]}, "a[1]: a object"),
        ({"a": float("nan")}, "a: not a number"),
        ({"a": b"x"}, "a: a bytes"),
        ({"a": 1j}, "a: a complex"),
    ],
)
def test_python_data_that_is_not_plain_is_refused_with_its_path(value, says):
    with pytest.raises(Refused) as refused:
        read_python(value)
    assert str(refused.value).startswith(says)


def test_containers_that_hold_themselves_or_share_too_much_are_refused():
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(Refused, match="nested deeper than 24"):
        read_python(loop)
    shared: list[object] = [1] * 9
    for _ in range(20):
        shared = [shared] * 9
    with pytest.raises(Refused, match="more than 50000 values"):
        read_python(shared)


def test_numpy_numbers_become_pythons():
    import numpy as np

    plain = read_python({"a": np.int64(3), "b": np.float32(0.5), "c": (1, 2)}).plain()
    assert plain == {"a": 3, "b": 0.5, "c": [1, 2]}
    assert [type(plain["a"]), type(plain["b"])] == [int, float]


SCALARS = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | st.text(max_size=8)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@given(PLAIN.filter(lambda value: "<<" not in repr(value)))
def test_json_and_python_say_the_same(value):
    text = json.dumps({"value": value}).replace("Infinity", ".inf")
    assert read_text(text, "r").plain() == read_python({"value": value}).plain() == {"value": value}


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text):
    try:
        node = read_text(text, "r")
    except Refused as refusal:
        said = refusal.where
    else:
        said = node.where
        json.dumps(node.plain())
    assert said.startswith("r")


@given(st.text(alphabet="ab:{}[]*&!-#'\"\n\t ,?|>%@~0", max_size=40))
def test_what_looks_like_yaml_is_read_as_pyyaml_does_or_refused(text):
    try:
        plain = read_text(text, "r").plain()
    except Refused:
        return
    told = yaml.compose(text.replace("\t", " ") if text.lstrip().startswith("{") else text, Loader=yaml.SafeLoader)
    assert plain == _composed(told)


def _composed(node):
    """PyYAML's own tree, its plain scalars resolved our way."""
    if node is None:
        return None
    if isinstance(node, yaml.MappingNode):
        return {key.value: _composed(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_composed(item) for item in node.value]
    return resolve(node.value) if node.style is None else node.value
