"""Checks of all that needs no GPU, with numbers of their own: how soon is the death of a CPU process seen?"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
from deathwatch import DeathWatch, RobustMutex
from driver import GIB, MIB, why_no_gpu
from host_copy import BounceRing, Segment
from nvml import xid_of
from options import Options
from processes import Channel, ended_after, start
from report import Report, read_json, rounded, spread
from supervise import child_environment, run_in_process
from t1_device_memory import digest

_REPEATS = 5
_PROBE = Path(__file__).with_name("probe.py")


def run(report: Report, options: Options) -> None:
    """All checks; each that fails is a failure of the report."""
    checks: dict[str, Callable[[Report, Options], None]] = {
        "ring copies into a memfd": _ring_copies,
        "messages and descriptors": _messages,
        "roles die with their conductor": _roles_die,
        "crash keeps what was written": _crash,
        "time limit": _time_limit,
        "a test without GPU is skipped": _skipped,
        "tree of additions": _tree,
        "kernel log lines": _kernel_log_lines,
        "fork after parallel work": _fork_after_parallel_work,
        "death of CPU processes": _deaths,
        "writes after the mutex told": _late_writes,
    }
    for name, check in checks.items():
        with report.part(name):
            check(report, options)


# Deaths


def _deaths(report: Report, options: Options) -> None:
    """Kill CPU processes that hold memory; milliseconds until each sign, medians."""
    gib = options.pick(full=(0.0, 1.0, 2.0), quick=(0.0, 0.25), rehearsal=(0.0, 0.01))
    cases: list[tuple[str, float, str]] = [(f"{size:g} GiB private", size, "private") for size in gib]
    cases += [(f"{size:g} GiB memfd kept by another", size, "memfd") for size in gib[1:]]
    cases += [(f"{gib[1]:g} GiB private, torch imported, 4 busy threads", gib[1], "torch")]
    for name, size, kind in cases:
        runs = [_one_death(int(size * GIB), kind) for _ in range(2 if options.quick else _REPEATS)]
        medians = {
            sign: rounded(statistics.median(values))
            if (values := [r[sign] for r in runs if r[sign] is not None])
            else None
            for sign in runs[0]
        }
        slowest = {f"{sign}_max": max((r[sign] or 0.0) for r in runs) for sign in ("robust_mutex_ms", "pidfd_ms")}
        report.measure(name, medians | slowest)
        if any(r["robust_mutex_ms"] is None or r["pidfd_ms"] is None for r in runs):
            raise AssertionError(f"{name}: a sign was never seen: {runs}")
        report.find(
            f"{name}: " + ", ".join(f"{sign.removesuffix('_ms')} {at}" for sign, at in medians.items()) + " ms."
        )


def _one_death(size: int, kind: str) -> dict[str, float | None]:
    segment = Segment(max(size, mmap.PAGESIZE)) if kind == "memfd" else None
    watch = DeathWatch()
    with ended_after() as children:
        child = start("victim", _victim(watch, size, kind, segment))
        watch.armed_in_parent()
        children.append(child)
        child.hear(timeout_s=60)
        times = watch.time_of_death(child, timeout_s=20.0)
    if segment:
        segment.close()
    return times


def _victim(watch: DeathWatch, size: int, kind: str, segment: Segment | None) -> Any:
    def role(channel: Channel) -> None:
        watch.armed_in_child()
        if kind == "torch":
            import torch

            del torch
            for _ in range(4):
                threading.Thread(target=_spin, daemon=True).start()
        if segment:
            segment.touch()
        else:
            memory = mmap.mmap(-1, max(size, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE)
            ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 1, size)
        channel.send({"ready": True})
        channel.receive(600)

    return role


def _late_writes(report: Report, options: Options) -> None:
    """The mutex tells when the *main thread* ends: may other threads of the victim still write to shared memory then?

    An answer, not a check. A second thread fills a shared segment without pause; samples of it are taken when the mutex
    tells and when the pidfd does. If they ever differ, memory of a dead process must not be reused before its pidfd.
    """
    segment = Segment(64 * MIB)
    segment.touch()
    sampled = numpy.frombuffer(segment.bytes_at(0, segment.size), dtype=numpy.uint8)[:: 1 << 14]
    differed, lags_ms = 0, []
    runs = options.pick(full=20, quick=5, rehearsal=2)
    for _ in range(runs):
        mutex = RobustMutex()
        with ended_after() as children:
            child = start("writer", _writer(mutex, segment))
            children.append(child)
            child.hear(timeout_s=10)
            time.sleep(0.02)
            pidfd = os.pidfd_open(child.pid)
            told: list[Any] = []

            def watch(mutex: RobustMutex = mutex, told: list[Any] = told) -> None:
                mutex.wait_for_death()
                told.extend([time.monotonic(), sampled.copy()])

            thread = threading.Thread(target=watch)
            thread.start()
            time.sleep(0.01)
            child.kill()
            select.select([pidfd], [], [], 10)
            ended = time.monotonic()
            thread.join(10)
            os.close(pidfd)
            differed += not numpy.array_equal(told[1], sampled)
            lags_ms.append(1000 * (ended - told[0]))
    segment.close()
    report.measure("writes after the mutex told", {"runs": runs, "seen_in": differed} | spread(lags_ms, "ms"))
    report.find(
        f"Writes by another thread of the victim landed after the mutex told in {differed} of {runs} deaths "
        f"(the pidfd came {statistics.median(lags_ms):.3g} ms after the mutex)."
    )


def _writer(mutex: RobustMutex, segment: Segment) -> Any:
    def role(channel: Channel) -> None:
        mutex.hold()
        fill = ctypes.CDLL(None).memset  # lets go of the interpreter lock
        fill.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)

        def write() -> None:
            value = 0
            while True:
                fill(segment.address, value, segment.size)
                value = (value + 1) % 256

        threading.Thread(target=write, daemon=True).start()
        channel.send({"ready": True})
        channel.receive(600)

    return role


def _spin() -> None:
    while True:
        sum(range(1000))


# Ring


def _ring_copies(report: Report, options: Options) -> None:
    """Odd sizes through small rings; a fast and a slow device; then the rate of the CPU half."""
    for size, piece, pieces, threads, delay_s in (
        (5 * MIB + 4097, MIB, 3, 2, 0.0),
        (3 * MIB - 1, MIB, 2, 3, 0.002),
        (MIB, 4 * MIB, 1, 1, 0.0),
        (10, MIB, 4, 4, 0.0),
    ):
        source = os.urandom(size)
        target = Segment(size)
        _ring_copy(source, target, piece, pieces, threads, delay_s)
        if digest(target.bytes_at(0, size)) != digest(source):
            raise AssertionError(f"ring copy of {size} bytes by {piece} went wrong")
        target.close()
    size = options.pick(full=256, quick=32, rehearsal=4) * MIB
    source = bytes(size)
    target = Segment(size)
    target.touch()
    rates = {}
    for threads in (1, 2):
        began = time.monotonic()
        _ring_copy(source, target, 16 * MIB, 4, threads, 0.0)
        rates[f"{threads}_threads_gb_per_s"] = rounded(size / (time.monotonic() - began) / 1e9)
    target.close()
    report.measure("ring copy, device played by the CPU", rates)
    report.find(f"Ring copies into a memfd are right; {rates} (each byte copied twice).")


def _ring_copy(source: bytes, target: Segment, piece: int, pieces: int, threads: int, delay_s: float) -> None:
    addresses = [Segment(piece) for _ in range(pieces)]
    base = ctypes.cast(ctypes.c_char_p(source), ctypes.c_void_p).value or 0

    def fill(address: int, offset: int, length: int) -> Callable[[], None]:
        def device() -> None:
            time.sleep(delay_s)
            ctypes.memmove(address, base + offset, length)

        thread = threading.Thread(target=device)
        thread.start()
        return thread.join

    ring = BounceRing([one.address for one in addresses], piece, threads)
    ring.copy(fill, target.address, len(source))
    ring.close()
    for one in addresses:
        one.close()


# Processes


def _messages(report: Report, options: Options) -> None:
    """A role gets a memfd by descriptor and writes into it; its exception comes back as an error."""

    def writer(channel: Channel) -> None:
        _, fds = channel.receive(5)
        os.pwrite(fds[0], b"seen", 0)
        channel.send({"ok": True})
        raise ValueError("on purpose")

    fd = os.memfd_create("probe")
    with ended_after() as children:
        child = start("writer", writer)
        children.append(child)
        child.ask({}, timeout_s=5, fds=[fd])
        if os.pread(fd, 4, 0) != b"seen":
            raise AssertionError("the descriptor did not arrive")
        try:
            child.hear(timeout_s=5)
        except Exception as error:
            if "on purpose" not in str(error):
                raise
        else:
            raise AssertionError("the role's error was not told")
    os.close(fd)


def _roles_die(report: Report, options: Options) -> None:
    """A conductor is killed; its role must be gone soon after."""

    def conductor(channel: Channel) -> None:
        inner = start("inner", lambda c: time.sleep(60))
        channel.send({"pid": inner.pid})
        time.sleep(60)

    with ended_after() as children:
        outer = start("outer", conductor)
        children.append(outer)
        inner_pid = outer.hear(timeout_s=5)["pid"]
        pidfd = os.pidfd_open(inner_pid)
        outer.kill()
        if not select.select([pidfd], [], [], 5.0)[0]:
            raise AssertionError("the inner role outlived its conductor")
        os.close(pidfd)


def _subtest(name: str, timeout_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        command = [sys.executable, str(_PROBE), "--subtest", name, "--report", str(path)]
        return run_in_process(command, timeout_s=timeout_s, report=path, environment=child_environment())


def _crash(report: Report, options: Options) -> None:
    """A test that dies by SIGSEGV: its exit is recorded and its first measurement kept."""
    result = _subtest("selftest-crash", 20)
    if result["exit"] != f"signal {signal.SIGSEGV.name}" or result.get("measured", {}).get("before") != 1:
        raise AssertionError(f"unexpected: {result}")


def _time_limit(report: Report, options: Options) -> None:
    """A test that hangs with a forked child: stopped at its limit, the child too, stacks in its last words."""
    began = time.monotonic()
    result = _subtest("selftest-hang", 2.5)
    took = time.monotonic() - began
    child = result.get("measured", {}).get("child")
    if not result["timed_out"] or took > 8 or "hang_here" not in result.get("output_tail", ""):
        raise AssertionError(f"unexpected after {took:.1f} s: {result}")
    if child is None or result.get("undead_pids"):
        raise AssertionError(f"the child {child} of a stopped test is still there: {result.get('undead_pids')}")
    status = Path(f"/proc/{child}/stat")
    if status.exists() and status.read_text().split()[2] not in "ZX":
        raise AssertionError(f"the child {child} of a stopped test is still there")


def _skipped(report: Report, options: Options) -> None:
    """Where there is no GPU, each test says so and none of them fails."""
    reason = why_no_gpu()
    if reason is None:
        report.find("There is a GPU here: skipping was not checked.")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "all.json"
        command = [sys.executable, str(_PROBE), "--only", "T1,T8", "--json", str(path)]
        result = run_in_process(command, timeout_s=30, report=Path(folder) / "none", environment=child_environment())
        written = read_json(path) or {}
        skipped = [test.get("skipped", "") for test in written.get("tests", {}).values()]
    if result["exit"] != "exit 0" or len(skipped) != 2 or not all(text.startswith("no GPU") for text in skipped):
        raise AssertionError(f"unexpected: {result}, {written}")
    report.find(f"Without a GPU each test says: {skipped[0]}.")


def _tree(report: Report, options: Options) -> None:
    """The tree of the tests has the canonical shape, and keeps denormals."""
    import torch
    from t6_determinism import equal_but_nan_payload, hard_leaves, tree_sum

    a, b, c, d, e = hard_leaves(5, 1 << 12)
    if not equal_but_nan_payload(tree_sum([a, b, c, d, e]), ((a + b) + (c + d)) + e):
        raise AssertionError("not ((0 1) (2 3)) 4")
    sums = tree_sum(hard_leaves(2, 1 << 12))
    if not bool(((sums.abs() < 2**-126) & (sums != 0)).any()) or not bool(torch.signbit(sums[2])):
        raise AssertionError("denormals or -0 were lost")


def _fork_after_parallel_work(report: Report, options: Options) -> None:
    """A process that has run a parallel CPU operation forks: does the fork's first parallel operation return?

    An answer, not a check: with GNU OpenMP it does not, so a preloaded process must stay on one thread until it forks.
    """

    def preloaded(threads: int) -> Callable[[Channel], None]:
        def role(channel: Channel) -> None:
            import torch

            torch.set_num_threads(threads)
            torch.ones(2048, 2048).add_(1)

            def fork(inner: Channel) -> None:
                torch.set_num_threads(2)
                torch.ones(2048, 2048).add_(1)
                inner.send({"returned": True})

            with ended_after() as children:
                child = start("fork", fork)
                children.append(child)
                try:
                    child.hear(timeout_s=5)
                    channel.send({"returned": True})
                except Exception:
                    channel.send({"returned": False})

        return role

    returned = {}
    for threads in (1, 2):
        with ended_after() as children:
            child = start("preloaded", preloaded(threads))
            children.append(child)
            returned[f"{threads} threads before the fork"] = child.hear(timeout_s=60)["returned"]
    report.measure("fork after parallel work returns", returned)
    report.find(
        f"A fork of a process that did parallel CPU work returns from its own first parallel operation: {returned}."
    )


def _kernel_log_lines(report: Report, options: Options) -> None:
    """Xids are found in the forms in which the driver writes them."""
    lines = {
        "3,1184,72,-;NVRM: Xid (PCI:0000:3b:00): 31, pid=4711, name=python, Ch 00000008, intr 00000000. MMU Fault": 31,
        "4,1185,73,-;NVRM: Xid (PCI:0000:00:05): 13, Graphics SM Warp Exception on (GPC 0, TPC 0, SM 0)": 13,
        "4,1186,74,-;NVRM: loading NVIDIA UNIX x86_64 Kernel Module  580.159.04": None,
    }
    for line, expected in lines.items():
        if xid_of(line) != expected:
            raise AssertionError(f"{xid_of(line)} in {line}")


# Tests that misbehave on purpose


def crash(report: Report, options: Options) -> None:
    """Write one measurement, then die by a bad address."""
    report.measure("before", 1)
    ctypes.string_at(0)


def hang(report: Report, options: Options) -> None:
    """Fork a child and never return."""
    child = start("child", lambda channel: time.sleep(600))
    report.measure("child", child.pid)
    _hang_here()


def _hang_here() -> None:
    time.sleep(600)
