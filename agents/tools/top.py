"""`everstep top`: a live view of a job in a terminal. It survives coordinator failures and follows the leader."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live

from everstep.comms.base.security import Security

from .client import Endpoints, NoAnswer
from .live_view import dials
from .status import ENDPOINT, told

STEPS = 300
EVERY_S = 1.0
ANSWER_S = 2.0


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """End quietly, like every other command, when the reader of the pipe closes it."""
        raise BrokenPipeError


def top(arguments: Sequence[str]) -> int:
    """Show the job at an endpoint until `q`; returns the exit status."""
    parse = argparse.ArgumentParser(prog="everstep top", description="A job in a terminal, live. q ends it.")
    parse.add_argument("endpoint", **ENDPOINT)
    parse.add_argument("--once", action="store_true", help="print it once (as is done where there is no terminal)")
    parse.add_argument("--interval", type=float, default=EVERY_S, metavar="SECONDS", help=f"default {EVERY_S:g}")
    own = parse.parse_args(list(arguments))
    if not 0.1 <= own.interval <= 3600:
        parse.error("--interval must be from 0.1 to 3600 seconds")

    def show() -> int:
        endpoints = Endpoints(own.endpoint, Security.of(os.environ), ANSWER_S)
        console = _Console()
        if own.once or not console.is_terminal:
            console.print(dials(_ask(endpoints), width=console.width, height=console.height))
            return 0
        return _live(endpoints, console, own.interval)

    return told(show)


def _ask(endpoints: Endpoints) -> Mapping[str, Any]:
    view: Mapping[str, Any] = json.loads(endpoints.status(STEPS, 1).view)
    return view


def _live(endpoints: Endpoints, console: Console, every_s: float) -> int:
    """Runs until the user ends it. The first request must succeed, so that a wrong address is reported."""
    view, note, heard_s = _ask(endpoints), "", time.monotonic()
    with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(dials(view, note=note, width=console.width, height=console.height), refresh=True)
            if "q" in pressed(every_s):
                return 0
            if view["phase"] == "done" and note:
                continue  # the last view stays on the screen
            before = endpoints.leader
            try:
                view, note, heard_s = _ask(endpoints), "", time.monotonic()
                if before != endpoints.leader:
                    note = f"another coordinator leads now: {endpoints.leader}"
            except NoAnswer as error:
                away_s = time.monotonic() - heard_s
                ended = "the job is over" if view["phase"] == "done" else "training continues without it"
                note = f"no coordinator for {away_s:.0f} s ({ended}; asking again; q ends this): {error}"


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """A function that waits for some seconds, and returns the keys that were pressed. SIGTERM is like Ctrl-C."""
    terminal = sys.stdin.isatty()
    former = termios.tcgetattr(sys.stdin) if terminal else None

    def interrupted(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    def pressed(timeout_s: float) -> str:
        if not terminal:
            time.sleep(timeout_s)
            return ""
        if not select.select([sys.stdin], [], [], timeout_s)[0]:
            return ""
        return os.read(sys.stdin.fileno(), 64).decode(errors="replace")

    on_term = signal.signal(signal.SIGTERM, interrupted)
    try:
        if terminal:
            tty.setcbreak(sys.stdin)
        yield pressed
    finally:
        if former is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, former)
        signal.signal(signal.SIGTERM, on_term)
