"""T1. Does device memory outlive the process that made it?

Question  Memory made by cuMemCreate in a process without a CUDA context and shared as a file descriptor: does it
          survive SIGKILL of a process that copies into it, of the process that exported the descriptor, of its owner,
          each in the middle of copies? Does a bare descriptor in a process that never called cuInit keep it? And
          legacy cudaIpc?
Method    owner (cuInit, no context) -> re-exporter (no context) -> three importers that copy for ever from block 0
          into a block of their own. Kill one importer, the re-exporter, the owner; after each, the others must make
          progress and find the right digests. Then all of them die and only descriptors held by the conductor remain;
          a new process maps them. Legacy: an exporter with a context, two importers; exporter killed last, in the
          middle of copies.
Meaning   All yes: an HBM keeper of a hundred lines holds receive rings and gradients over the death of any worker,
          and a descriptor is to HBM what a memfd is to host memory. If survivors fault at the owner's death: shared
          pinned host memory inside the node, no HBM tier.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import time
from collections.abc import Sequence
from typing import Any

import numpy
from driver import MIB, Driver, DriverError, IpcHandle, Mapped
from nvml import Nvml, open_nvml
from options import Options
from processes import Channel, Child, RoleFailed, ended_after, start
from report import Report

BLOCKS = 4
IMPORTERS = 3
_COPIES_IN_FLIGHT = 200  # about 35 ms of work for 256 MiB blocks: a SIGKILL always lands in the middle
_SEED = 20


def run(report: Report, options: Options) -> None:
    """See the module's docstring."""
    size = options.pick(full=256 * MIB, quick=64 * MIB, rehearsal=2 * MIB)
    nvml = open_nvml()
    before = nvml.used_bytes() if nvml else 0
    with report.part("vmm"):
        _vmm(report, size)
    _settled_memory(report, nvml, before, "vmm")
    with report.part("legacy_ipc"):
        _legacy(report, size)
    _settled_memory(report, nvml, before, "legacy")


