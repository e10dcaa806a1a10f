"""T5. What does pinning cost, whom does it stall, and how fast do snapshots leave the GPU without it?

Question  Seconds per GB to register a memfd mapping, by piece size, resident or not, 4 KiB or huge pages; how long do
          another process's launches and NVML calls stall meanwhile? GB/s from the device into a memfd: through a
          pinned ring and memcpy, directly into a registered memfd, pageable. How much does such a copy slow down
          compute beside it?
Method    Registration in one process while another launches small kernels without pause and notes its longest waits.
          Copies by the driver on a side stream, with 1, 2 and 4 copying threads. A loop of matrix products timed with
          and without a copy on a side stream.
Meaning   Above some 0.1 s/GB, or stalls of others beyond a few ms: no bulk pinning (`pinned.py` goes), ring at start
          in small pieces. Ring near the PCIe rate with one or two threads: snapshots need nothing else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from driver import GIB, MIB, Driver
from host_copy import PIECE, BounceRing, Segment
from nvml import open_nvml
from options import Options
from processes import Channel, Child, ended_after, start
from report import Json, Report, rounded, spread

_RING_PIECES = 4


def run(report: Report, options: Options) -> None:
    """See the module's docstring."""
    with report.part("registration"), ended_after() as children:
        other = start("launcher", _launcher_role)
        pinner = start("pinner", _pinner_role)
        children += [other, pinner]
        other.hear(timeout_s=30)
        pinner.hear(timeout_s=30)
        _registration(report, options, other, pinner)
    with report.part("copies"), ended_after() as children:
        copier = start("copier", _copier(options))
        children.append(copier)
        while "finished" not in (message := copier.hear(timeout_s=40)):
            name, value = message["name"], message["value"]
            report.measure(name, value)
    _conclude(report)


# Registration


def _launcher_role(channel: Channel) -> None:
    """Launches without pause; on request tells the longest waits since the last request."""
    driver = Driver()
    driver.initialise()
    driver.enter()
    memory, stream = driver.allocate(MIB), driver.stream()
    channel.send({"ready": True})
    waits: list[float] = []
    while True:
        began = time.perf_counter()
        driver("cuMemsetD8Async", memory, 1, MIB, stream)
        driver("cuStreamSynchronize", stream)
        waits.append(1000 * (time.perf_counter() - began))
        if channel.waiting():
            channel.receive(1)
            channel.send(spread(waits, "ms"))
            waits = []


def _pinner_role(channel: Channel) -> None:
    """Registers a segment in pieces and tells how long it took; releases everything before it answers."""
    driver = Driver()
    driver.initialise()
    driver.enter()
    channel.send({"ready": True})
    while True:
        order = channel.receive(600)[0]
        segment = Segment(order["size"], huge_pages=order["huge"])
        began = time.monotonic()
        if order["resident"]:
            segment.touch()
        touched = time.monotonic() - began
        pieces = range(segment.address, segment.address + segment.size, order["piece"])
        channel.send({"touch_s": touched})
        channel.receive(60)
        began = time.monotonic()
        longest = 0.0
        for address in pieces:
            at = time.monotonic()
            driver.register_host(address, min(order["piece"], segment.address + segment.size - address))
            longest = max(longest, time.monotonic() - at)
        took = time.monotonic() - began
        channel.send({"register_s": took, "longest_piece_s": longest})
        channel.receive(60)
        began = time.monotonic()
        for address in pieces:
            driver.unregister_host(address)
        channel.send({"unregister_s": time.monotonic() - began})
        segment.close()


def _registration(report: Report, options: Options, other: Child, pinner: Child) -> None:
    gib = options.pick(full=4, quick=1, rehearsal=0)
    size = gib * GIB or 8 * MIB
    if size > 0.4 * psutil.virtual_memory().available:
        raise MemoryError("too little host memory")
    whole: Json = {"size": size, "piece": size, "resident": True, "huge": False}
    cases = {
        "nothing registered": None,
        "resident, 16 MiB pieces": whole | {"piece": 16 * MIB},
        "resident, 64 MiB pieces": whole | {"piece": 64 * MIB},
        "resident, 1 GiB pieces": whole | {"piece": min(GIB, size)},
        "resident, one piece": whole,
        "not resident, one piece": whole | {"resident": False},
        "not resident, 64 MiB pieces": whole | {"resident": False, "piece": 64 * MIB},
        "huge pages, one piece": whole | {"huge": True},
    }
    for name, order in cases.items():
        if order and order["huge"] and not _huge_pages_free(size):
            report.fail(name, "no huge pages are reserved on this machine")
            continue
        other.ask({}, timeout_s=60)
        if order is None:
            time.sleep(1.0)
            report.measure(name, {"other_process_launch": other.ask({}, timeout_s=60)})
            continue
        touched = pinner.ask(order, timeout_s=60)["touch_s"]
        other.ask({}, timeout_s=60)
        with _NvmlWaits() as nvml_waits:
            took = pinner.ask({}, timeout_s=120)
        seen = other.ask({}, timeout_s=60)
        released = pinner.ask({}, timeout_s=120)
        per_gb = 1e9 / size
        report.measure(
            name,
            {
                "touch_s_per_gb": rounded(touched * per_gb),
                "register_s_per_gb": rounded(took["register_s"] * per_gb),
                "unregister_s_per_gb": rounded(released["unregister_s"] * per_gb),
                "longest_piece_ms": rounded(1000 * took["longest_piece_s"]),
                "other_process_launch": seen,
                "nvml_call": nvml_waits.spread(),
            },
        )


