"""Calls run side by side, a capture runs alone: tracing swaps weights and patches modules for the whole process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Many threads inside `beside`, or one inside `alone`; a thread may enter either again from inside."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls: dict[int, int] = {}  # how deep each thread stands in calls
        self._alone = 0  # the thread that captures, and how deep
        self._depth = 0

    @contextmanager
    def beside(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._changed:
            while self._alone not in (0, me):
                self._changed.wait()
            self._calls[me] = self._calls.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._leave(me)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until no other thread is in a call; the calls this thread stands in give way meanwhile."""
        me = threading.get_ident()
        with self._changed:
            mine = self._calls.pop(me, 0)
            self._changed.notify_all()
            while self._alone not in (0, me) or self._calls.keys() - {me}:
                self._changed.wait()
            self._alone, self._depth = me, self._depth + 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._alone = 0
                if mine:
                    self._calls[me] = mine
                self._changed.notify_all()

    def _leave(self, me: int) -> None:
        self._calls[me] -= 1
        if not self._calls[me]:
            del self._calls[me]
            self._changed.notify_all()


TURNS = Turns()  # one for the process, as torch.export's patches are
