"""Python's garbage collector in a process with very many long-lived objects.

A full collection traverses every object whenever their number has grown by a quarter: with the streams of ten thousand
agents this pauses the coordinator for half a second, in which no agent learns that a generation has ended. So objects
left after a burst are moved to the permanent generation (`gc.freeze`), which is not traversed. Reference counting still
frees them; cycles among them are freed by a rare full collection.
"""

from __future__ import annotations

import gc
import time

SWEEP_S = 3600.0


class LongLived:
    """Moves objects to the permanent generation. Call `look` often."""

    def __init__(self) -> None:
        self._comings = 0
        self._swept_s = time.monotonic()

    def look(self, comings: int) -> None:
        """`comings`: how many events that create such objects have occurred so far."""
        if time.monotonic() - self._swept_s > SWEEP_S:
            gc.unfreeze()
            gc.collect()
            gc.freeze()
            self._swept_s = time.monotonic()
        elif comings != self._comings:
            gc.freeze()
        self._comings = comings
