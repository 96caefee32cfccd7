"""Markup that cannot be broken out of: elements are values of their own, any other text is escaped on its way in."""

from __future__ import annotations

import re
from html import escape

VOID = frozenset({"meta", "input", "img"})
_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9-]*")


class Markup(str):
    """Text that is markup already: made by `el` and `raw` alone."""


def raw(text: str) -> Markup:
    """This package's own files: a style sheet, a script, a picture that it drew."""
    return Markup(text)


def join(parts: object) -> Markup:
    """Several pieces; what is not markup is escaped."""
    each = parts if isinstance(parts, list | tuple) else [parts]
    return Markup("".join(p if isinstance(p, Markup) else escape(str(p)) for p in each if p is not None))


def el(tag: str, *children: object, **attributes: object) -> Markup:
    """An element; attributes of None or False are left out, `class_` and `data_x` are spelt as Python can.

    >>> el("p", "a < b", el("b", "!"), class_="x", title='"')
    '<p class="x" title="&quot;">a &lt; b<b>!</b></p>'
    """
    named = {k.rstrip("_").replace("_", "-"): v for k, v in attributes.items() if v is not None and v is not False}
    assert all(_NAME.fullmatch(name) for name in (tag, *named)), "names of tags and attributes are written here"
    said = "".join(f" {k}" if v is True else f' {k}="{escape(str(v))}"' for k, v in named.items())
    return Markup(f"<{tag}{said}>" if tag in VOID else f"<{tag}{said}>{join(children)}</{tag}>")
