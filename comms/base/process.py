"""Linux-specific process control: children that die with their parents, subreapers, exit statuses, shared memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_BACKGROUND = 10  # niceness
_OOM_SCORE = Path("/proc/self/oom_score_adj")  # proc(5); thousandths of the memory that is limited, 1000 at most
_PF_EXITING = 4  # a flag of a thread that ends (linux/sched.h)
_libc = ctypes.CDLL(None, use_errno=True)

NOTICES = (signal.SIGUSR1, signal.SIGUSR2)  # schedulers can be configured to send these some time before they end a job
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, *NOTICES)
"""Signals that ask a job to end. A scheduler, a service manager or a terminal sends them to every process of it."""
SAME_S = 1.0  # a signal repeated within this time is the same request: timeout(1) sends its own twice


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel kill this process when its parent ends, however it ends (prctl(2), PR_SET_PDEATHSIG)."""
    parent = os.getppid()
    if _libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it ended in between
        os.kill(os.getpid(), number)


def adopt_orphans() -> None:
    """Make this process the subreaper of its descendants: orphans become its children (prctl(2))."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def children() -> list[int]:
    """The children of this process, including adopted ones and zombies."""
    try:
        tasks = list(Path("/proc/self/task").iterdir())
        return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN: look at all processes
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _parent(pid) == os.getpid()]


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def leave_signals_to_launcher() -> None:
    """Ignore the signals that request a job's end: the launcher, which gets them too, decides about them."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def caught_outside_python() -> set[int]:
    """Signals that code which is not Python's handles here: `faulthandler.register`, a library (proc(5), SigCgt)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            mask = int(line.split()[1], 16)
            caught = {number for number in range(1, 65) if mask >> (number - 1) & 1}
            return {number for number in caught if signal.getsignal(number) in (signal.SIG_DFL, None)}
    return set()


def own_command(module: str, *arguments: str) -> list[str]:
    """The command line of a process that runs a module of ours, and finds no others in the working folder."""
    package = sys.modules[__name__.partition(".")[0]]
    root = Path(package.__file__ or "").absolute().parents[1].resolve()
    # -P hides the working folder from the process, which is wrong only if the package is found nowhere but there.
    found = root != Path.cwd() or any(Path(folder).resolve() == root for folder in sys.path if folder)
    return [sys.executable, *(["-P"] if found else []), "-m", module, *arguments]


def process_name() -> str:
    """The name of this process that `ps` and `top` show (proc(5), comm)."""
    return Path("/proc/self/comm").read_text().removesuffix("\n")


def rename_process(name: str) -> None:
    """Give this process another name, of at most 15 bytes."""
    Path("/proc/self/comm").write_text(name)


def exit_status(pid: int) -> int | None:
    """The exit status of a process that is not reaped yet, in the form of `subprocess` (proc(5), stat).

    Known as soon as the main thread ends; other threads may outlive it. None if the process runs or does not exist.
    """
    fields = _stat(f"/proc/{pid}")
    return os.waitstatus_to_exitcode(int(fields[-1])) if fields and _ends(fields) else None


def runs_without_main_thread(pid: int) -> bool:
    """Whether other threads of a process still run after its main thread has ended, and no kill is pending."""
    if exit_status(pid) is None:
        return False
    try:
        others = [task for task in Path(f"/proc/{pid}/task").iterdir() if task.name != str(pid)]
        return any(not _killed(other) for other in others if (fields := _stat(str(other))) and not _ends(fields))
    except OSError:  # it is gone
        return False


def _stat(folder: str) -> list[str]:
    """The fields of /proc/PID/stat, from the state on; empty if the process or thread is gone."""
    try:
        return Path(f"{folder}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _ends(stat: Sequence[str]) -> bool:
    return stat[0] in ("Z", "X") or bool(int(stat[6]) & _PF_EXITING)


def _killed(task: Path) -> bool:
    """Whether a thread has SIGKILL pending, as all of a process have that ends as a whole."""
    lines = (task / "status").read_text().splitlines()
    pending = next(int(line.split()[1], 16) for line in lines if line.startswith("SigPnd:"))
    return bool(pending >> (signal.SIGKILL - 1) & 1)


def let_compute_go_first() -> None:
    """Run this thread, and what it starts from now on, at a lower priority. Again, it changes nothing."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _BACKGROUND)


def let_oom_killer_take_first(thousandths: int) -> None:
    """Have the kernel, when memory runs out, kill this process before its parent, and before others of its size.

    Counted from what this process has inherited. Raising it needs no permission (proc(5), oom_score_adj).
    """
    with contextlib.suppress(OSError, ValueError):
        _OOM_SCORE.write_text(str(min(1000, int(_OOM_SCORE.read_text()) + thousandths)))


def leave(status: int) -> NoReturn:
    """End this process, and do not take its modules apart first: where torch is one, that takes a third of a second."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader is gone, or it is closed
            stream.flush()
    os._exit(status)


def host_id() -> str:
    """Equal for processes that share a kernel and a network namespace, and so can meet at an abstract unix socket.

    It is the boot id and the namespace's inode: containers of one machine are different hosts unless they share it.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}-{os.stat('/proc/self/ns/net').st_ino}"


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_MMAP_THRESHOLD_MAX = 32 << 20


def keep_freed_memory() -> None:
    """Have malloc keep what is freed for the next step instead of giving it back page by page (mallopt(3)).

    A training step frees and allocates the same sizes again and again; without this every step pays page faults.
    A C library without mallopt is left as it is.
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_MAX)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_M_TOP_PAD, 64 << 20)
