"""Located plain data: YAML, JSON or Python containers read into nodes that know where they were written.

Only mappings with text keys, lists, texts, numbers, true/false and null come through. Scalars follow YAML 1.2 (and so
JSON): `1e-3` is a number, `on`, `no` and `12:30` are texts. Tags, duplicate keys, alias bombs, deep nesting: refused.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import yaml
from yaml import events

from .refusal import Refused

MAX_BYTES = 256 * 1024
MAX_NODES = 50_000  # after aliases are expanded
MAX_DEPTH = 24
MAX_KEY = 200

Scalar: TypeAlias = str | int | float | bool | None

_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", "+.inf", ".Inf", ".INF"), math.inf),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}


@dataclass(frozen=True)
class Node:
    """One value with its place: `where` is file:line:column (empty for Python data), `path` the keys on the way."""

    value: Scalar | tuple[Node, ...] | dict[str, Node]
    where: str = ""
    path: str = ""
    key_where: str = ""  # where its key stands, if it has one
    size: int = 1  # nodes it expands to

    @property
    def place(self) -> str:
        return _place(self.where, self.path)

    @property
    def key_place(self) -> str:
        return _place(self.key_where or self.where, self.path)

    def refuse(self, found: str, fits: str = "") -> Refused:
        return Refused(found, where=self.place, fits=fits)

    def plain(self) -> Any:
        """The value as Python containers."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, tuple) else self.value

    def says(self) -> str:
        """What was found here, for a message."""
        if isinstance(self.value, dict):
            return f"a mapping ({', '.join(list(self.value)[:5]) or 'empty'})"
        if isinstance(self.value, tuple):
            return f"a list of {len(self.value)}"
        return _says(self.value)


def resolve(text: str) -> Scalar:
    """What an unquoted YAML scalar means.

    >>> [resolve(text) for text in ("1e-3", "010", "on", "~", "TRUE", "12:30")]
    [0.001, 10, 'on', None, True, '12:30']
    """
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def read_text(text: str, source: str) -> Node:
    """The one document in a YAML or JSON text."""
    if len(text) > MAX_BYTES:  # characters are at least bytes; files are measured before they are decoded
        raise Refused(f"more than {MAX_BYTES // 1024} KiB", where=source, fits="a recipe is a page, not data")
    if text.lstrip().startswith("{"):  # JSON may be indented by tabs, and has none inside its strings
        text = text.replace("\t", " ")
    try:
        return _Reader(text, source).document()
    except yaml.YAMLError as error:
        raise _syntax(error, text, source) from None


def read_bytes(data: bytes, source: str) -> Node:
    """The same from a file's bytes: UTF-8 only."""
    if len(data) > MAX_BYTES:
        raise Refused(f"more than {MAX_BYTES // 1024} KiB", where=source, fits="a recipe is a page, not data")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        place = f"{source}:{before.count(10) + 1}:{error.start - before.rfind(10)}"
        found = f"byte 0x{data[error.start]:02x} is not UTF-8 text"
        raise Refused(found, where=place, fits="a recipe is a YAML or JSON text file") from None
    return read_text(text, source)


def read_python(value: object) -> Node:
    """Python mappings, lists and numbers as the same nodes; their place is the way through the keys."""
    return _Walk().node(value, "", 0)


class _Count:
    """How many values were read, aliases and shared containers expanded."""

    def __init__(self) -> None:
        self.nodes = 0

    def add(self, count: int, here: Node) -> None:
        self.nodes += count
        if self.nodes > MAX_NODES:
            raise here.refuse(f"more than {MAX_NODES} values (aliases expanded)", "a recipe is a page, not data")


class _Walk(_Count):
    """Reads Python containers."""

    def node(self, value: object, path: str, depth: int) -> Node:
        here = Node(None, path=path)
        self.add(1, here)
        _not_deep(depth, here)
        if isinstance(value, Mapping):
            table: dict[str, Node] = {}
            for key, item in value.items():
                table[_key(key, here)] = self.node(item, _join(path, str(key)), depth + 1)
            return Node(table, path=path)
        if isinstance(value, list | tuple):
            return Node(tuple(self.node(item, f"{path}[{n}]", depth + 1) for n, item in enumerate(value)), path=path)
        return Node(_scalar(value, here), path=path)


