"""Run one test in a process of its own, with a hard time limit, and say how it ended, whatever it did."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from report import read_json, rounded

_GRACE_S = 1.5
_TAIL_CHARACTERS = 3000


def run_in_process(
    command: Sequence[str], *, timeout_s: float, report: Path, environment: dict[str, str]
) -> dict[str, Any]:
    """Run a command that writes its results to `report`; returns them with its exit, wall time and last words.

    Output goes to a file: a pipe would keep us waiting for a grandchild that cannot die. At the time limit the process
    is first asked for its stacks (SIGUSR1, see faulthandler), then killed with its descendants, each by its pid.
    """
    report.unlink(missing_ok=True)
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            process.wait(timeout_s)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
            _ask_for_stacks(process)
        left = _end_tree(process)
        output.seek(0)
        tail = output.read()[-_TAIL_CHARACTERS:]
    result: dict[str, Any] = {
        "exit": describe_exit(process.returncode),
        "timed_out": timed_out,
        "wall_s": rounded(time.monotonic() - began),
    }
    if left:
        result["undead_pids"] = left
    if process.returncode != 0 or timed_out:
        result["output_tail"] = tail
    written = read_json(report)
    return result | (written if isinstance(written, dict) else {})


def describe_exit(code: int | None) -> str:
    """An exit code in words."""
    if code is None:
        return "cannot be killed"
    if code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit {code}"


def _ask_for_stacks(process: subprocess.Popen[bytes]) -> None:
    """The roles that a test has forked inherit its handler, and tell where they hang; the test itself speaks last."""
    for one in [*_descendants(process), psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.Error):
            one.send_signal(signal.SIGUSR1)
    time.sleep(_GRACE_S / 3)


def _descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:
        return []


def _end_tree(process: subprocess.Popen[bytes]) -> list[int]:
    """Kill the process if it runs, and what it forked; the pids that are still there after a grace time."""
    descendants = _descendants(process) if process.poll() is None else []
    if process.poll() is None:
        process.kill()
    for descendant in descendants:
        with contextlib.suppress(psutil.Error):
            descendant.kill()  # psutil compares the start time: a reused pid is left alone
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        return [process.pid, *(one.pid for one in descendants if _lives(one))]
    deadline = time.monotonic() + _GRACE_S
    while (alive := [one.pid for one in descendants if _lives(one)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return alive


def _lives(process: psutil.Process) -> bool:
    """Neither gone nor a zombie (orphans are reaped by pid 1, if it cares to)."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def child_environment(**more: str) -> dict[str, str]:
    """Our environment for a test: one GPU visible, torch's check for CUDA by NVML (see T4), and what is given."""
    environment = dict(os.environ)
    environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
    environment.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    environment.setdefault("PYTHONUNBUFFERED", "1")
    return environment | more
