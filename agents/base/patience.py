"""Reports a command's wait on standard error after some seconds, and then at growing intervals."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from everstep.elastic.protocol.waiting import FIRST_S, Spoken


class Wait:
    """What a command waits for, one thing after the other. `look` is called again and again meanwhile."""

    def __init__(self, text: str = "") -> None:
        self._text, self._since_s, self._spoken = text, time.monotonic(), Spoken()

    def look(self, text: str | None = None) -> None:
        """The wait continues; `text` describes it and is constant while it lasts. Empty: no wait."""
        if text is not None and text != self._text:
            self._text, self._since_s, self._spoken = text, time.monotonic(), Spoken()
        waited_s = time.monotonic() - self._since_s
        if self._text and self._spoken.due(waited_s):
            say(f"{self._text} (for {waited_s:.0f} s)")


@contextlib.contextmanager
def said(text: str) -> Iterator[None]:
    """During a call that cannot be looked at; it has a time limit of its own, which the text names."""
    timer = threading.Timer(FIRST_S, say, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def say(text: str) -> None:
    print(f"everstep: {text}", file=sys.stderr, flush=True)
