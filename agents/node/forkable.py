"""Whether this process can still fork workers that use a GPU, and compute.

Two things spoil all later forks. A device driver that is initialised serves this process alone. And torch's autograd
starts a thread for each device in the first backward pass of a process, of CPU tensors too, where there is an
accelerator: a fork has no such threads, and torch refuses to run a backward pass in it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

DRIVERS = {"/dev/nvidia-uvm": "CUDA", "/dev/kfd": "ROCm"}  # opened when they are initialised; not by NVML, which counts


def why_not() -> str:
    """The reason why forks of this process cannot use devices; empty if there is none. Touches no device itself."""
    import torch

    for name, module in (("CUDA", torch.cuda), ("XPU", torch.xpu)):
        if module.is_initialized():
            return f"torch has initialised {name}"
    for path, name in DRIVERS.items():
        if path in _open_files():
            return f"the {name} driver is initialised ({path} is open)"
    if any(name.startswith("pt_autograd") for name in thread_names()):
        return "torch has started its threads for backward passes on devices"
    return ""


def thread_names() -> list[str]:
    """The names of this process's threads, including the main thread."""
    names: list[str] = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            names.append((task / "comm").read_text().strip())
    return names


def _open_files() -> set[str]:
    found: set[str] = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    return found


def in_a_fork(ask: Callable[[], int]) -> tuple[int, str]:
    """Call `ask` in a separate process, so that this one touches nothing; returns its number, or raises its error.

    Only before this process has threads.
    """
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            try:
                answer: tuple[int, str] = int(ask()), ""
            except Exception as error:
                answer = 0, str(error) or type(error).__name__
            os.write(writes, json.dumps(answer).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writes)
    with open(reads, "rb") as stream:
        text = stream.read()
    _, status = os.waitpid(pid, 0)
    if not text:
        return 0, f"the process that asked ended with status {os.waitstatus_to_exitcode(status)}"
    number, why = json.loads(text)
    return int(number), str(why)
