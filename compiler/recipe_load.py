"""Reading a recipe: a file, a shipped name or a mechanism's, text, a dict; every mistake is named with its place.

    recipe = load_recipe("recipe.yaml", vocabulary)

`include` names further recipes: their rules and passes come after one's own, their settings fill in what is left out.
"""

from __future__ import annotations

import difflib
import importlib.resources
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from .knob_types import Misfit, freeze, knob_type
from .path_glob import glob
from .recipe import (
    FACTS,
    KEEP,
    TARGETS,
    VERSIONS,
    Choice,
    Data,
    Keep,
    Recipe,
    Recover,
    Rule,
    Split,
    Verify,
    Wish,
    head_numbers,
)
from .recipe_yaml import MAX_BYTES, Node, read_bytes, read_python, read_text
from .refusal import Refused, nearest
from .selectors import KEYS as MATCH_KEYS
from .selectors import Selector, selector
from .site import FEATURES
from .vocabulary import SITE_KEYS, Vocabulary

MAX_INCLUDE_DEPTH = 8
MAX_INCLUDES = 64
SECTIONS: Mapping[str, type] = {"data": Data, "verify": Verify, "recover": Recover}
KEYS = ("version", "model", "data", "include", "sites", "passes", "quantize", "verify", "recover", "target")
RULE_KEYS = ("match", *SITE_KEYS, "split", "drop")

Section = TypeVar("Section")


def load_recipe(
    source: str | Path | Mapping[str, Any] | Recipe, vocabulary: Vocabulary, *, alone: bool = False
) -> Recipe:
    """The recipe of a path, a shipped name ("exact"), a mechanism's ("w8"), YAML or JSON text (with a newline) or dict.

    Refused: what the vocabulary does not know, what is not a recipe, what is not plain data; `alone`: other files too.
    """
    if isinstance(source, Recipe):
        again = load_recipe(source.to_dict(), vocabulary)
        return source if again == source else again
    if isinstance(source, Mapping):
        return _Loader(vocabulary).read(read_python(source), "", Path())
    if isinstance(source, str) and ("\n" in source or source.lstrip().startswith("{")):
        return _Loader(vocabulary).read(read_text(source, "recipe"), "recipe", Path())
    if not isinstance(source, str | Path):
        raise Refused(f"a recipe given as {type(source).__name__}", fits="a path, a shipped name, YAML text or a dict")
    name = str(source)
    if name in vocabulary.mechanisms and name not in shipped() and not Path(name).is_file():
        return replace(everywhere(name, vocabulary), source=name)
    return _Loader(vocabulary, alone).open(_locate(source, Path(), vocabulary.mechanisms))


def everywhere(name: str, vocabulary: Vocabulary, knobs: Mapping[str, Any] = {}) -> Recipe:
    """The recipe of one mechanism wherever its part belongs: at every site, in every layer, or of the whole model."""
    choice, key = {name: dict(knobs)}, vocabulary.key_of(name)
    wanted = {"passes": [choice], "quantize": {"*": choice}}.get(key, [{"match": "*", key: choice}])
    section = key if key in ("passes", "quantize") else "sites"
    return load_recipe({"version": 1, section: wanted}, vocabulary)


def shipped() -> tuple[str, ...]:
    """The names of the recipes that come with the package."""
    return tuple(sorted(path.stem for path in _shipped_folder().glob("*.yaml")))


