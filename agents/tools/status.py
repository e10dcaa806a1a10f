"""`everstep status` and `everstep events`: a coordinator's view of its job on one screen; and its event log."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from everstep.agents.base.strict_json import dumps
from everstep.agents.monitoring.screen import screen
from everstep.agents.monitoring.story import json_line, tell, text_line
from everstep.comms.base.security import Security, SecurityError

from .client import Endpoints, NoAnswer

ENDPOINT: dict[str, Any] = {
    "metavar": "HOST:PORT",
    "help": "a coordinator of the job; several, separated by commas: the one that leads is found",
}
STEPS = 200
FOLLOW_S = 1.0


def told(command: Callable[[], int]) -> int:
    """Run a command that queries a coordinator; errors are one line. Returns its exit status."""
    try:
        return command()
    except (NoAnswer, SecurityError) as error:
        print(f"everstep: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of the pipe has closed it
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"everstep: error: {error.filename or 'standard output'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def status(arguments: Sequence[str]) -> int:
    """Print the status of the job at an endpoint; returns the exit status."""
    parse = argparse.ArgumentParser(prog="everstep status", description="What a coordinator knows of its job.")
    parse.add_argument("endpoint", **ENDPOINT)
    parse.add_argument("--json", action="store_true", help="all there is to show, as one JSON object")
    own = parse.parse_args(list(arguments))

    def show() -> int:
        answer = Endpoints(own.endpoint, Security.of(os.environ)).status(STEPS, 1)
        if own.json:
            print(dumps({**json.loads(answer.json), "view": json.loads(answer.view)}))
        else:
            print("\n".join(screen(json.loads(answer.view))))
        return 0

    return told(show)


def events(arguments: Sequence[str]) -> int:
    """Print the story of a job: from its coordinator, or from the file that --es-events wrote."""
    parse = argparse.ArgumentParser(prog="everstep events", description="What happened to a job, a line each.")
    parse.add_argument("source", metavar="HOST:PORT or FILE", help="a coordinator of the job, or its --es-events file")
    parse.add_argument("--json", action="store_true", help="one JSON object a line, with all that is known")
    parse.add_argument("-f", "--follow", action="store_true", help="print events as they happen (of a coordinator)")
    own = parse.parse_args(list(arguments))

    def show() -> int:
        path = Path(own.source)
        if ":" not in own.source and not path.is_file():
            raise NoAnswer(f"{own.source!r} is not HOST:PORT, and there is no such file", away=False)
        lines = _of_file(path) if path.is_file() else _of_coordinator(own.source, follow=own.follow)
        for line, unix_s in lines:
            story = tell(line)
            if story is not None:
                print(json_line(story, unix_s, line) if own.json else text_line(story, unix_s), flush=own.follow)
        return 0

    return told(show)


def _of_file(path: Path) -> Iterator[tuple[Mapping[str, Any], float]]:
    """The lines of an event log. Their clock is the coordinator's; by the file's age, it is about this."""
    lines: list[dict[str, Any]] = []
    with path.open() as file:
        for number, text in enumerate(file, 1):
            try:
                line = json.loads(text)
                lines.append({**line, "at_s": float(line["at_s"]), "event": str(line["event"])})
            except (ValueError, KeyError, TypeError):
                raise NoAnswer(f"{path}: line {number} is not an event", away=False) from None
    offset_s = path.stat().st_mtime - lines[-1]["at_s"] if lines else 0.0
    for line in lines:
        yield line, line["at_s"] + offset_s


def _of_coordinator(text: str, *, follow: bool) -> Iterator[tuple[Mapping[str, Any], float]]:
    endpoints, newest = Endpoints(text, Security.of(os.environ)), 0
    away = False
    while True:
        try:
            view = json.loads(endpoints.status(1, 0).view)
        except NoAnswer as error:
            if not follow or not error.away or not newest:
                raise
            if not away:
                print(f"everstep: {error}; asking again", file=sys.stderr)
            away = True
            time.sleep(FOLLOW_S)
            continue
        away = False
        for line in view["events"]:
            if line.get("number", newest + 1) > newest:
                newest = max(newest, line.get("number", 0))
                yield line, line["at_s"] + view["unix_s"] - view["at_s"]
        if not follow or view["phase"] == "done":
            return
        time.sleep(FOLLOW_S)
