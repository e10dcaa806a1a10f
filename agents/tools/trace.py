"""`everstep trace`: the last steps of all ranks, as a file for ui.perfetto.dev."""

from __future__ import annotations

import argparse
import gzip
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from everstep.agents.base.patience import said
from everstep.comms.base.security import Security

from .client import Endpoints
from .perfetto import Trace
from .status import ENDPOINT, told

STEPS = 10
MOST_STEPS = 1000
TIMEOUT_S = 60.0


def trace(arguments: Sequence[str]) -> int:
    """Write a trace of the job at an endpoint; returns the exit status."""
    parse = argparse.ArgumentParser(
        prog="everstep trace",
        description="Write what all ranks did in the last steps, for ui.perfetto.dev or chrome://tracing.",
    )
    parse.add_argument("endpoint", **ENDPOINT)
    parse.add_argument("-o", "--output", metavar="FILE", default="", help="- is standard output; .gz is compressed")
    parse.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"how many, at most {MOST_STEPS}: {STEPS}")
    parse.add_argument("--timeout", type=float, default=TIMEOUT_S, metavar="SECONDS", help=f"for all: {TIMEOUT_S:g}")
    own = parse.parse_args(list(arguments))
    if not 0 < own.steps <= MOST_STEPS:
        parse.error(f"--steps must be from 1 to {MOST_STEPS}")

    def write() -> int:
        text = (
            f"the nodes of the job at {own.endpoint} are asked for their spans; {own.timeout:g} s are waited for them"
        )
        with said(text):
            found = Trace.of(Endpoints(own.endpoint, Security.of(os.environ)).trace(own.steps, own.timeout))
        if own.output == "-":
            found.write(sys.stdout)
            return 0
        path = Path(own.output or f"everstep-trace-{_safe(found.job)}.json")
        partial = path.with_name(f".{path.name}.partial")
        try:
            with _opened(partial, compressed=path.suffix == ".gz") as file:
                found.write(file)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        _tell(found, path)
        return 0

    return told(write)


def _opened(path: Path, *, compressed: bool) -> TextIO:
    return gzip.open(path, "wt") if compressed else path.open("w")


def _tell(found: Trace, path: Path) -> None:
    steps, ranks = found.steps, len({rank for _, rank in found.ranks})
    which = f"steps {steps[0]} to {steps[-1]}" if steps else "no whole step"
    print(f"{path}: {which} of {ranks} ranks on {len(found.nodes)} nodes, {found.span_count:,} spans: ui.perfetto.dev")
    notes: list[Any] = [f"nodes that did not answer: {', '.join(found.silent)}"] if found.silent else []
    notes += [f"{found.left_out:,} older spans were too many: ask for fewer steps"] if found.left_out else []
    for note in notes:
        print(f"everstep: {note}", file=sys.stderr)


def _safe(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name) or "job"
