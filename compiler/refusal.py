"""One way to say no: where, what was found, what would fit, in that order."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Refused(ValueError):
    """Something asked for cannot be done; the message names the place, the finding and the way out.

    >>> raise Refused("heads=8, kv_heads=3", where="block.3", fits="heads must be a multiple of kv_heads")
    Traceback (most recent call last):
    ...
    reattend.compiler.refusal.Refused: block.3: heads=8, kv_heads=3: heads must be a multiple of kv_heads
    """

    def __init__(self, found: str, *, where: str = "", fits: str = "") -> None:
        self.found, self.where, self.fits = found, where, fits
        super().__init__(": ".join(part for part in (where, found, fits) if part))

    def at(self, where: str) -> Refused:
        """The same refusal, said from a place further out."""
        return Refused(self.found, where=f"{where}: {self.where}" if self.where else where, fits=self.fits)


class Uncapturable(Refused):
    """A model, or a part of one, that torch.export does not take as it is."""


def nearest(name: str, known: Iterable[str], *, kind: str = "known") -> str:
    """What to say after an unknown name: the nearest known one, then the list.

    >>> nearest("windw", ["softmax", "window"])
    "did you mean 'window'? known: softmax, window"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}{kind}: {', '.join(names) or 'none'}"