def _huge_pages_free(size: int) -> bool:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return False
    values = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return values.get("HugePages_Free", 0) * values.get("Hugepagesize", 2048) * 1024 >= size


class _NvmlWaits:
    """How long NVML calls of a process without CUDA take while the block runs."""

    def __enter__(self) -> _NvmlWaits:
        self._waits: list[float] = []
        self._stop = threading.Event()
        self._nvml = open_nvml()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(5)

    def _ask(self) -> None:
        while self._nvml and not self._stop.is_set():
            began = time.perf_counter()
            self._nvml.used_bytes()
            self._waits.append(1000 * (time.perf_counter() - began))
            time.sleep(0.002)

    def spread(self) -> Json:
        return spread(self._waits, "ms")


# Copies


def _copier(options: Options) -> Any:
    def role(channel: Channel) -> None:
        import torch
        from gpu import device, device_seconds, new_stream, on, pinned, synchronise

        size = options.pick(full=2 * GIB, quick=512 * MIB, rehearsal=8 * MIB)
        piece = min(PIECE, size // 4)
        driver = Driver()
        source = torch.arange(size // 8, dtype=torch.int64, device=device())
        synchronise()
        if options.rehearsal:
            driver.initialise()
        stream = driver.stream()
        ring = [Segment(piece) for _ in range(_RING_PIECES)]
        began = time.monotonic()
        for one in ring:
            one.touch()
            driver.register_host(one.address, piece)
        _tell(channel, "ring_set_up_s", rounded(time.monotonic() - began))
        target = Segment(size)
        target.touch()

        def fill(address: int, offset: int, length: int) -> Callable[[], None]:
            driver("cuMemcpyDtoHAsync_v2", address, source.data_ptr() + offset, length, stream)
            event = torch.cuda.Event() if not options.rehearsal else None
            if event is None:
                return lambda: driver("cuStreamSynchronize", stream)
            event.record(torch.cuda.ExternalStream(stream.value))
            return event.synchronize

        def direct(address: int) -> Callable[[], None]:
            def copy() -> None:
                driver("cuMemcpyDtoHAsync_v2", address, source.data_ptr(), size, stream)
                driver("cuStreamSynchronize", stream)

            return copy

        def rate(copy: Callable[[], None]) -> float:
            copy()
            times = []
            for _ in range(3):
                began = time.perf_counter()
                copy()
                times.append(time.perf_counter() - began)
            return rounded(size / min(times) / 1e9)

        for threads in (1, 2, 4):
            bounce = BounceRing([one.address for one in ring], piece, threads)
            _tell(
                channel, f"ring_{threads}_threads_gb_per_s", rate(lambda b=bounce: b.copy(fill, target.address, size))
            )
            bounce.close()
        right = bytes(target.bytes_at(size - 64, 64)) == source[-8:].cpu().numpy().tobytes()
        _tell(channel, "ring_copy_is_right", right)
        _tell(channel, "pageable_memfd_gb_per_s", rate(direct(target.address)))
        plain = pinned(size)
        _tell(channel, "pinned_host_memory_gb_per_s", rate(direct(plain.data_ptr())))
        del plain
        driver.register_host(target.address, size)
        _tell(channel, "registered_memfd_gb_per_s", rate(direct(target.address)))

        # Compute beside a copy
        n = options.pick(full=8192, quick=8192, rehearsal=128)
        a = torch.randn(n, n, device=device(), dtype=torch.bfloat16)
        out = torch.empty_like(a)
        big = torch.empty(options.pick(full=256 * MIB, quick=256 * MIB, rehearsal=MIB), device=device())

        def products() -> None:
            for _ in range(4):
                torch.mm(a, a, out=out)

        def streaming() -> None:
            for _ in range(8):
                big.add_(1.0)

        beside = new_stream()
        host = torch.frombuffer(target.bytes_at(0, size), dtype=torch.uint8)
        from_device = source.view(torch.uint8)
        for name, work in (("matrix_products", products), ("memory_bound", streaming)):
            alone = device_seconds(work, repeats=10, warm_up=3)
            with on(beside):
                for _ in range(options.pick(full=6, quick=6, rehearsal=1)):
                    host.copy_(from_device, non_blocking=True)  # into registered memory: a true side-stream copy
            with_copy = device_seconds(work, repeats=10, warm_up=0)
            beside.synchronize()
            median = sorted(alone)[5]
            slowed = sorted(with_copy[:8])[4]
            _tell(
                channel,
                f"compute_beside_copy: {name}",
                {
                    "alone_ms": rounded(1000 * median),
                    "beside_ms": rounded(1000 * slowed),
                    "ratio": rounded(slowed / median),
                },
            )
        channel.send({"finished": True})

    return role


def _tell(channel: Channel, name: str, value: Any) -> None:
    channel.send({"name": name, "value": value})


def _conclude(report: Report) -> None:
    for name, value in report.measured.items():
        if isinstance(value, dict) and "register_s_per_gb" in value:
            launch, nvml = value["other_process_launch"].get("max_ms"), value["nvml_call"].get("max_ms")
            report.find(
                f"Pinning, {name}: {value['register_s_per_gb']} s/GB; longest launch of another process {launch} ms, "
                f"longest NVML call {nvml} ms."
            )
    rates = {name: value for name, value in report.measured.items() if name.endswith("_gb_per_s")}
    if rates:
        report.find(
            "Device to memfd, GB/s: " + ", ".join(f"{k.removesuffix('_gb_per_s')} {v}" for k, v in rates.items()) + "."
        )
    for name, value in report.measured.items():
        if name.startswith("compute_beside_copy"):
            report.find(f"{name.split(': ')[1]} beside a device-to-host copy: {value['ratio']} times the time.")
