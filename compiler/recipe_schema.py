"""The recipe as JSON Schema (2020-12), so that an editor completes and checks it: read from the same declarations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from .knob_types import knob_type, thaw
from .recipe import TARGETS, VERSIONS
from .recipe_load import SECTIONS
from .selectors import KEYS
from .site import FEATURES, PATTERNS
from .vocabulary import KEY_PARTS, SITE_KEYS, MechanismFacts, Vocabulary

_HEADS = r"^(rest|\s*\d{1,4}(-\d{1,4})?\s*(,\s*\d{1,4}(-\d{1,4})?\s*)*)$"
_TEXTS: Mapping[str, Any] = {"type": "array", "items": {"type": "string"}}


def json_schema(vocabulary: Vocabulary) -> dict[str, Any]:
    """The schema of every recipe that may name the mechanisms of a vocabulary."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "reattend recipe",
        "type": "object",
        "properties": {
            "version": {"enum": list(VERSIONS)},
            "model": {"type": "object", "description": "guard: the recipe is for a model with these facts only"},
            "include": {**_TEXTS, "description": "recipes whose rules come after these"},
            "sites": {"type": "array", "items": {"$ref": "#/$defs/rule"}},
            "passes": {"type": "array", "items": {"$ref": "#/$defs/passes"}},
            "quantize": _quantize(),
            "target": {"enum": list(TARGETS)},
            **{key: _section(section) for key, section in SECTIONS.items()},
        },
        "required": ["version"],
        "additionalProperties": False,
        "$defs": {
            "match": _match(),
            "rule": _rule(),
            "split": _split(),
            "core": _choice(vocabulary, "attention", core=True),
            **{key: _choice(vocabulary, key) for key in KEY_PARTS},
        },
    }


def _rule() -> dict[str, Any]:
    wishes = {key: {"$ref": f"#/$defs/{key}"} for key in SITE_KEYS}
    split = {"split": {"$ref": "#/$defs/split"}}
    return {
        "type": "object",
        "properties": {
            "match": {"$ref": "#/$defs/match"},
            **wishes,
            "attention": {"anyOf": [wishes["attention"], _object(split, required=["split"])]},
            **split,
            "drop": {"type": "array", "items": {"enum": list(FEATURES)}},
        },
        "required": ["match"],
        "anyOf": [{"required": [key]} for key in (*SITE_KEYS, "split")],
        "not": {"required": ["attention", "split"]},
        "additionalProperties": False,
    }


def _match() -> dict[str, Any]:
    halves = dict.fromkeys(half for pattern in PATTERNS for half in pattern.split("-"))
    words: dict[str, Any] = {
        "kind": {"enum": [*PATTERNS, *halves]},
        "has": {"enum": list(FEATURES)},
        "without": {"enum": list(FEATURES)},
        "path": {"type": "string"},
        "part": {"type": "string"},
    }
    places = {
        key: {**_one_or_more(words.get(key, {"type": ["string", "integer"]})), "description": KEYS[key]} for key in KEYS
    }
    return {"anyOf": [{"type": "string", "description": KEYS["path"]}, {**_object(places), "minProperties": 1}]}


def _split() -> dict[str, Any]:
    return {
        "type": "object",
        "patternProperties": {_HEADS: {"$ref": "#/$defs/core"}},
        "additionalProperties": False,
        "minProperties": 1,
    }


def _quantize() -> dict[str, Any]:
    scheme = {"$ref": "#/$defs/quantize"}
    return {"anyOf": [scheme, {"type": "object", "additionalProperties": scheme, "description": "path glob: scheme"}]}


def _choice(vocabulary: Vocabulary, key: str, core: bool = False) -> dict[str, Any]:
    """`keep`, a name, or a name with knobs."""
    found = {name: facts for name, facts in vocabulary.fitting(key).items() if not core or facts.part == "core"}
    bare = [name for name, facts in found.items() if not _required(facts)]
    names = bare if key == "passes" else ["keep", *bare]
    options = [_object({name: _mechanism(facts)}, required=[name]) for name, facts in found.items()]
    return {"anyOf": [{"enum": names}, *options]} if names else {"anyOf": options} if options else {"not": {}}


def _mechanism(facts: MechanismFacts) -> dict[str, Any]:
    knobs = {}
    for name, knob in facts.knobs.items():
        default = {} if knob.default is MISSING else {"default": thaw(knob.default)}
        knobs[name] = {**knob_type(knob.type).schema(), **default, **({"description": knob.doc} if knob.doc else {})}
    required = _required(facts)
    table = _object(knobs, required=required)
    table = table if required else {**table, "type": ["object", "null"]}
    return {**table, "description": facts.doc} if facts.doc else table


def _required(facts: MechanismFacts) -> list[str]:
    return [name for name, knob in facts.knobs.items() if knob.default is MISSING]


def _section(section: type) -> dict[str, Any]:
    found = {}
    for f in fields(section):
        limits = {"minimum": f.metadata.get("least"), "maximum": f.metadata.get("most")}
        found[f.metadata.get("key", f.name)] = {
            **knob_type(f.metadata.get("type", f.type)).schema(),
            **{name: limit for name, limit in limits.items() if limit is not None},
            "description": f.metadata["doc"],
            "default": f.default,
        }
    return _object(found)


def _one_or_more(one: Mapping[str, Any]) -> dict[str, Any]:
    return {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}


def _object(properties: Mapping[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    needed = {"required": required} if required else {}
    return {"type": "object", "properties": dict(properties), **needed, "additionalProperties": False}
