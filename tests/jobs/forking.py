"""`python -m tests.jobs.forking KIND`: an interpreter that has imported torch, and runs commands in forks of itself.

It reads a request a line, answers each with a line, and ends when its input does. Its kinds:

- script: a script without the launcher, in a process as a worker's;
- launcher: `everstep run`, which imports torch for torchrun's parser before it does anything else.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
from typing import Any, NoReturn

from everstep.agents.node.preload import run_program, warm_up
from everstep.agents.node.preloader import single_threaded
from everstep.comms.base.lasting import lasting
from everstep.comms.base.process import adopt_orphans, die_with_parent

from .interpreter import LAUNCHER, SCRIPT


def _serve(kind: str) -> None:
    if kind == LAUNCHER:
        adopt_orphans()  # so that those of a launcher that was killed can be found
        with single_threaded(), lasting():
            import everstep.agents.launch.command  # noqa: F401
    else:
        with lasting():
            warm_up([])
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            die_with_parent()
            _become(request)
            _run_launcher(request) if kind == LAUNCHER else _run_script(request)
        ended = os.pidfd_open(pid)
        hung = not select.select([ended], [], [], request["timeout_s"])[0]
        os.close(ended)
        if hung:
            os.killpg(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        left = False
        if kind == SCRIPT:  # what a launcher leaves is for the test to find
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
                left = not hung
        print(json.dumps({"status": None if hung else status, "left": left}), flush=True)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _become(request: dict[str, Any]) -> None:
    os.setsid()
    for fd, path in enumerate(request["streams"], 1):
        stream = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(stream, fd)
        os.close(stream)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])


def _run_script(request: dict[str, Any]) -> NoReturn:
    target, *arguments = request["arguments"]
    status = run_program({"kind": "script", "target": target, "arguments": arguments})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run_launcher(request: dict[str, Any]) -> NoReturn:
    from everstep.cli import main

    sys.argv = ["everstep", "run", *request["arguments"]]
    try:
        os._exit(main())
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 1)


if __name__ == "__main__":
    _serve(sys.argv[1])
