"""The first process of a container: the kernel makes every orphan its child, and gives it no signal's default action.

So it does only this: the command itself runs in a child. Signals are forwarded to the child, orphans are reaped, and
when the child ends, this process exits with its status; the kernel then kills every other process in the container.
"""

from __future__ import annotations

import contextlib
import os
import signal

from everstep.comms.base.process import STOPS

PASSED_ON = (*STOPS, signal.SIGCONT, signal.SIGWINCH)


def fork_from_init() -> None:
    """Return in a process that is not the first one: this one, or a child of it. The first one does not return."""
    if os.getpid() != 1:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # blocked until the child that they are forwarded to exists
    command = os.fork()
    if command == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        return
    for number in PASSED_ON:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: _pass_on(number, command))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    while True:
        pid, status = os.wait()
        if pid == command:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def _pass_on(number: int, command: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(command, number)
