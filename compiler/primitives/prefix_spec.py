"""The text form of one `prefix`: which monoid, in which direction, where it starts anew."""

from __future__ import annotations

from dataclasses import dataclass

from .spec import Spec

MONOIDS = {"sum": 1, "max": 1, "affine": 2, "softmax": 2}  # and how many tensors an element is made of


@dataclass(frozen=True)
class PrefixSpec(Spec):
    monoid: str
    reverse: bool = False
    documents: str = ""  # table (N,) or (B, N) of ids; a prefix starts anew where they change
