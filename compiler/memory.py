"""Memory that a rewrite asks for and that is not there: said as a refusal, with the mechanism's knobs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .mechanism import Mechanism
from .refusal import Refused

# torch on a processor: no more bytes; a size whose bytes, or elements, no int64 counts
_SAYS = ("can't allocate memory", "Storage size calculation overflowed", "integer multiplication overflow")


def lacks_memory(fault: BaseException) -> bool:
    """Python's own error, a GPU's, or what torch says on a processor."""
    return isinstance(fault, MemoryError | torch.OutOfMemoryError) or any(said in str(fault) for said in _SAYS)


@contextmanager
def room_for(mechanism: Mechanism, where: str) -> Iterator[None]:
    """Where a mechanism's tensors are made or its forward runs; what is too large is refused at its site.

    >>> from .mechanism import mechanism
    >>> with room_for(mechanism("window"), "block.3"):
    ...     torch.empty(2**62)
    Traceback (most recent call last):
    ...
    reattend.compiler.refusal.Refused: block.3: window(window=1024, sinks=4) asks for more memory than there is: \
smaller knobs, or fewer or shorter inputs
    """
    try:
        yield
    except (MemoryError, RuntimeError) as fault:
        if not lacks_memory(fault):
            raise
        found = f"{mechanism.slug}({repr(mechanism).partition('(')[2]} asks for more memory than there is"
        raise Refused(found, where=where, fits="smaller knobs, or fewer or shorter inputs") from fault
