"""Commands that tests run in forks of an interpreter that has imported torch, which takes more than a second."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

HANG_S = 120
MARKER = "EVERSTEP_TEST_MARKER"  # in the environment of a test's processes
PROTECTION = "everstep: protection: "  # prefix of the line, at the start of training, with the losses it survives
SCRIPT, LAUNCHER = "script", "launcher"


@dataclass
class Ended:
    """The result of a command."""

    status: int
    stdout: str
    stderr: str

    def error(self) -> str:
        """The one line of standard error; asserts that it is one, and ours. Lines of the start may precede it."""
        lines = [line for line in self.stderr.strip().splitlines() if not line.startswith(PROTECTION)]
        assert len(lines) == 1, self.stderr
        assert lines[0].startswith("everstep: error: "), self.stderr
        assert self.status not in (0, None), self
        return lines[0].removeprefix("everstep: error: ")


class Interpreter:
    """Such a process (`forking.py`), started when it is first needed. One request at a time."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def descendants(self) -> list[int]:
        """The live processes that it has started, and their orphans."""
        if self._process is None:
            return []
        found = psutil.Process(self._process.pid).children(recursive=True)
        return [process.pid for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]

    def run(
        self, arguments: Sequence[str], environment: dict[str, str], timeout_s: float, *, mixed: bool = False
    ) -> Ended:
        """Run a command line in a session of its own; kills the session if it hangs. `mixed`: all output as stdout."""
        with self._lock, tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            request = {
                "arguments": list(arguments),
                "environment": {**os.environ, "PYTHONWARNINGS": "ignore", **environment},
                "folder": os.getcwd(),
                "streams": [_path(output), _path(output if mixed else errors)],
                "timeout_s": timeout_s,
            }
            answer = self._ask(request)
            texts = []
            for stream in (output, errors):
                stream.seek(0)
                texts.append(stream.read().decode())
        said = "".join(text[-4000:] for text in texts)
        assert answer["status"] is not None, f"hung for {timeout_s:g} s: {arguments}\n{said}"
        assert not answer["left"], f"{arguments} left processes of its session behind\n{said}"
        return Ended(answer["status"], *texts)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._process is None:
            command = [sys.executable, "-m", f"{__package__}.forking", self._kind]
            # It outlives the test, whose processes are known by their environment, and ends with this process.
            env = {name: value for name, value in os.environ.items() if name not in (MARKER, "TMPDIR")}
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
            atexit.register(self._process.communicate)  # closes its input, and waits
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


scripts = Interpreter(SCRIPT)
launchers = Interpreter(LAUNCHER)


def script(path: Path | str, *arguments: str, environment: dict[str, str] | None = None) -> Ended:
    """Run `python path arguments...`, without the launcher."""
    return scripts.run([str(path), *arguments], environment or {}, HANG_S)


def _path(file: IO[bytes]) -> str:
    return f"/proc/{os.getpid()}/fd/{file.fileno()}"
