"""`everstep run`: the order in which a node starts, so that torch is imported once.

The launcher imports torch for torchrun's parser, and is then forked: the fork is the preloaded process, of which the
workers are forks in turn. Whatever starts a thread or touches a device comes after the fork.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .preloader import Preloader, single_threaded


def run(arguments: Sequence[str]) -> int:
    """Run a node of a job to its end; returns the exit status."""
    try:
        return _run(arguments)
    except KeyboardInterrupt:  # before the agent listens to signals
        print("everstep: error: stopped by SIGINT", file=sys.stderr)
        return 1


def _run(arguments: Sequence[str]) -> int:
    with single_threaded():
        from .command import LaunchError, configure, parse, preloads
    try:
        parsed = parse(arguments)
        preloader = Preloader.fork(preloads(parsed))
        try:
            from .launcher import launch

            return launch(configure(parsed), preloader)
        finally:
            preloader.close()
    except LaunchError as error:
        print(f"everstep: error: {error}", file=sys.stderr)
        return 2