@dataclass
class _Loader:
    """One reading: the vocabulary, and the files read so far."""

    vocabulary: Vocabulary
    alone: bool = False

    def __post_init__(self) -> None:
        self.opening: list[Path] = []
        self.opened: set[Path] = set()

    def open(self, path: Path) -> Recipe:
        source = f"recipes/{path.name}" if path.parent == _shipped_folder() else str(path)
        node = read_bytes(_bytes(path), source)
        self.opening.append(path.resolve())
        self.opened.add(path.resolve())
        recipe = self.read(node, source, path.parent)
        self.opening.pop()
        return recipe

    def read(self, node: Node, source: str, folder: Path) -> Recipe:
        if node.value is None or node.value == {}:
            return Recipe(source=source)
        table = _table(node, KEYS, "a recipe")
        _version(table, node)
        own = Recipe(
            model=_model(table["model"]) if "model" in table else (),
            data=_section(Data, table.get("data")) or Data(),
            rules=tuple(self.rule(item) for item in _items(table.get("sites"))),
            passes=tuple(self.whole(item) for item in _items(table.get("passes"))),
            quantize=self.quantize(table["quantize"]) if "quantize" in table else (),
            verify=_section(Verify, table.get("verify")) or Verify(),
            recover=_section(Recover, table.get("recover")),
            target=_target(table["target"]) if "target" in table else "auto",
            source=source,
        )
        for item in _items(table.get("include")):
            own = _merged(own, self.include(item, folder), item)
        return own

    def include(self, item: Node, folder: Path) -> Recipe:
        if not isinstance(item.value, str):
            raise item.refuse(item.says(), "expected a path beside this file or a shipped name")
        if self.alone:
            raise item.refuse(f"include {item.value!r}", "a recipe in one file")
        try:
            path = _locate(item.value, folder)
        except Refused as refusal:
            raise refusal.at(item.place) from None
        if path.resolve() in self.opening:
            circle = " -> ".join(one.name for one in [*self.opening, path])
            raise item.refuse(f"include goes in a circle: {circle}")
        if len(self.opening) >= MAX_INCLUDE_DEPTH or len(self.opened) >= MAX_INCLUDES:
            raise item.refuse("too many includes", f"at most {MAX_INCLUDES}, {MAX_INCLUDE_DEPTH} deep")
        if path.resolve() in self.opened:  # asked for twice, on different ways: its rules are there already
            return Recipe()
        recipe = self.open(path)
        return replace(recipe, data=_beside(recipe.data, Path(item.value).parent))

    def rule(self, node: Node) -> Rule:
        table = _table(node, RULE_KEYS, "a rule")
        if "match" not in table:
            raise node.refuse("a rule without `match`", 'match: "*" means every site')
        if "split" in table and "attention" in table:
            raise _at_key(table["split"], "attention and split at once", "a split is what attention becomes")
        wishes = {key: self.wish(key, table[key]) for key in SITE_KEYS if key in table}
        if "split" in table:
            wishes = {"attention": self.split(table["split"]), **wishes}
        if not wishes:
            raise node.refuse("a rule that decides nothing", f"add one of {', '.join(SITE_KEYS)}, split")
        where = node.where.rpartition(":")[0] or node.path
        return Rule(_selector(table["match"]), tuple(wishes.items()), _drop(table.get("drop")), where)

    def wish(self, key: str, node: Node) -> Wish:
        if isinstance(node.value, dict) and list(node.value) == ["split"]:
            if key != "attention":
                raise node.refuse(f"split under {key}", "only attention is split over heads")
            return self.split(node.value["split"])
        return self.choice(key, node)

    def split(self, node: Node) -> Split:
        if not isinstance(node.value, dict) or not node.value:
            raise node.refuse(node.says(), 'expected {"0-3": window, rest: keep}')
        parts, taken = [], set[int]()
        for text, item in node.value.items():
            heads = _located(item, lambda text=text: head_numbers(text) if text != "rest" else set())  # type: ignore[misc]
            if heads & taken:
                raise _at_key(item, f"heads {sorted(heads & taken)[:8]} twice", "each head stands in one part")
            taken |= heads
            parts.append(
                (min(heads, default=1 << 20), text.replace(" ", ""), self.choice("attention", item, core=True))
            )
        return Split(tuple((text, choice) for _, text, choice in sorted(parts, key=lambda part: part[0])))

    def whole(self, node: Node) -> Choice:
        choice = self.choice("passes", node)
        if isinstance(choice, Keep):
            raise node.refuse("keep", "a pass that is not wanted is not listed")
        return choice

    def quantize(self, node: Node) -> tuple[tuple[str, Choice | Keep], ...]:
        if not isinstance(node.value, dict):
            return (("*", self.choice("quantize", node)),)
        found: list[tuple[str, Choice | Keep]] = []
        for pattern, item in node.value.items():
            if found and found[-1][0] in ("*", "**"):
                raise _at_key(item, f"{pattern!r} stands after '*', which takes everything", "move it up")
            _located(item, lambda pattern=pattern: glob(pattern))  # type: ignore[misc]
            found.append((pattern, self.choice("quantize", item)))
        return tuple(found)

    def choice(self, key: str, node: Node, core: bool = False) -> Choice | Keep:
        """`keep`, `window`, `{window: {}}` or `{window: {window: 64}}`."""
        value = node.value
        if value == "keep":
            return KEEP
        if isinstance(value, dict) and len(value) == 1:
            name, knobs = next(iter(value.items()))
        elif isinstance(value, str):
            name, knobs = value, replace(node, value={})
        else:
            raise node.refuse(node.says(), "expected keep, a mechanism, or {mechanism: {knob: value}}")
        facts = self.vocabulary.fitting(key).get(name)
        if facts is None or (core and facts.part != "core"):
            raise self.unknown(key, name, node if isinstance(value, str) else knobs)
        if knobs.value is None:  # `window:` with nothing behind it
            knobs = replace(knobs, value={})
        choice = Choice(name, _knobs(knobs, name, facts.knobs))
        make = facts.make
        if make is not None:
            _located(knobs, lambda: make(**choice.settings))
        return choice

    def unknown(self, key: str, name: str, node: Node) -> Refused:
        place = node.key_place if isinstance(node.value, dict) else node.place
        home = self.vocabulary.key_of(name)
        if home and home != key:
            part = self.vocabulary.mechanisms[name].part
            an = "an" if part[0] in "aeiou" else "a"
            return Refused(f"{name!r} is {an} {part} mechanism", where=place, fits=f"it stands under `{home}`")
        if home:
            return Refused(f"{name!r} is no core mechanism", where=place, fits="only cores are split over heads")
        kind = f"{key} takes keep or"
        return Refused(f"mechanism {name!r}", where=place, fits=nearest(name, self.vocabulary.fitting(key), kind=kind))


