"""Mechanisms that installed packages announce as entry points of group `reattend.mechanisms`, loaded when asked for.

In a package's pyproject.toml, one line a mechanism; the value is a module that registers it, or the class itself:

    [project.entry-points."reattend.mechanisms"]
    near = "near_attention:Near"
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, MutableMapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

GROUP = "reattend.mechanisms"
log = logging.getLogger("reattend")
_TRIED: dict[str, str] = {}  # names that were loaded once, and why that failed ("" where it did not)


@cache
def announced() -> Mapping[str, EntryPoint]:
    """The entry points by name; nothing of theirs is imported. Two packages with one name: the first, and a warning."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if point.name in found:
            if point.value != found[point.name].value:
                log.warning("mechanism %r of %s is left out: %s announces that name as well",
                            point.name, _package(point), _package(found[point.name]))  # fmt: skip
            continue
        found[point.name] = point
    return found


def untried() -> tuple[str, ...]:
    """The names announced and not loaded yet."""
    return tuple(name for name in announced() if name not in _TRIED)


def why_not(name: str) -> str:
    """Why the package that announces a name could not be loaded; empty where it could, or where there is none."""
    return _TRIED.get(name, "")


def load(name: str, registry: MutableMapping[str, Any], enter: Callable[[Any], None]) -> None:
    """Import what an entry point names and hand it to `enter`; a broken package is one warning, then as if not there.

    A package may not take a name that is already given: that mechanism stays, and a warning says so.
    """
    point = announced()[name]
    _TRIED[name] = ""  # before it is imported: the package may itself ask what there is
    before = dict(registry)
    try:
        enter(point.load())
        if name not in registry:
            raise LookupError(f"{point.value} registers no {name!r}")
    except Exception as error:  # whatever a stranger's module raises
        _TRIED[name] = f"{type(error).__name__}: {error}"
        log.warning("mechanism %r of %s is left out: %s", name, _package(point), _TRIED[name])
    for slug, cls in before.items():
        if registry.get(slug) is not cls:
            registry[slug] = cls
            log.warning("%s registers %r, which is there already: the first one stays", _package(point), slug)


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value
