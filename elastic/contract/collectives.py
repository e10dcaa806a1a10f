"""Warns about the script's own torch.distributed collectives, which cannot complete after the loss of a worker.

A process group has the members it was made with. When one of them is lost, the others wait for it in their next
collective, or get an error of the transport; its replacement waits for them in init_process_group.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

OURS = os.path.join("api", "process_group.py")  # the group that survives losses
SAID_S = 10.0  # in one call, after a worker was lost: worth a warning
STUCK_S = 120.0  # and the end: no peer will come. A script that recreates its group on all ranks needs less
LOOK_S = 0.5
INSTEAD = (
    "a worker was lost, and a process group of torch.distributed cannot continue without it. Use what still works: "
    "run.mean, run.gather, run.reduce, run.broadcast and run.barrier between steps, or collectives of a group by "
    "run.init_process_group(); the loss of a Step of run.steps(...) is the mean of all ranks; run.full_state_dict() "
    "needs no other rank"
)


def group() -> object | None:
    """The script's process group, if it has made one that a loss breaks. Imports nothing."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    found: object = distributed.group.WORLD
    return None if getattr(found, "survives_losses", False) else found


def call_of_main_thread() -> str:
    """The function of torch.distributed that the main thread is in, and its caller; empty if it is in none."""
    ident = threading.main_thread().ident
    return _call(sys._current_frames().get(ident) if ident is not None else None)


def _call(frame: FrameType | None) -> str:
    inside = ""
    folder = os.path.join("torch", "distributed", "")
    while frame is not None:
        code = frame.f_code
        if not inside and code.co_filename.endswith(OURS):
            return ""
        if folder in code.co_filename:
            inside = code.co_name if code.co_name != "wrapper" else inside
        elif inside:
            return f"torch.distributed.{inside} ({os.path.basename(code.co_filename)}, line {frame.f_lineno})"
        frame = frame.f_back
    return ""


def raised_there(error: BaseException) -> bool:
    """Whether an exception came out of a call of torch.distributed."""
    trace = error.__traceback__
    while trace is not None:
        if os.path.join("torch", "distributed", "") in trace.tb_frame.f_code.co_filename:
            return True
        trace = trace.tb_next
    return False


class CollectiveWatch:
    """Checks in a separate thread whether the main thread stays in one such call after a worker was lost."""

    def __init__(self, warn: Callable[[str], None], give_up: Callable[[str], None]) -> None:
        self._warn, self._give_up = warn, give_up
        self._where, self._since_s, self._said = "", 0.0, False

    def start(self, lost: Callable[[], bool]) -> None:
        """A job that never makes a process group pays a look twice a second."""

        def run() -> None:
            while True:
                time.sleep(LOOK_S)
                if self.look(call_of_main_thread() if lost() else "", time.monotonic()):
                    return

        threading.Thread(target=run, name="everstep-collectives", daemon=True).start()

    def look(self, where: str, now: float) -> bool:
        """With the call that the main thread is in; whether it is given up."""
        if not where or where != self._where:
            self._where, self._since_s, self._said = where, now, False
            return False
        waited_s = now - self._since_s
        text = f"the script has waited in {where} for {waited_s:.0f} s: {INSTEAD}"
        if waited_s >= STUCK_S:
            self._give_up(text)
            return True
        if waited_s >= SAID_S and not self._said:
            self._said = True
            self._warn(f"{text}. The job ends after {STUCK_S:g} s")
        return False
