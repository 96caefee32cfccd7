"""What tells a call apart from those captured: the arguments that differ, and the way out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .signature import SignatureKey

SHOWN = 4  # values of one argument that a message lists


def said_limit(key: SignatureKey, known: Sequence[SignatureKey], limit: int) -> tuple[str, str]:
    """What was found and what fits, where a call would need one graph more than there may be."""
    found = f"the call {key} would be signature {len(known) + 1} of at most {limit}{_apart(key, known)}"
    return (
        found,
        f"{_way_out(key, known)}call it as one of: {_listed(known)}; or optimize(..., max_signatures={2 * limit})",
    )


def said_frozen(key: SignatureKey, known: Sequence[SignatureKey]) -> tuple[str, str]:
    """The same where no further graph is to be made."""
    return f"the call {key}{_apart(key, known)}", f"call it before freeze(); captured signatures: {_listed(known)}"


def differing(key: SignatureKey, known: SignatureKey) -> dict[str, tuple[str, str]]:
    """Each argument or setting in which two signatures differ, as it stands in the one and the other."""
    ours, theirs = described(key), described(known)
    names = dict.fromkeys((*ours, *theirs))
    return {n: (ours.get(n, "not given"), theirs.get(n, "not given")) for n in names if ours.get(n) != theirs.get(n)}


def described(key: SignatureKey) -> dict[str, str]:
    """Every argument, and every setting by its kind, in words."""
    found: dict[str, str] = {}
    start = 0
    for name, layout in key.arguments:
        tensors = key.tensors[start : start + layout.count]
        found[name] = str(layout) if layout.kind == "value" else ", ".join((*tensors, *_inside(layout)))
        start += layout.count
    for number, text in enumerate(key.setting):
        name, _, value = text.partition("=")
        found[name.strip() if value else ("mode", "weights")[number] if number < 2 else text] = value.strip() or text
    found["batches"] = "one batch" if all(key.together) else f"batches apart {key.together}"
    return found


def _inside(layout: object) -> tuple[str, ...]:
    return () if getattr(layout, "kind", "") == "tensor" else (str(layout),)


def _apart(key: SignatureKey, known: Sequence[SignatureKey]) -> str:
    if not known:
        return ""
    closest = min(known, key=lambda one: len(differing(key, one)))
    parts = [
        f"{name} is {ours}, captured: {_values(name, known)}" for name, (ours, _) in differing(key, closest).items()
    ]
    return f"; {'; '.join(parts)}" if parts else ""


def _values(name: str, known: Iterable[SignatureKey]) -> str:
    values = list(dict.fromkeys(described(one).get(name, "not given") for one in known))
    return ", ".join(values[:SHOWN]) + (f" and {len(values) - SHOWN} more" if len(values) > SHOWN else "")


def _way_out(key: SignatureKey, known: Sequence[SignatureKey]) -> str:
    """A constant that changes from call to call makes a graph each time."""
    constants = {name for name, layout in key.arguments if layout.kind == "value"}
    changing = [
        name for name in constants if len({described(one).get(name) for one in known} | {described(key)[name]}) > 2
    ]
    return f"give {', '.join(sorted(changing))} as a tensor, which one graph serves; " if changing else ""


def _listed(known: Sequence[SignatureKey]) -> str:
    return "; ".join(map(str, known)) or "none"
