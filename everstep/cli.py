"""The `everstep` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from . import startup

USAGE = """usage: everstep COMMAND ...

  run          run a training script on this node (every torchrun flag, see everstep run --help)
  coordinator  coordinate a job from a process of its own
  status       what a coordinator knows of its job, on one screen
  top          the same, live
  events       what happened to a job, a line each
  trace        what all ranks did in the last steps, for ui.perfetto.dev
  drain        have a node hand over to the others, and leave the job
  quarantine   keep a host out of the job for some time
  release      end the quarantine of a host
  relayout     change the number of pipeline stages, while training continues
  certs        make certificates for a cluster that is not trusted
  convert      bring a checkpoint of another framework into the universal form, or out of it
  inspect      what is in a checkpoint
  verify       check every byte of a checkpoint against its manifest
  diff         compare two checkpoints, of any formats
  demo         lose workers on purpose, and compare with a run that lost none
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status. Without arguments it is this process's own command line."""
    if arguments is not None:
        return _run(arguments)
    startup.begin()
    if sys.argv[1:2] in (["run"], ["coordinator"]):
        startup.forgive_errors()
    else:
        startup.show_anything()
    try:
        return startup.end(_run(sys.argv[1:]))
    except BrokenPipeError:
        return startup.end(0)


def _run(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command in ("run", "coordinator"):
        from .agents.launch.init import fork_from_init

        fork_from_init()
    if command == "run":
        from .agents.launch.run import run
        from .comms.base.process import leave

        leave(run(rest))
    if command == "coordinator":
        from .agents.launch.coordinate import coordinate
        from .comms.base.process import leave

        leave(coordinate(rest))
    if command in ("status", "events", "top", "trace", "drain", "quarantine", "release", "relayout"):
        return _watch(command, rest)
    if command in ("convert", "inspect", "verify", "diff"):
        from . import checkpoint_commands as checkpoints

        action: Callable[[list[str]], int] = getattr(checkpoints, command)
        return action(rest)
    if command == "demo":
        from .demo.command import demo

        return demo(rest)
    if command in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        from . import __version__

        print(__version__)
        return 0
    print(f"everstep: error: unknown command {command!r}\n{USAGE}" if command else USAGE, end="", file=sys.stderr)
    return 2


def _watch(command: str, rest: list[str]) -> int:
    """A command that queries a coordinator."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # gRPC reads it at import; this command reports errors itself
    if command == "top":
        from .agents.tools.top import top

        return top(rest)
    if command == "trace":
        from .agents.tools.trace import trace

        return trace(rest)
    if command in ("drain", "quarantine", "release", "relayout"):
        from .agents.tools.orders import order

        return order(command, rest)
    from .agents.tools import status

    show: Callable[[list[str]], int] = getattr(status, command)
    return show(rest)
