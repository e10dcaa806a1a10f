"""Commands that tests run in forks of an interpreter that has imported torch, which takes more than a second."""

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
import time
from collections.abc import Mapping, Sequence
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


class Forked:
    """A process that an `Interpreter` forked, with the part of `subprocess.Popen` that tests use."""

    stderr = None

    def __init__(self, pid: int, status: int, stdin: IO[str] | None = None, stdout: IO[str] | None = None) -> None:
        """`status`: the pipe by which its exit status comes."""
        self.pid, self.stdin, self.stdout = pid, stdin, stdout
        self.returncode: int | None = None
        self._status = status
        self._read = b""

    def poll(self) -> int | None:
        """The exit status, if it has ended: negative for a signal."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Until it has ended. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            self._await(self._status, None if timeout is None else time.monotonic() + timeout)
            said = os.read(self._status, 64)
            assert said, f"the process that forked {self.pid} is gone"
            os.close(self._status)
            self.returncode = int(said)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Its output, to the end. Raises subprocess.TimeoutExpired, and may be called again then."""
        until_s = None if timeout is None else time.monotonic() + timeout
        if self.stdin is not None:
            self.stdin.close()
        while self.stdout is not None and not self.stdout.closed:
            self._await(self.stdout.fileno(), until_s)
            data = os.read(self.stdout.fileno(), 1 << 16)
            self._read += data
            if not data:
                self.stdout.close()
        self.wait(None if until_s is None else max(0.0, until_s - time.monotonic()))
        return self._read.decode(), None

    def _await(self, fd: int, until_s: float | None) -> None:
        left_s = None if until_s is None else max(0.0, until_s - time.monotonic())
        if not select.select([fd], [], [], left_s)[0]:
            raise subprocess.TimeoutExpired(f"process {self.pid}", left_s or 0.0)

    def send_signal(self, number: int) -> None:
        """Unless it is known to have ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Interpreter:
    """A process that forks others (`forking.py`), started when it is first needed."""

    _ITS_OWN = ("PYTHON", "LC_", "LANG", "LD_", "OMP_", "MKL_", "OPENBLAS_", "MALLOC_", "TORCH", "CUDA_", "TZ")

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._environment: dict[str, str] = {}

    def descendants(self) -> list[int]:
        """The live processes that it has started, and their orphans."""
        if self._process is None:
            return []
        found = psutil.Process(self._process.pid).children(recursive=True)
        return [process.pid for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]

    def suits(self, environment: Mapping[str, str]) -> bool:
        """Whether a process that starts in this environment would be as a fork: interpreters read some at the start."""
        self._started()
        read = {name for name in {*self._environment, *environment} if name.startswith(self._ITS_OWN)}
        return all(self._environment.get(name) == environment.get(name) for name in read)

    def start(
        self, arguments: Sequence[str], environment: Mapping[str, str], *, network: str = "", piped: bool = False
    ) -> Forked:
        """Start a command in a session of its own, and in a network namespace if one is named; it ends with this one.

        Its output and its errors are `stdout`; `piped`: its output alone, and there is a pipe to its input.
        """
        theirs, ours = os.pipe()
        reads, writes = os.pipe()
        forked = self._fork(
            arguments, environment, network, [_path(theirs), _path(writes), _path(2 if piped else writes)]
        )
        for fd in (theirs, writes):
            os.close(fd)
        forked.stdin, forked.stdout = os.fdopen(ours, "w"), os.fdopen(reads)
        if not piped:
            forked.stdin.close()
            forked.stdin = None
        return forked

    def run(
        self, arguments: Sequence[str], environment: dict[str, str], timeout_s: float, *, mixed: bool = False
    ) -> Ended:
        """Run a command line in a session of its own; kills the session if it hangs. `mixed`: all output as stdout."""
        hung = left = False
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            streams = [os.devnull, *(_path(file.fileno()) for file in (output, output if mixed else errors))]
            process = self._fork(arguments, surroundings(environment), "", streams)
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                hung = True
                os.killpg(process.pid, signal.SIGKILL)
            if self._kind == SCRIPT and not hung:  # what a launcher leaves is for the test to find
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                    left = True
            status = process.wait()
            texts = []
            for stream in (output, errors):
                stream.seek(0)
                texts.append(stream.read().decode())
        said = "".join(text[-4000:] for text in texts)
        assert not hung, f"hung for {timeout_s:g} s: {arguments}\n{said}"
        assert not left, f"{arguments} left processes of its session behind\n{said}"
        return Ended(status, *texts)

    def _fork(
        self, arguments: Sequence[str], environment: Mapping[str, str], network: str, streams: list[str]
    ) -> Forked:
        reads, writes = os.pipe()
        request = {
            "arguments": list(arguments),
            "environment": dict(environment),
            "folder": os.getcwd(),
            "streams": streams,
            "status": _path(writes),
            "network": network,
        }
        with self._lock:
            pid = int(self._ask(request))
        os.close(writes)
        return Forked(pid, reads)

    def _ask(self, request: dict[str, Any]) -> str:
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        return process.stdout.readline()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            command = [sys.executable, str(Path(__file__).with_name("forking.py")), self._kind]
            # It outlives the test, whose processes are known by their environment, and ends with this process.
            own = surroundings({})
            self._environment = {name: value for name, value in own.items() if name not in (MARKER, "TMPDIR")}
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment
            )
            atexit.register(self._process.communicate)  # closes its input, and waits
        return self._process


def surroundings(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a test's process: this one's, and what is given."""
    return {**os.environ, "PYTHONWARNINGS": "ignore", **environment}


scripts = Interpreter(SCRIPT)
launchers = Interpreter(LAUNCHER)
references = Interpreter(LAUNCHER)  # for undisturbed runs: strings have other hashes than in the other jobs


def script(path: Path | str, *arguments: str, environment: dict[str, str] | None = None) -> Ended:
    """Run `python path arguments...`, without the launcher."""
    return scripts.run([str(path), *arguments], environment or {}, HANG_S)


def _path(fd: int) -> str:
    return f"/proc/{os.getpid()}/fd/{fd}"
