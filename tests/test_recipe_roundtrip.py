"""Any recipe: dict, canonical text and JSON load as equal values, and the JSON Schema takes exactly what loads."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reattend.compiler.knob_types import Misfit, knob_type
from reattend.compiler.recipe_load import load_recipe
from reattend.compiler.recipe_schema import json_schema
from reattend.compiler.refusal import Refused
from reattend.compiler.site import FEATURES, PATTERNS
from reattend.compiler.vocabulary import Knob, MechanismFacts, Vocabulary

WORDS = Vocabulary(
    {
        one.name: one
        for one in (
            MechanismFacts("softmax", "core"),
            MechanismFacts("window", "core", {"window": Knob("int", 1024), "text": Knob("str | None", None)}),
            MechanismFacts("agent", "core", {"pool": Knob("tuple[int, ...]", ()), "eps": Knob("float", 0.1)}),
            MechanismFacts("pool", "region", {"mode": Knob("Literal['mean', 'max']", "mean")}),
            MechanismFacts("moh", "gate", {"heads": Knob("int", doc="must be given"), "on": Knob("bool", True)}),
            MechanismFacts("ring", "cache", {"of": Knob("dict[str, int]", {})}),
            MechanismFacts("side", "insert", {"any": Knob("Any", None)}),
            MechanismFacts("merge", "model", {"r": Knob("int | float", 8)}),
            MechanismFacts("w8a8", "model", stage="quantize"),
        )
    }
)
SCHEMA = json_schema(WORDS)

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.none() | st.booleans() | st.integers() | NUMBERS | st.text(max_size=6)
KNOBS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "window": {"window": st.integers(), "text": st.none() | st.text(max_size=12)},
    "agent": {"pool": st.lists(st.integers(), max_size=3), "eps": NUMBERS | st.integers(-9, 9)},
    "pool": {"mode": st.sampled_from(["mean", "max"])},
    "moh": {"on": st.booleans()},
    "ring": {"of": st.dictionaries(st.text(max_size=4).filter(lambda key: key != "<<"), st.integers(), max_size=3)},
    "side": {"any": PLAIN | st.lists(PLAIN, max_size=3)},
    "merge": {"r": st.integers() | NUMBERS},
    "w8a8": {},
}


def choices(*names, keep=True):
    given_knobs = [
        st.fixed_dictionaries({"heads": st.integers()} if name == "moh" else {}, optional=KNOBS[name]).map(
            lambda knobs, name=name: {name: knobs}
        )
        for name in names
    ]
    bare = [name for name in names if name != "moh"] + (["keep"] if keep else [])
    return st.one_of(*given_knobs, *([st.sampled_from(bare)] if bare else []))


SPANS = st.sampled_from(["0-1", "2-31", "0,3,5-7", "-1", "even", "8--1", 3])
COMPARED = st.sampled_from(["8", ">=8", ">=8 <64", "4-16", "8,16", 12])
GLOBS = st.sampled_from(["*", "model.layers.{2..31}.*", "**.attn", "lm_head", "a#1", "h.{0,4..6}.?"])
MATCHES = GLOBS | (
    st.fixed_dictionaries(
        {"layer": SPANS},
        optional={
            "index": SPANS,
            "path": GLOBS | st.lists(GLOBS, min_size=1, max_size=2),
            "kind": st.lists(st.sampled_from([*PATTERNS, "causal", "cross"]), min_size=1, max_size=2),
            "heads": COMPARED,
            "dim": COMPARED,
            "has": st.sampled_from(FEATURES),
            "without": st.lists(st.sampled_from(FEATURES), min_size=1, max_size=2),
            "part": st.sampled_from(["encoder", "a.b"]),
        },
    )
)
CORES = choices("softmax", "window", "agent")
SPLITS = st.fixed_dictionaries({"rest": CORES}, optional={"0-3": CORES, "4,6": CORES})
RULES = st.fixed_dictionaries(
    {"match": MATCHES, "attention": choices("softmax", "window", "agent", "pool") | SPLITS.map(lambda s: {"split": s})},
    optional={
        "heads": choices("moh"),
        "kv": choices("ring"),
        "insert": choices("side"),
        "drop": st.lists(st.sampled_from(FEATURES), max_size=2),
    },
)
RECIPES = st.fixed_dictionaries(
    {"version": st.just(1)},
    optional={
        "model": st.dictionaries(st.sampled_from(["type", "layers"]), st.text(max_size=5) | st.integers(), max_size=2),
        "data": st.fixed_dictionaries({}, optional={"verify": st.text(max_size=9), "length": st.integers(1, 9999)}),
        "sites": st.lists(RULES, max_size=3),
        "passes": st.lists(choices("merge", keep=False), max_size=2),
        "quantize": st.fixed_dictionaries({}, optional={"lm_head": choices("w8a8"), "b.{q,k}": choices("w8a8")}),
        "verify": st.fixed_dictionaries(
            {}, optional={"max_kl": st.floats(0, 9), "else": st.sampled_from(["rollback", "refuse", "warn"])}
        ),
        "recover": st.fixed_dictionaries({}, optional={"steps": st.integers(1, 99), "lr": st.floats(0, 1)}),
        "target": st.sampled_from(["auto", "eager", "cpu", "triton"]),
    },
)


@given(RECIPES)
def test_dict_text_and_json_are_one_recipe(table):
    recipe = load_recipe(table, WORDS)
    text = recipe.text()
    for source in (text, recipe.to_dict(), json.dumps(table) + "\n", json.dumps(recipe.to_dict(), indent="\t"), recipe):
        again = load_recipe(source, WORDS)
        assert again == recipe
        assert again.text() == text
    assert complaint(table, SCHEMA) is None
    assert complaint(recipe.to_dict(), SCHEMA) is None


WRONG = [
    {},
    {"version": 2},
    {"version": 1, "site": []},
    {"version": 1, "sites": {}},
    {"version": 1, "sites": [{"attention": "keep"}]},
    {"version": 1, "sites": [{"match": "*"}]},
    {"version": 1, "sites": [{"match": {"layr": 1}, "attention": "keep"}]},
    {"version": 1, "sites": [{"match": {"kind": "x"}, "attention": "keep"}]},
    {"version": 1, "sites": [{"match": "*", "attention": "windw"}]},
    {"version": 1, "sites": [{"match": "*", "attention": {"window": {"windw": 1}}}]},
    {"version": 1, "sites": [{"match": "*", "attention": {"window": {"window": "big"}}}]},
    {"version": 1, "sites": [{"match": "*", "attention": {"window": {}, "agent": {}}}]},
    {"version": 1, "sites": [{"match": "*", "attention": "ring"}]},
    {"version": 1, "sites": [{"match": "*", "heads": "moh"}]},
    {"version": 1, "sites": [{"match": "*", "split": {"0-3": "pool"}}]},
    {"version": 1, "sites": [{"match": "*", "split": {"all": "window"}}]},
    {"version": 1, "sites": [{"match": "*", "split": {"rest": "window"}, "attention": "keep"}]},
    {"version": 1, "sites": [{"match": "*", "attention": "keep", "drop": ["bais"]}]},
    {"version": 1, "passes": ["keep"]},
    {"version": 1, "passes": ["w8a8"]},
    {"version": 1, "verify": {"max_kl": -1}},
    {"version": 1, "verify": {"else": "x"}},
    {"version": 1, "recover": {"steps": 0}},
    {"version": 1, "target": "gpu"},
]


@pytest.mark.parametrize("table", WRONG, ids=json.dumps)
def test_the_schema_refuses_what_loading_refuses(table):
    assert complaint(table, SCHEMA) is not None
    if table:  # an empty recipe loads, and warns
        with pytest.raises(Refused):
            load_recipe(table, WORDS)


@pytest.mark.parametrize(
    ("annotation", "takes", "refuses"),
    [
        ("int", [1, 2.0, 1 - 2**63], [True, 1.5, "1", None, float("inf"), 10**30]),
        ("float", [1, 0.5], [True, "1", 10**400]),
        (bool, [True], [1, "true"]),
        (int | None, [None, 3], ["3"]),
        ("Optional[str]", [None, "a"], [1]),
        ("Literal['a', 1]", ["a", 1], [True, "b"]),
        ("tuple[int, float]", [[1, 2]], [[1], [1, "a"], "ab"]),
        (tuple[int, ...], [[], [1, 2]], [["a"], 3]),
        ("list[list[int]]", [[[1], []]], [[1]]),
        ("Mapping[str, bool]", [{"a": True}], [{"a": 1}, []]),
        ("Union[int, str, None]", [1, "a", None], [1.5]),
        ("SomeClass", [1, "a", {"b": [None]}], []),
        ("not an annotation", [1], []),
    ],
    ids=str,
)
def test_a_knob_type_takes_what_its_annotation_says(annotation, takes, refuses):
    kind = knob_type(annotation)
    for value in takes:
        hash(kind.admit(value))
        assert complaint(value, kind.schema()) is None
    for value in refuses:
        with pytest.raises(Misfit):
            kind.admit(value)


def test_a_whole_number_stays_one_where_both_fit():
    assert [type(knob_type("float | int").admit(value)) for value in (8, 8.5)] == [int, float]


TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None)}


def complaint(value: Any, schema: dict[str, Any]) -> str | None:
    """What a JSON Schema has against a value: the part of the standard that ours uses."""
    for word, says in schema.items():
        found = _RULES[word](value, says, schema) if word in _RULES else None
        if found:
            return f"{word}: {found}"
    return None


def _typed(value: Any, says: Any, schema: Any) -> str | None:
    names = says if isinstance(says, list) else [says]
    fits = any(
        isinstance(value, bool) if name == "boolean" else isinstance(value, TYPES[name]) and not isinstance(value, bool)
        for name in names
    )
    whole = "integer" in names and isinstance(value, float) and value == int(value) if not fits else True
    return None if fits or whole else f"{value!r} is no {says}"


def _inside(value: Any, says: Any, schema: Any) -> str | None:
    if not isinstance(value, dict):
        return None
    named, patterned = schema.get("properties", {}), schema.get("patternProperties", {})
    for key, item in value.items():
        parts = [named[key]] if key in named else [part for p, part in patterned.items() if re.search(p, key)]
        rest = schema.get("additionalProperties", True)
        if not parts and rest is False:
            return f"key {key!r}"
        parts = parts or ([rest] if isinstance(rest, dict) else [])
        found = next((said for part in parts if (said := complaint(item, part))), None)
        if found:
            return f"{key}: {found}"
    return None


_RULES: dict[str, Any] = {
    "$ref": lambda v, says, _: complaint(v, SCHEMA["$defs"][says.rpartition("/")[2]]),
    "type": _typed,
    "enum": lambda v, says, _: (
        None if any(v == one and type(v) is type(one) for one in says) else f"{v!r} not in {says}"
    ),
    "anyOf": lambda v, says, _: None if any(complaint(v, one) is None for one in says) else f"{v!r} fits none",
    "not": lambda v, says, _: None if complaint(v, says) else "what must not be",
    "required": lambda v, says, _: next((f"no {k}" for k in says if isinstance(v, dict) and k not in v), None),
    "properties": _inside,
    "patternProperties": _inside,
    "additionalProperties": _inside,
    "items": lambda v, says, _: (
        next((c for one in v if (c := complaint(one, says))), None) if type(v) is list else None
    ),
    "prefixItems": lambda v, says, _: next((c for one, s in zip(v, says) if (c := complaint(one, s))), None),
    "minItems": lambda v, says, _: "too short" if isinstance(v, list) and len(v) < says else None,
    "maxItems": lambda v, says, _: "too long" if isinstance(v, list) and len(v) > says else None,
    "minProperties": lambda v, says, _: "too few" if isinstance(v, dict) and len(v) < says else None,
    "minimum": lambda v, says, _: "too small" if isinstance(v, int | float) and v < says else None,
    "maximum": lambda v, says, _: "too large" if isinstance(v, int | float) and v > says else None,
}


def test_every_word_of_the_schema_is_checked_here():
    def words(schema: Any) -> set[str]:
        if not isinstance(schema, dict):
            return set[str]().union(*map(words, schema)) if isinstance(schema, list) else set()
        below = [
            part for key, part in schema.items() if key not in ("properties", "patternProperties", "$defs", "default")
        ]
        named = [part for key in ("properties", "patternProperties", "$defs") for part in schema.get(key, {}).values()]
        return set(schema).union(*map(words, below + named))

    assert words(SCHEMA) <= {*_RULES, "$schema", "$defs", "title", "description", "default"}
    json.dumps(SCHEMA, allow_nan=False)