def _knobs(node: Node, name: str, known: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    if not isinstance(node.value, dict):
        raise node.refuse(node.says(), f"expected a mapping of {', '.join(known)}" if known else f"{name} has no knobs")
    found = {}
    for knob, item in node.value.items():
        if knob not in known:
            raise _at_key(item, f"knob {knob!r}", nearest(knob, known, kind=f"knobs of {name}"))
        found[knob] = _admitted(item, known[knob].type)
    missing = [knob for knob, facts in known.items() if facts.default is MISSING and knob not in found]
    if missing:
        raise node.refuse(f"{name} without {', '.join(missing)}", f"write {{{name}: {{{missing[0]}: ...}}}}")
    return tuple(sorted(found.items()))


def _admitted(node: Node, annotation: object) -> Any:
    kind = knob_type(annotation)
    try:
        return kind.admit(node.plain())
    except Misfit:
        raise node.refuse(f"found {node.says()}", f"expected {kind.says}") from None


def _section(cls: type[Section], node: Node | None) -> Section | None:
    """A section whose keys are the fields of a dataclass."""
    if node is None or node.value is None:
        return None
    known = {f.metadata.get("key", f.name): f for f in fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, item in _table(node, tuple(known), f"`{node.path}`").items():
        f = known[key]
        value = _admitted(item, f.metadata.get("type", f.type))
        least, most = f.metadata.get("least"), f.metadata.get("most")
        if value is not None and ((least is not None and value < least) or (most is not None and value > most)):
            raise item.refuse(
                f"found {value}", f"expected at least {least}" + (f", at most {most}" if most is not None else "")
            )
        values[f.name] = value
    return cls(**values)


def _model(node: Node) -> tuple[tuple[str, Any], ...]:
    if not isinstance(node.value, dict):
        raise node.refuse(node.says(), "expected facts, like {type: llama, layers: 32}")
    for name, item in node.value.items():
        if name not in FACTS:
            raise _at_key(item, f"fact {name!r}", nearest(name, FACTS, kind="facts of a model"))
        several = item.value if isinstance(item.value, tuple) else (item,)
        if not several or any(isinstance(one.value, tuple | dict) or one.value is None for one in several):
            raise item.refuse(item.says(), "expected a text, a number, or a list of those, any of which may hold")
    return tuple(sorted((key, freeze(item.plain())) for key, item in node.value.items()))


def _selector(node: Node) -> Selector:
    if isinstance(node.value, str):
        return _located(node, lambda: selector(str(node.value)))
    if not isinstance(node.value, dict) or not node.value:
        raise node.refuse(f"match is {node.says()}", 'expected "*", a path, or {layer: "2-31", kind: causal-self}')
    for key, item in _table(node, tuple(MATCH_KEYS), "a match").items():
        _located(item, lambda key=key, item=item: selector({key: item.plain()}))  # type: ignore[misc]
    return selector(node.plain())


def _drop(node: Node | None) -> frozenset[str]:
    found = set()
    for item in _items(node):
        if item.value not in FEATURES:
            raise item.refuse(f"feature {item.says()}", nearest(str(item.value), FEATURES, kind="features"))
        found.add(str(item.value))
    return frozenset(found)


def _target(node: Node) -> str:
    if node.value not in TARGETS:
        raise node.refuse(f"target {node.says()}", nearest(str(node.value), TARGETS, kind="targets"))
    return str(node.value)


def _version(table: Mapping[str, Node], node: Node) -> None:
    known = ", ".join(map(str, VERSIONS))
    if "version" not in table:
        raise Refused(
            "a recipe without version",
            where=node.where or node.path or "recipe",
            fits=f"write `version: {VERSIONS[-1]}`",
        )
    if isinstance(table["version"].value, bool) or table["version"].value not in VERSIONS:
        raise table["version"].refuse(f"found {table['version'].says()}", f"known versions: {known}")


def _table(node: Node, known: tuple[str, ...], what: str) -> dict[str, Node]:
    if not isinstance(node.value, dict):
        raise Refused(
            f"{what} is {node.says()}", where=node.place or "recipe", fits=f"expected a mapping of {', '.join(known)}"
        )
    for key, item in node.value.items():
        if key not in known:
            raise _at_key(item, f"key {key!r}", nearest(key, known, kind=f"{what} takes"))
    return node.value


def _items(node: Node | None) -> tuple[Node, ...]:
    if node is None or node.value is None:
        return ()
    if not isinstance(node.value, tuple):
        raise node.refuse(node.says(), f"expected a list: `{node.path.rpartition('.')[2]}: [...]`")
    return node.value


Found = TypeVar("Found")


def _located(node: Node, read: Callable[[], Found]) -> Found:
    """What `read` gives; what it refuses is said with the node's place."""
    try:
        return read()
    except Refused as refusal:
        raise refusal.at(node.place) from None


def _at_key(node: Node, found: str, fits: str) -> Refused:
    return Refused(found, where=node.key_place, fits=fits)


def _merged(own: Recipe, other: Recipe, item: Node) -> Recipe:
    """One's own wishes first; settings of the other where one's own say nothing; both guards hold."""
    for name, value in other.model:
        if dict(own.model).get(name, value) != value:
            raise item.refuse(f"its guard says {name} {value!r}, here it is {dict(own.model)[name]!r}")
    closed = any(pattern in ("*", "**") for pattern, _ in own.quantize)
    written = {pattern for pattern, _ in own.quantize}
    more = () if closed else tuple(pair for pair in other.quantize if pair[0] not in written)
    return replace(
        own,
        model=tuple(sorted({**dict(other.model), **dict(own.model)}.items())),
        data=_filled(own.data, other.data),
        rules=own.rules + other.rules,
        passes=own.passes + other.passes,
        quantize=own.quantize + more,
        verify=_filled(own.verify, other.verify),
        recover=_filled(own.recover, other.recover) if own.recover and other.recover else own.recover or other.recover,
        target=other.target if own.target == "auto" else own.target,
    )


def _filled(own: Section, other: Section) -> Section:
    defaults = {f.name: f.default for f in fields(own)}  # type: ignore[arg-type]
    taken = {name: getattr(other, name) for name, default in defaults.items() if getattr(own, name) == default}
    return replace(own, **taken)  # type: ignore[type-var]


def _beside(data: Data, folder: Path) -> Data:
    """An included recipe's files, as seen from the one that includes it."""

    def seen(file: str | None) -> str | None:
        return (folder / file).as_posix() if file else file

    return replace(data, calibrate=seen(data.calibrate), verify=seen(data.verify))


def _locate(source: str | Path, folder: Path, mechanisms: Iterable[str] = ()) -> Path:
    """The file of a path (beside `folder`), or of a shipped name; `mechanisms` are names that would do as well."""
    text = str(source)
    if re.fullmatch(r"[A-Za-z][\w-]*", text) and text in shipped():
        return _shipped_folder() / f"{text}.yaml"
    try:
        path = folder / source
        if path.is_file():
            return path
        found = "is a folder" if path.is_dir() else "no regular file" if path.exists() else "no such file"
    except (OSError, ValueError):  # a name too long, a NUL in it
        found = "no file name"
    beside = sorted(p.name for p in path.parent.glob("[!.]*.y*ml"))[:20] if found == "no such file" else []
    near = difflib.get_close_matches(text, sorted(mechanisms), n=1)
    hint = nearest(text, {*shipped(), *beside, *near}, kind="recipes")
    raise Refused(
        found if text else "an empty text", where=text[:200] or "recipe", fits=f"{hint}; a YAML text holds a newline"
    )


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise Refused(str(error.strerror), where=str(path), fits="a readable file") from None


def _shipped_folder() -> Path:
    package = __package__.rpartition(".")[0]
    return Path(str(importlib.resources.files(package))) / "recipes"
