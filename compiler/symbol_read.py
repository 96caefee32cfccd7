"""From a Python function to an expression: it is run once, its parameters being symbols asked for by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from .refusal import Refused
from .symbols import READING, Expr, as_expr


def read(function: Callable[..., Any], known: Mapping[str, Expr], *, what: str) -> Expr:
    """Run a predicate or score function on symbols; its parameters are asked for by name, in any order."""
    READING.append([])
    try:
        return as_expr(_called(function, known, what))
    finally:
        READING.pop()


def _called(function: Callable[..., Any], known: Mapping[str, Expr], what: str) -> Any:
    parameters = _parameters(function)
    if parameters is None:  # torch.relu and its like tell no names: they are functions of the first
        return function(next(iter(known.values())))
    unknown = [p for p in parameters if p not in known]
    asked = [p for p in unknown if _has_no_default(function, p)]
    if asked:
        raise Refused(f"{what} asks for {', '.join(asked)}", fits=f"its parameters can be {', '.join(known)}")
    return function(**{p: known[p] for p in parameters if p in known})


def _has_no_default(function: Callable[..., Any], parameter: str) -> bool:
    return inspect.signature(function).parameters[parameter].default is inspect.Parameter.empty


def _parameters(function: Callable[..., Any]) -> list[str] | None:
    """Names of the parameters; from the code where there is one, which torch.compile can trace, unlike inspect."""
    plain = getattr(function, "__func__", function)
    code = getattr(plain, "__code__", None)
    if code is None and hasattr(function, "__self__") and getattr(function, "__text_signature__", None) is None:
        return None  # a builtin that tells nothing: before torch 2.13 torch.compile cannot ask inspect even that
    if code is None or code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS):
        try:
            return list(inspect.signature(function).parameters)
        except ValueError:
            return None
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return list(names if plain is function else names[1:])
