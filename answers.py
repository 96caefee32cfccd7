"""How a command answers: a result, one line about a mistake of the caller (exit 1), or a fault of ours (exit 2)."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import typer
import typer.core
from rich.console import Console

from .compiler.memory import lacks_memory
from .compiler.refusal import Refused


@contextmanager
def answers(*, as_json: bool = False) -> Iterator[None]:
    """User errors become one line and exit code 1; anything else is a fault of ours, exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        yield
    except Refused as refused:
        _refusal(str(refused), as_json=as_json)
    except BrokenPipeError:  # who reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (typer.Exit, KeyboardInterrupt):
        raise
    except OSError as error:
        if error.filename is None:
            _fault(error)
        _refusal(f"{error.filename}: {error.strerror}", as_json=as_json)
    except Exception as fault:
        if lacks_memory(fault):
            _refusal("out of memory: fewer or shorter inputs, or a smaller model", as_json=as_json)
        _fault(fault)


def write(path: Path, text: str) -> None:
    """A file of text; its folder is made where there is none."""
    with suppress(FileExistsError):  # a file stands where the folder would: writing below it says so, by the whole path
        path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


class Commands(typer.core.TyperGroup):
    """A mistake in the words themselves, an unknown option or command, is the caller's too: exit 1, not 2."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _callers():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _callers():
            return super().invoke(ctx)


@contextmanager
def _callers() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # click's UsageError, which newer typers hold in a place of their own
        if hasattr(error, "ctx") and getattr(error, "exit_code", 0) == 2:
            error.exit_code = 1  # type: ignore[attr-defined]
        raise


def _refusal(text: str, *, as_json: bool) -> NoReturn:
    if as_json:
        print(json.dumps({"error": text}))
    else:
        print(f"error: {text}", file=sys.stderr)
    raise typer.Exit(1) from None


def _fault(fault: Exception) -> NoReturn:
    logging.getLogger("reattend").exception("a fault of reattend itself: %s", fault)
    raise typer.Exit(2) from None


def working(says: str, work: Callable[[], Any], *, quiet: bool) -> Any:
    """Run something that can take more than a second, with a spinner on a terminal."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        return work()
    with console.status(says):
        return work()
