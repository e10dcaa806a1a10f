"""Processes that end with the benchmark, however it ends."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

HERE = Path(__file__).parent
PEERS = HERE / "peers"
_PR_SET_PDEATHSIG = 1
_BENCHMARK = "BENCHMARK_PID"  # set for workers, so that one that starts late sees that it is an orphan
_libc = ctypes.CDLL(None)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; end it now if the benchmark already has."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if _BENCHMARK in os.environ and not alive(int(os.environ[_BENCHMARK])):
        os._exit(1)


def environment(**more: str) -> dict[str, str]:
    """Environment of workers: one thread each, gloo on the loopback, our modules importable."""
    path = os.pathsep.join(p for p in (str(HERE), os.environ.get("PYTHONPATH")) if p)
    ours = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path, _BENCHMARK: str(os.getpid())}
    return {**os.environ, **ours, **more}


def start(arguments: list[str], log: Path, **more: str) -> subprocess.Popen[bytes]:
    """`python arguments...` in a session of its own, output appended to `log`; it ends with the benchmark."""
    with log.open("ab") as sink:
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=environment(**more),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )


def stop(process: subprocess.Popen[bytes], *, patience_s: float) -> None:
    """Send SIGTERM, and after `patience_s` SIGKILL, to the process and its descendants."""
    tree = _descendants(process.pid)
    if process.poll() is None and patience_s > 0:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
    tree |= _descendants(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for member in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(tree, timeout=5)


def _descendants(pid: int) -> set[psutil.Process]:
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        status: str = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return False
    return status not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def wait_until_file(path: Path, *, timeout_s: float) -> None:
    """Wait for a file, a gate between the benchmark and its workers."""
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not appear within {timeout_s} s")
        time.sleep(0.01)