def _settled_memory(report: Report, nvml: Nvml | None, before: int, name: str) -> None:
    """Note how long the device memory of the dead takes to come back, and what does not."""
    if nvml is None:
        return
    began = time.monotonic()
    while (left := nvml.used_bytes() - before) > 16 * MIB and time.monotonic() - began < 5:
        time.sleep(0.01)
    report.measure(f"{name}_memory_back_s", time.monotonic() - began)
    report.measure(f"{name}_memory_left_mib", left // MIB)


def pattern(size: int) -> bytes:
    """The content of block 0."""
    return numpy.random.default_rng(_SEED).integers(0, 2**63, size // 8, dtype=numpy.uint64).tobytes()


def digest(data: bytes | bytearray | memoryview) -> str:
    """Short digest of host bytes."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


# Roles. None of them imports torch.


def _owner(size: int) -> Any:
    """Owns the memory, has no context if that can be, and does nothing else.

    Also plays the re-exporter and the successor: it exports what it is given.
    """

    def role(channel: Channel) -> None:
        driver = Driver()
        driver.initialise()
        given = channel.receive(30)[1]
        without_context = "yes"

        def obtain() -> list[int]:
            return [driver.import_fd(fd) for fd in given] or [driver.create(size) for _ in range(BLOCKS)]

        try:
            handles = obtain()
        except DriverError as error:
            without_context = f"NO ({error})"
            driver.enter()
            handles = obtain()
        _close(given)
        while True:
            fds = [driver.export_fd(handle) for handle in handles]
            kind = os.readlink(f"/proc/self/fd/{fds[0]}")
            channel.send({"kind": kind, "without_context": without_context}, fds)
            _close(fds)
            channel.receive(600)

    return role


def _importer(size: int, block: int) -> Any:
    """Maps all blocks and copies block 0 into its own until told to stop; a sticky error ends it and is reported."""

    def role(channel: Channel) -> None:
        began = time.monotonic()
        driver = Driver()
        driver.initialise()
        driver.enter()
        context_s = time.monotonic() - began
        fds = channel.receive(30)[1]
        began = time.monotonic()
        mapped = [Mapped(driver, driver.import_fd(fd), size) for fd in fds]
        attach_s = time.monotonic() - began
        _close(fds)
        channel.send({"context_s": context_s, "attach_s": attach_s})
        stream = driver.stream()
        host = (ctypes.c_ubyte * size)()
        rounds, copying = 0, False
        while True:
            if copying:
                for _ in range(_COPIES_IN_FLIGHT):
                    driver("cuMemcpyDtoDAsync_v2", mapped[block].pointer, mapped[0].pointer, size, stream)
                driver("cuStreamSynchronize", stream)
                rounds += 1
            if copying and not channel.waiting():
                continue
            command = channel.receive(600)[0]["do"]
            if command == "fill":
                data = pattern(size)
                driver("cuMemcpyHtoD_v2", mapped[0].pointer, data, size)
                channel.send({"filled": True})
            elif command == "copy":
                copying = True
                channel.send({"rounds": rounds})
            elif command == "rounds":
                channel.send({"rounds": rounds})
            elif command == "export":
                again = [driver.export_fd(one.handle) for one in mapped]
                channel.send({"exported": len(again)}, again)
                _close(again)
            elif command == "digests":
                digests = []
                for one in (mapped[0], mapped[block]):
                    driver("cuMemcpyDtoH_v2", host, one.pointer, size)
                    digests.append(digest(memoryview(host)))
                channel.send({"digests": digests})

    return role


def _legacy_exporter(size: int) -> Any:
    def role(channel: Channel) -> None:
        driver = Driver()
        driver.initialise()
        driver.enter()
        source, target = driver.allocate(size), driver.allocate(size)
        driver("cuMemcpyHtoD_v2", source, pattern(size), size)
        handle = IpcHandle()
        driver("cuIpcGetMemHandle", ctypes.byref(handle), source)
        channel.send({"handle": bytes(handle.bytes).hex()})
        stream = driver.stream()
        while True:
            for _ in range(_COPIES_IN_FLIGHT):
                driver("cuMemcpyDtoDAsync_v2", target, source, size, stream)
            driver("cuStreamSynchronize", stream)
            if channel.waiting():
                channel.receive(1)

    return role


def _legacy_importer(size: int, handle_hex: str) -> Any:
    def role(channel: Channel) -> None:
        driver = Driver()
        driver.initialise()
        driver.enter()
        handle = IpcHandle.from_buffer_copy(bytes.fromhex(handle_hex))
        shared = ctypes.c_uint64()
        driver("cuIpcOpenMemHandle_v2", ctypes.byref(shared), handle, 1)
        own = driver.allocate(size)
        stream = driver.stream()
        host = (ctypes.c_ubyte * size)()
        channel.send({"open": True})
        rounds = 0
        while True:
            for _ in range(_COPIES_IN_FLIGHT):
                driver("cuMemcpyDtoDAsync_v2", own, shared.value, size, stream)
            driver("cuStreamSynchronize", stream)
            rounds += 1
            if not channel.waiting():
                continue
            if channel.receive(600)[0]["do"] == "rounds":
                channel.send({"rounds": rounds})
            else:
                driver("cuMemcpyDtoH_v2", host, shared.value, size)
                channel.send({"digests": [digest(memoryview(host))]})

    return role


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


# The conductor. It never calls cuInit.


def _vmm(report: Report, size: int) -> None:
    right = digest(pattern(size))
    with ended_after() as children:
        owner = start("owner", _owner(size))
        relay = start("re-exporter", _owner(size))
        importers = [start(f"importer {i + 1}", _importer(size, i + 1)) for i in range(IMPORTERS)]
        children += [owner, relay, *importers]

        owner.channel.send({})
        answer, owner_fds = owner.hear_fds(timeout_s=20)
        report.measure("descriptor_kind", answer["kind"])
        report.find(f"An owner with cuInit and no context can make and export VMM memory: {answer['without_context']}.")
        kept: list[int] = []  # descriptors for the last part, if survivors cannot make any
        try:
            relay.channel.send({}, owner_fds)
            fds = relay.hear_fds(timeout_s=20)[1]
            report.find("A process can import a descriptor and export it again: yes.")
        except RoleFailed as error:
            report.find(f"A process can import a descriptor and export it again: NO ({error}).")
            fds, kept = owner_fds, [os.dup(fd) for fd in owner_fds]
        for importer in importers:
            importer.channel.send({}, fds)
        _close(list({*owner_fds, *fds}))  # from here on only the three kinds of processes keep the memory
        starts = [importer.hear(timeout_s=30) for importer in importers]
        report.measure("importer_start", starts)
        importers[0].ask({"do": "fill"}, timeout_s=30)
        for importer in importers:
            importer.ask({"do": "copy"}, timeout_s=10)
        time.sleep(0.3)

        _kill_and_check(report, "an importer", importers[2], importers[:2], right)
        if not kept:
            _kill_and_check(report, "the process that exported the descriptor", relay, importers[:2], right)
        _kill_and_check(report, "the owner", owner, importers[:2], right)

        if not kept:
            importers[0].channel.send({"do": "export"})
            kept = importers[0].hear_fds(timeout_s=10)[1]
            report.find("A survivor exports the memory again after the owner's death: yes.")
        for importer in importers[:2]:
            importer.kill()
            importer.reap(10)
        _from_bare_descriptors(report, children, kept, size, right)


def _kill_and_check(report: Report, whom: str, victim: Child, survivors: Sequence[Child], right: str) -> None:
    """SIGKILL the victim in mid-copy; the survivors must copy on and hold the right bytes."""
    before = [one.ask({"do": "rounds"}, timeout_s=10)["rounds"] for one in survivors]
    at = time.monotonic()
    victim.kill()
    end = victim.describe_end(15)
    report.measure(f"reaped_after_s: {whom}", time.monotonic() - at)
    time.sleep(0.4)
    problems = []
    for one, rounds in zip(survivors, before, strict=True):
        try:
            after = one.ask({"do": "rounds"}, timeout_s=10)["rounds"]
            if after <= rounds:
                problems.append(f"{one.name} made no progress")
            if any(found != right for found in one.ask({"do": "digests"}, timeout_s=20)["digests"]):
                problems.append(f"{one.name} sees other bytes")
        except RoleFailed as failed:
            problems.append(str(failed))
    verdict = "yes" if not problems else f"NO ({'; '.join(problems)})"
    report.find(f"VMM memory and its users survive SIGKILL of {whom} in mid-copy: {verdict} (victim: {end}).")


def _from_bare_descriptors(report: Report, children: list[Child], kept: list[int], size: int, right: str) -> None:
    """Every CUDA process is dead; the conductor, which never called cuInit, holds descriptors only."""
    time.sleep(0.2)
    late = start("late importer", _importer(size, 1))
    children.append(late)
    try:
        late.channel.send({}, kept)
        late.hear(timeout_s=20)
        found = late.ask({"do": "digests"}, timeout_s=20)["digests"][0]
        verdict = "yes" if found == right else "NO (other bytes)"
    except RoleFailed as error:
        verdict = f"NO ({error})"
    report.find(f"Bare descriptors in a process without CUDA keep the content while no CUDA process lives: {verdict}.")
    successor = start("successor of the owner", _owner(size))
    children.append(successor)
    try:
        successor.channel.send({}, kept)
        _close(successor.hear_fds(timeout_s=20)[1])
        verdict = "yes"
    except RoleFailed as error:
        verdict = f"NO ({error})"
    _close(kept)
    report.find(f"A successor of the owner takes the memory over from descriptors and exports it: {verdict}.")


def _legacy(report: Report, size: int) -> None:
    right = digest(pattern(size))
    with ended_after() as children:
        exporter = start("legacy exporter", _legacy_exporter(size))
        children.append(exporter)
        handle = exporter.hear(timeout_s=30)["handle"]
        importers = [start(f"legacy importer {i}", _legacy_importer(size, handle)) for i in range(2)]
        children += importers
        for importer in importers:
            importer.hear(timeout_s=30)
        importers[1].kill()
        importers[1].reap(10)
        time.sleep(0.2)
        survivor = importers[0]
        alive = "yes" if exporter.reap(0.0) is None else f"NO ({exporter.describe_end(0)})"
        report.find(f"cudaIpc: the exporter survives SIGKILL of an importer in mid-copy: {alive}.")
        _kill_legacy_exporter(report, exporter, survivor, right)


def _kill_legacy_exporter(report: Report, exporter: Child, survivor: Child, right: str) -> None:
    exporter.kill()
    exporter.reap(15)
    time.sleep(0.5)
    try:
        first = survivor.ask({"do": "rounds"}, timeout_s=10)["rounds"]
        time.sleep(0.3)
        second = survivor.ask({"do": "rounds"}, timeout_s=10)["rounds"]
        same = survivor.ask({"do": "digests"}, timeout_s=20)["digests"][0] == right
        verdict = f"{'yes' if second > first else 'NO PROGRESS'}, bytes {'intact' if same else 'CHANGED'}"
    except RoleFailed as error:
        verdict = f"NO ({error})"
    report.find(f"cudaIpc: an importer survives SIGKILL of the exporter in mid-copy: {verdict}.")
