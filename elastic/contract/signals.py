"""Signals that request the end of training: the launcher handles them; a script without it saves and ends.

Schedulers, service managers and terminals send them to every process of a job. A handler that the script has installed
itself is left alone, here and there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from everstep.comms.base.process import (
    NOTICES,
    SAME_S,
    STOPS,
    caught_outside_python,
)

Handler = Callable[[int, FrameType | None], Any]
ALONE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, *NOTICES)  # on which a script that runs alone saves

_handled: dict[int, tuple[Handler, Any]] = {}  # our handlers, and the handlers that they replaced


def leave_to_launcher() -> None:
    """Ignore a signal that the launcher gets too: it has the job saved, and ends this worker in an orderly way.

    It is a handler that does nothing: programs that this one starts would inherit a signal that is ignored.
    """
    names = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "")
    chosen = {signal.Signals[name.strip()] for name in names.split(",") if name.strip() in signal.Signals.__members__}
    _handle({*STOPS, *chosen} - {signal.SIGKILL, signal.SIGSTOP}, lambda number, frame: None)


@contextlib.contextmanager
def saved_on_signals(ask: Callable[[signal.Signals], None]) -> Iterator[None]:
    """For a script without the launcher: the first signal requests a checkpoint and the end, a second ends it."""
    asked_s = 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked_s
        if asked_s and time.monotonic() - asked_s < SAME_S:
            return
        if asked_s:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        asked_s = time.monotonic()
        name = signal.Signals(number).name
        print(f"everstep: {name}: a checkpoint is saved after this step; again: ends at once", file=sys.stderr)
        ask(signal.Signals(number))

    _handle(ALONE, stop)
    try:
        yield
    finally:
        _restore()


def outlive_first_signal() -> None:
    """In a process that fetches data: the job is saved meanwhile, and needs it. A second signal ends it, as its own."""

    def outlive(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)

    for number in STOPS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, outlive)


def _handle(numbers: Any, handler: Handler) -> None:
    """Handle those signals that nothing else does, and that this process was not started to ignore."""
    if threading.current_thread() is not threading.main_thread():
        return  # only there can it be done
    outside = caught_outside_python()
    for number in numbers:
        former = signal.getsignal(number)
        if former in (signal.SIG_DFL, signal.default_int_handler) and number not in outside:
            _handled[number] = handler, former
            signal.signal(number, handler)
            signal.siginterrupt(number, False)  # system calls of libraries are restarted


def _restore() -> None:
    """Remove handlers that the script has not replaced. Also in forked children, so that signals can end them."""
    for number, (handler, former) in _handled.items():
        if signal.getsignal(number) is handler:
            signal.signal(number, former)
    _handled.clear()


_masks = threading.local()


def _hold() -> None:
    """Block signals around a fork: a signal to the child must not run our handler there."""
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, _handled)


def _let_go() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _let_go_in_child() -> None:
    _restore()
    _let_go()


os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_let_go_in_child)
