"""What is to happen when the user's script has ended: by its last line, by `sys.exit`, or by an exception.

A worker's script is run by the process that its agent forked, which calls `ended`. For a script that was started by
itself, `atexit` and `sys.excepthook` do.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable
from types import TracebackType

_functions: list[Callable[[BaseException | None], None]] = []


def at_end(function: Callable[[BaseException | None], None]) -> None:
    """Have `function` called once the script has ended, with the exception by which it did, or None."""
    if not _functions:
        sys.excepthook = _uncaught(sys.excepthook)
        atexit.register(_at_exit)
    _functions.append(function)


def ended(error: BaseException | None) -> None:
    """The script has ended. Raises what the functions raise."""
    while _functions:
        _functions.pop()(error)


def _at_exit() -> None:
    """At exit of a script without an exception: an error of the functions is its exit status."""
    try:
        ended(None)
    except SystemExit as end:
        _say(end)
        logging.shutdown()
        sys.stdout.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


Hook = Callable[[type[BaseException], BaseException, TracebackType | None], object]


def _uncaught(before: Hook) -> Hook:
    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        try:
            ended(error)
        except SystemExit as end:
            _say(end)
        else:
            before(kind, error, trace)

    return hook


def _say(end: SystemExit) -> None:
    if isinstance(end.code, str):
        print(end.code, file=sys.stderr, flush=True)
