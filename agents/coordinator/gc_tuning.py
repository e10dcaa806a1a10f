"""Python's garbage collector in a process of very many objects that stay.

It looks at every object there is whenever a quarter more have come: with the streams of ten thousand agents half a
second, in which nobody is told anything, and least of all that a generation is over. So what a rush has left behind is
set aside, where it is not looked at; an object there that nothing refers to any more is freed like any other, and the
cycles among them when everything is looked at, once in a long while.
"""

from __future__ import annotations

import gc
import time

SWEEP_S = 3600.0


class LongLived:
    """Sets objects aside. `look` is to be called often."""

    def __init__(self) -> None:
        self._comings = 0
        self._swept_s = time.monotonic()

    def look(self, comings: int) -> None:
        """`comings`: how many have come so far of whatever brings such objects along."""
        if time.monotonic() - self._swept_s > SWEEP_S:
            gc.unfreeze()
            gc.collect()
            gc.freeze()
            self._swept_s = time.monotonic()
        elif comings != self._comings:
            gc.freeze()
        self._comings = comings
