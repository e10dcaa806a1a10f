"""`everstep run`: the order in which a node starts, so that torch is imported once.

The launcher imports torch for torchrun's parser, and is then forked: the fork is the preloaded process, of which the
workers are forks in turn. Everything that starts a thread or touches a device comes after the fork.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from everstep.agents.node.descriptors import TooFewDescriptors, allow
from everstep.agents.node.preloader import Preloader, single_threaded
from everstep.comms.base.lasting import lasting
from everstep.comms.base.process import adopt_orphans


def run(arguments: Sequence[str]) -> int:
    """Run a node of a job to its end; returns the exit status."""
    try:
        return _run(arguments)
    except KeyboardInterrupt:  # before the agent listens to signals
        print("everstep: error: stopped by SIGINT", file=sys.stderr)
        return 1


def _run(arguments: Sequence[str]) -> int:
    with single_threaded(), lasting():
        from .command import configure, parse, preloads
        from .coordinator_flags import LaunchError, node_range
    try:
        parsed = parse(arguments)
        _allow_descriptors(str(parsed.nproc_per_node), node_range(parsed.nnodes)[1])
        adopt_orphans()
        imports = preloads(parsed)
        if found := [item.module for item in imports if not item.asked]:
            print(
                f"everstep: imported before workers are forked: {', '.join(found)} (--es-preload=none: not)",
                file=sys.stderr,
            )
        preloader = Preloader.fork(imports)
        try:
            from .launcher import launch

            return launch(configure(parsed), preloader)
        finally:
            preloader.close()
    except (LaunchError, TooFewDescriptors) as error:
        print(f"everstep: error: {error}", file=sys.stderr)
        return 2


def _allow_descriptors(workers: str, nodes: int) -> None:
    """Before anything is forked. Torch has not counted the devices yet, so this assumes one worker per processor."""
    count = int(workers) if workers.isdecimal() else os.cpu_count() or 1
    allow(count, count * nodes)
