"""`everstep status`: what a coordinator knows of its job, on one screen."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from ..comms.rpc import Unreachable, get_status
from ..comms.security import Security, SecurityError

TIMEOUT_S = 5.0


def status(arguments: Sequence[str]) -> int:
    """Print the status of the job at an endpoint; returns the exit status."""
    parse = argparse.ArgumentParser(prog="everstep status", description="What a coordinator knows of its job.")
    parse.add_argument("endpoint", metavar="HOST:PORT")
    parse.add_argument("--json", action="store_true")
    own = parse.parse_args(list(arguments))
    try:
        text = get_status(own.endpoint, TIMEOUT_S, Security.of(os.environ))
    except Unreachable:
        print(f"everstep: error: no coordinator answers at {own.endpoint} within {TIMEOUT_S:g} s", file=sys.stderr)
        return 2
    except SecurityError as error:
        print(f"everstep: error: {error}", file=sys.stderr)
        return 2
    if own.json:
        print(text)
        return 0
    for name, value in json.loads(text).items():
        shown = ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"{name:15} {', '.join(shown) if isinstance(shown, list) else shown}")
    return 0
