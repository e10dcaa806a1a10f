"""`python forking.py KIND`: an interpreter that has imported torch, and runs commands in forks of itself.

It reads a request a line, answers each with the process id of a fork, and ends when its input does; when a fork ends,
its exit status is written to the pipe that the request names. Its kinds:

- script: a script without the launcher, in a process as a worker's;
- launcher: the `everstep` command. It has imported what `everstep run` does, and is warmed up as the preloaded process.

It runs by its path, so that its forks have no module of the tests, and cannot import one.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import tempfile
import traceback
from typing import Any, NoReturn

del sys.path[0]  # the folder of this file

from everstep.agents.node.preload import run_program, warm_up  # noqa: E402
from everstep.agents.node.preloader import single_threaded  # noqa: E402
from everstep.comms.base.lasting import lasting  # noqa: E402
from everstep.comms.base.process import adopt_orphans, die_with_parent  # noqa: E402

_NEWNS, _NEWNET = 0x00020000, 0x40000000  # unshare(2), setns(2)
_DETACH, _REC, _SLAVE = 2, 0x4000, 0x80000  # umount(2), mount(2)


class _Server:
    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._running: dict[int, int] = {}  # process -> the pipe for its exit status
        with single_threaded(), lasting():
            if kind == "launcher":
                import everstep.agents.launch.launcher
                import everstep.cli  # noqa: F401
            warm_up([])
        adopt_orphans()  # so that those of a launcher that was killed can be found
        self._woken, self._wake = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._wake, False)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def serve(self) -> None:
        while True:
            readable, _, _ = select.select([0, self._woken], [], [])
            if self._woken in readable:
                os.read(self._woken, 4096)
                self._reap()
            if 0 in readable:
                line = sys.stdin.readline()
                if not line:
                    return
                print(self._fork(json.loads(line)), flush=True)

    def _fork(self, request: dict[str, Any]) -> int:
        status = os.open(request["status"], os.O_WRONLY)
        modes = (os.O_RDONLY, os.O_WRONLY | os.O_APPEND, os.O_WRONLY | os.O_APPEND)
        streams = [os.open(path, mode) for path, mode in zip(request["streams"], modes, strict=True)]
        pid = os.fork()
        if pid == 0:
            try:
                os.close(status)
                self._become(request, streams)
                _run_everstep(request) if self._kind == "launcher" else _run_script(request)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(1)
        for fd in streams:
            os.close(fd)
        self._running[pid] = status
        return pid

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                if pid in self._running:
                    pipe = self._running.pop(pid)
                    with contextlib.suppress(BrokenPipeError):
                        os.write(pipe, str(os.waitstatus_to_exitcode(status)).encode())
                    os.close(pipe)

    def _become(self, request: dict[str, Any], streams: list[int]) -> None:
        """Leave nothing of the server but its modules."""
        die_with_parent()
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for fd in (self._woken, self._wake, *self._running.values()):
            os.close(fd)
        for fd, own in enumerate(streams):
            os.dup2(own, fd)
            os.close(own)
        for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
            encoding, errors = (getattr(getattr(sys, name), asked) for asked in ("encoding", "errors"))
            stream = open(fd, mode, 1 if fd == 2 else -1, encoding, errors, closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        os.environ.clear()
        os.environ.update(request["environment"])
        tempfile.tempdir = None
        os.chdir(request["folder"])
        if request["network"]:
            _enter_network(request["network"])


def _enter_network(name: str) -> None:
    """As `ip netns exec` does: the namespace, and its own /sys."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(function: str, *arguments: Any) -> None:
        if getattr(libc, function)(*arguments) != 0:
            raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")

    namespace = os.open(f"/run/netns/{name}", os.O_RDONLY)
    call("setns", namespace, _NEWNET)
    os.close(namespace)
    call("unshare", _NEWNS)
    call("mount", None, b"/", None, ctypes.c_ulong(_SLAVE | _REC), None)
    libc.umount2(b"/sys", _DETACH)  # there may be none
    call("mount", name.encode(), b"/sys", b"sysfs", ctypes.c_ulong(0), None)


def _run_script(request: dict[str, Any]) -> NoReturn:
    target, *arguments = request["arguments"]
    status = run_program({"kind": "script", "target": target, "arguments": arguments})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run_everstep(request: dict[str, Any]) -> NoReturn:
    from everstep.cli import main

    sys.path.insert(0, os.getcwd())  # as for `python -m everstep`
    sys.argv = ["everstep", *request["arguments"]]
    try:
        os._exit(main())
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


if __name__ == "__main__":
    _Server(sys.argv[1]).serve()