class _Reader(_Count):
    """Builds nodes from parser events, so that depth, size, tags and aliases are judged before anything is built."""

    def __init__(self, text: str, source: str) -> None:
        super().__init__()
        self.source = source
        self.parser: Any = yaml.SafeLoader(text)
        self.anchors: dict[str, Node | None] = {}  # None while the anchored node is being read

    def document(self) -> Node:
        self.next()  # stream start
        if self.parser.check_event(events.StreamEndEvent):
            return Node(None, where=f"{self.source}:1:1")
        self.next()  # document start
        node = self.node("", 0)
        self.next()  # document end
        if not self.parser.check_event(events.StreamEndEvent):
            raise Refused("a second document (---)", where=self.at(self.parser.peek_event()), fits="one recipe a file")
        return node

    def node(self, path: str, depth: int, key_where: str = "") -> Node:
        event = self.next()
        here = Node(None, where=self.at(event), path=path, key_where=key_where)
        if isinstance(event, events.AliasEvent):
            return self.alias(str(event.anchor), here)
        if event.tag is not None:
            raise here.refuse(f"tag {event.tag!r}", "a recipe holds plain data and builds no objects: leave tags away")
        _not_deep(depth, here)
        self.add(1, here)
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        node = self.content(event, here, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def content(self, event: Any, here: Node, depth: int) -> Node:
        if isinstance(event, events.ScalarEvent):
            value = self.scalar(event, here)
            return Node(value, here.where, here.path, here.key_where)
        if isinstance(event, events.SequenceStartEvent):
            return self.sequence(here, depth)
        return self.mapping(here, depth)

    def sequence(self, here: Node, depth: int) -> Node:
        items: list[Node] = []
        while not self.parser.check_event(events.SequenceEndEvent):
            items.append(self.node(f"{here.path}[{len(items)}]", depth + 1))
        self.next()
        return _sized(Node(tuple(items), here.where, here.path, here.key_where), items)

    def mapping(self, here: Node, depth: int) -> Node:
        table: dict[str, Node] = {}
        while not self.parser.check_event(events.MappingEndEvent):
            key_node = self.node(here.path, depth + 1)
            key = _key(key_node.value, key_node)
            if key in table:
                raise key_node.refuse(f"key {key!r} stands here twice", f"first at {table[key].key_where}")
            if key == "<<":
                raise key_node.refuse("merge key '<<'", "name other recipes with `include: [other.yaml]`")
            table[key] = self.node(_join(here.path, key), depth + 1, key_node.where)
        self.next()
        return _sized(Node(table, here.where, here.path, here.key_where), table.values())

    def scalar(self, event: Any, here: Node) -> Scalar:
        if event.style is not None:
            return _scalar(event.value, here)
        try:
            value = resolve(event.value)
        except ValueError:  # Python refuses to read thousands of digits
            raise here.refuse(f"a number of {len(event.value)} digits") from None
        if isinstance(value, float) and math.isinf(value) and "inf" not in event.value.lower():
            raise here.refuse(f"{event.value} is larger than any float64")
        return _scalar(value, here)

    def alias(self, name: str, here: Node) -> Node:
        if name not in self.anchors:
            raise here.refuse(f"alias *{name} without an anchor &{name} before it")
        node = self.anchors[name]
        if node is None:
            raise here.refuse(f"alias *{name} stands inside its own anchor", "a recipe does not hold itself")
        self.add(node.size, here)
        return replace(node, where=here.where, path=here.path, key_where=here.key_where)

    def next(self) -> Any:
        return self.parser.get_event()

    def at(self, event: Any) -> str:
        return f"{self.source}:{event.start_mark.line + 1}:{event.start_mark.column + 1}"


def _sized(node: Node, items: Iterable[Node]) -> Node:
    return replace(node, size=1 + sum(item.size for item in items))


def _not_deep(depth: int, here: Node) -> None:
    if depth > MAX_DEPTH:
        raise here.refuse(f"nested deeper than {MAX_DEPTH}", "a recipe is flat and does not hold itself")


def _place(where: str, path: str) -> str:
    path = path if len(path) <= MAX_KEY else f"{path[:60]}..."
    return f"{where}: {path}" if where and path else where or path


def _join(path: str, key: str) -> str:
    key = key if re.fullmatch(r"[\w-]+", key) else repr(key[:MAX_KEY])
    return f"{path}.{key}" if path else key


def _key(key: object, here: Node) -> str:
    if not isinstance(key, str):
        said = "a list or mapping" if isinstance(key, tuple | dict) else _says(key)
        hint = f'write it in quotes: "{key}"' if isinstance(key, int | float) else "keys are texts"
        raise here.refuse(f"key {said} is no text", hint)
    if len(key) > MAX_KEY:
        raise here.refuse(f"key {key[:20]!r}... of {len(key)} characters", f"at most {MAX_KEY}")
    return str(_scalar(key, here))


def _scalar(value: object, here: Node) -> Scalar:
    """A plain scalar: numpy's numbers become Python's, surrogate pairs (JSON escapes) one character."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, here)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        if math.isnan(number):
            raise here.refuse("not a number (nan)")
        return number
    fits = "a recipe holds texts, numbers, true/false, null, lists and mappings"
    raise here.refuse(f"a {type(value).__name__}", fits)


def _text(value: str, here: Node) -> str:
    try:
        return value.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise here.refuse("half of a surrogate pair in a text", "write the character itself") from None


def _says(value: object) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, str | int | float) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


_SAID = (  # what PyYAML calls it, what it is
    ("cannot start any token", "a character that cannot stand here"),
    ("mapping values are not allowed", "a second ':' on this line, or a wrong indentation"),
    ("could not find expected ':'", "a key without ':'"),
    ("found undefined alias", "an alias without its anchor"),
    ("undefined tag handle", "a tag: a recipe holds plain data only"),
    ("found unexpected end of stream", "the file ends inside a quoted text"),
    ("found duplicate", "a directive twice"),
    ("expected <block end>", "wrong indentation"),
    ("expected '<document start>'", "a second document; one recipe a file"),
)


def _syntax(error: yaml.YAMLError, text: str, source: str) -> Refused:
    """PyYAML's complaint in our words, with its place."""
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - before.rfind("\n")
        found = f"character U+{ord(text[error.position]):04X}"
        return Refused(found, where=f"{source}:{line}:{column}", fits="a recipe is a YAML or JSON text file")
    mark, problem = getattr(error, "problem_mark", None), str(getattr(error, "problem", None) or error)
    where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
    line_text = text.split("\n")[mark.line] if mark and mark.line < text.count("\n") + 1 else ""
    if "\t" in line_text[: len(line_text) - len(line_text.lstrip())] or "found character '\\t'" in problem:
        return Refused("a tab", where=where, fits="YAML is indented by spaces")
    opened = getattr(error, "context_mark", None)
    since = f" (in what opens at {opened.line + 1}:{opened.column + 1})" if opened else ""
    if mark and not text[mark.index :].strip():
        return Refused(f"the file ends too early{since}", where=where, fits="close what was opened")
    said = next((ours for theirs, ours in _SAID if theirs in problem), problem)
    return Refused(f"not YAML: {said}{since}", where=where, fits=repr(line_text.strip()[:60]) if line_text else "")
