"""Scripts without the launcher, each in a fork of an interpreter that has imported torch: that takes seconds.

`python -m tests.jobs.alone` is that interpreter. It reads a request a line, answers each with a line, and ends when its
input does.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from everstep.agents.node.preload import run_program, warm_up

from . import HANG_S, MARKER, Ended

_lock = threading.Lock()
_started: list[subprocess.Popen[str]] = []


def script(path: Path | str, *arguments: str, environment: dict[str, str] | None = None) -> Ended:
    """Run `python path arguments...` in a session of its own; kills the session if it hangs."""
    with _lock, tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        here = f"/proc/{os.getpid()}/fd"
        request = {
            "program": {"kind": "script", "target": str(path), "arguments": arguments},
            "environment": {**os.environ, "PYTHONWARNINGS": "ignore", **(environment or {})},
            "folder": os.getcwd(),
            "streams": [f"{here}/{output.fileno()}", f"{here}/{errors.fileno()}"],
        }
        answer = _ask(request)
        texts = []
        for stream in (output, errors):
            stream.seek(0)
            texts.append(stream.read().decode())
    assert answer["status"] is not None, f"hung for {HANG_S} s: {path} {arguments}\n{texts}"
    assert not answer["left"], f"{path} {arguments} left processes behind"
    return Ended(answer["status"], *texts)


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    if not _started:
        command = [sys.executable, "-m", "tests.jobs.alone"]
        # It outlives the test, whose processes are known by their environment, and ends with this process.
        env = {name: value for name, value in os.environ.items() if name not in (MARKER, "TMPDIR")}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        _started.append(process)
        atexit.register(process.communicate)  # closes its input, and waits
    (process,) = _started
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    answer: dict[str, Any] = json.loads(process.stdout.readline())
    return answer


def _serve() -> None:
    warm_up([])
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _run(request)
        ended = os.pidfd_open(pid)
        hung = not select.select([ended], [], [], HANG_S)[0]
        os.close(ended)
        if hung:
            os.killpg(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        left = False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
            left = not hung
        print(json.dumps({"status": None if hung else status, "left": left}), flush=True)


def _run(request: dict[str, Any]) -> None:
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
    status = run_program(request["program"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()
