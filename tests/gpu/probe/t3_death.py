"""T3. How soon is the death of a GPU worker seen?

Question  A process with a CUDA context and 0, 4 or 16 GB of pinned host memory is killed, idle or in the middle of a
          kernel: after how many milliseconds do a robust mutex, sockets at a low and at a high descriptor number, a
          pidfd and NVML tell? Is the order of the kernel's own clean-up (memory map, files, parent) what one sees?
Method    All victims are started first and map the same memfd, which the conductor keeps, as a keeper does; each
          registers its share in one call, as `cudaHostRegister` over a segment would. Then one after the other is
          killed; 2 GiB of device memory per victim make its release visible to NVML. Controls: the memory mapped and
          touched, but not registered.
Meaning   If the mutex tells at once and the pidfd late, detection moves to the mutex. The growth with pinned memory
          is the price of pinning whole segments; NVML's time is when a replacement finds its memory free.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from typing import Any

import psutil
from deathwatch import DeathWatch
from driver import GIB, Driver
from nvml import Nvml, open_nvml
from options import Options
from processes import Channel, Child, RoleFailed, ended_after, start
from report import Json, Report, rounded

_DEVICE_BYTES = 2 * GIB
_TIMEOUT_S = 30.0
UNASKED = "idle, NVML not asked"  # its polling might slow down the end that it watches


def run(report: Report, options: Options) -> None:
    """See the module's docstring."""
    import torch  # once, before the forks; does not touch CUDA

    del torch
    sizes = options.pick(full=(0.0, 4.0, 16.0), quick=(0.0, 4.0), rehearsal=(0.0, 0.02))
    largest = int(max(sizes) * GIB)
    if largest > 0.4 * psutil.virtual_memory().available:
        sizes = tuple(size for size in sizes if size * GIB < 0.4 * psutil.virtual_memory().available)
        report.fail("memory", f"only {sizes} GiB fit")
        largest = int(max(sizes) * GIB)
    segment = os.memfd_create("probe-segment")
    os.ftruncate(segment, max(largest, mmap.PAGESIZE))
    nvml = open_nvml()
    cases = [(size, True, state) for size in sizes for state in ("idle", "mid-kernel")]
    cases += [(max(sizes), False, "idle"), (0.0, True, UNASKED)]
    with ended_after() as children:
        victims = []
        for size, registered, state in cases:
            watch = DeathWatch()
            child = start(
                f"victim {size} GiB {registered} {state}", _victim(watch, segment, int(size * GIB), registered)
            )
            watch.armed_in_parent()
            children.append(child)
            victims.append((size, registered, state, watch, child))
        prepared = _all_ready(report, children)  # nobody pins any more when the first one dies
        for size, registered, state, watch, child in victims:
            name = f"{size:g} GiB {'pinned' if registered else 'mapped only'}, {state}"
            if child.name not in prepared:
                continue
            with report.part(name):
                if state == "mid-kernel":
                    child.ask({"do": "spin"}, timeout_s=10)
                    time.sleep(0.05)
                signs = {} if state == UNASKED else _nvml_signs(nvml, child)
                times = watch.time_of_death(child, timeout_s=_TIMEOUT_S, more=signs)
                report.measure(name, times | prepared[child.name])
    _conclude(report, sizes)


def _all_ready(report: Report, children: list[Child]) -> dict[str, Json]:
    """What each victim says when it is set up, by its name; those that could not are noted."""
    ready = {}
    for child in children:
        try:
            ready[child.name] = child.hear(timeout_s=75)
        except RoleFailed as error:
            report.fail(child.name, error)
    return ready


def _victim(watch: DeathWatch, segment: int, size: int, registered: bool) -> Any:
    def role(channel: Channel) -> None:
        watch.armed_in_child()
        import torch
        from gpu import device, spin_for, synchronise

        memory = mmap.mmap(segment, max(size, mmap.PAGESIZE), flags=mmap.MAP_SHARED)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        began = time.monotonic()
        if size:
            ctypes.memset(address, 1, size)  # resident in this process's page tables, as a segment in use is
        touch_s = time.monotonic() - began
        held = torch.ones(_DEVICE_BYTES if device().type == "cuda" else 16, dtype=torch.uint8, device=device())
        synchronise()
        driver = Driver()
        if device().type == "cpu":
            driver.initialise()
        began = time.monotonic()
        if size and registered:
            driver.register_host(address, size)
        channel.send({"touch_s": rounded(touch_s), "register_s": rounded(time.monotonic() - began)})
        while channel.receive(600)[0]["do"] == "spin":
            spin_for(3.0)
            channel.send({"spinning": True})
            synchronise()
        del held

    return role


def _nvml_signs(nvml: Nvml | None, child: Child) -> Json:
    """Predicates: the victim's device memory is free again; NVML no longer lists its pid."""
    if nvml is None:
        return {}
    before = nvml.used_bytes()
    signs: Json = {"nvml_memory_free_ms": lambda: nvml.used_bytes() < before - 0.95 * _DEVICE_BYTES}
    if child.pid in nvml.process_bytes():
        signs["nvml_pid_gone_ms"] = lambda: child.pid not in nvml.process_bytes()
    return signs


def _conclude(report: Report, sizes: tuple[float, ...]) -> None:
    cases = {name: value for name, value in report.measured.items() if isinstance(value, dict) and "pidfd_ms" in value}
    for name, times in cases.items():
        told = {sign: at for sign, at in times.items() if sign.endswith("_ms")}
        order = sorted((at, sign.removesuffix("_ms")) for sign, at in told.items() if at is not None)
        never = [sign.removesuffix("_ms") for sign, at in told.items() if at is None]
        text = ", ".join(f"{sign} {at:g}" for at, sign in order)
        report.find(f"{name}: ms until seen: {text}{'; never: ' + ', '.join(never) if never else ''}.")
