"""A node's self-test before it joins: `quick` takes some hundredths of a second, `full` some seconds.

The matrix product is of integers in floating point, chosen so that every partial sum is exact: any library, blocking
or instruction set gives the same result to the last bit, so one digest is valid for all machines.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import tempfile
import threading
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import psutil
from numpy.typing import NDArray

from everstep.comms.base.process import own_command

LEVELS = ("off", "quick", "full")
INJECTED = "unhealthy"  # kind of an injected fault: its `figures` replace the measured ones
GPUS_S = 60.0


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    size: int  # of the matrices
    digest: int  # of their product
    products: int
    copy_bytes: int
    copies: int
    loopback_bytes: int


QUICK = Extent(size=192, digest=3_122_797_648, products=4, copy_bytes=8 << 20, copies=4, loopback_bytes=4 << 20)
FULL = Extent(size=1024, digest=172_821_575, products=8, copy_bytes=256 << 20, copies=4, loopback_bytes=64 << 20)


def measure(level: str, host: str, coordinator_unix_s: float, faults: str = "") -> dict[str, float]:
    """The figures of this node, by name; none if `level` is off.

    `host`: its address; `coordinator_unix_s`: the coordinator's wall clock now, 0 if unknown; `faults`: injected
    faults, as JSON.
    """
    if level == "off":
        return {}
    began_s, ahead_s = time.monotonic(), time.time() - coordinator_unix_s
    extent = QUICK if level == "quick" else FULL
    figures = {**_products(extent), **_copies(extent), **_loopback(extent), **_room(), **_interface(host)}
    if coordinator_unix_s:
        figures["clock_ahead_s"] = ahead_s
    if level == "full":
        figures |= _gpus()
    figures |= _injected(faults)
    figures["check_s"] = time.monotonic() - began_s
    return {name: round(value, 4) for name, value in figures.items()}


def operands(size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Two matrices of whole numbers of 20 bits: a sum of 2^13 of their products is still exact in float64."""
    rows, columns = np.indices((size, size), dtype=np.int64)
    left = (rows * 7919 + columns * 104_729 + 17) % (1 << 20) - (1 << 19)
    right = (rows * 15_485_863 + columns * 611_953 + 29) % (1 << 20) - (1 << 19)
    return left, right


def digest_of(product: NDArray[np.float64]) -> int:
    return zlib.crc32(np.ascontiguousarray(product.astype("<i8")).data)


def _products(extent: Extent) -> dict[str, float]:
    left, right = (matrix.astype(np.float64) for matrix in operands(extent.size))
    wrong, least_s = 0, float("inf")
    for _ in range(extent.products):
        began_s = time.perf_counter()
        product = left @ right
        least_s = min(least_s, time.perf_counter() - began_s)
        wrong += digest_of(product) != extent.digest
    return {
        "product_wrong": wrong,
        "product_runs": extent.products,
        "product_flops": 2 * extent.size**3 / max(least_s, 1e-9),
    }


def _copies(extent: Extent) -> dict[str, float]:
    source = np.arange(extent.copy_bytes // 8, dtype=np.uint64)
    source *= np.uint64(0x9E37_79B9_7F4A_7C15)  # every bit is set somewhere
    target = np.zeros_like(source)
    wrong, least_s = 0, float("inf")
    for _ in range(extent.copies):
        began_s = time.perf_counter()
        np.copyto(target, source)
        least_s = min(least_s, time.perf_counter() - began_s)
        wrong += not np.array_equal(target, source)
        np.bitwise_not(source, out=source)
    return {
        "copy_wrong": wrong,
        "copy_runs": extent.copies,
        "copy_bytes_per_s": source.nbytes / max(least_s, 1e-9),
    }


def _loopback(extent: Extent) -> dict[str, float]:
    """TCP throughput to this host itself; nothing without a loopback interface."""
    block = bytes(1 << 18)
    with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5.0)
        with socket.create_connection(server.getsockname(), timeout=5.0) as sender:
            receiver, peer = server.accept()
            with receiver:
                if peer != sender.getsockname():
                    return {}
                receiver.settimeout(5.0)
                count = max(1, extent.loopback_bytes // len(block))
                thread = threading.Thread(target=_send, args=(sender, block, count))
                began_s = time.perf_counter()
                thread.start()
                left = count * len(block)
                while left and (part := len(receiver.recv(1 << 20))):
                    left -= part
                took_s = time.perf_counter() - began_s
                thread.join()
                return {"loopback_bytes_per_s": (count * len(block) - left) / max(took_s, 1e-9)}
    return {}


def _send(sender: socket.socket, block: bytes, count: int) -> None:
    with contextlib.suppress(OSError):
        for _ in range(count):
            sender.sendall(block)


def _room() -> dict[str, float]:
    figures = {"memory_available_bytes": float(psutil.virtual_memory().available)}
    for name, path in (("work_free_bytes", "."), ("temporary_free_bytes", tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            if os.access(path, os.W_OK):  # what is only read has no room, and needs none
                figures[name] = float(psutil.disk_usage(path).free)
    return figures


def _interface(host: str) -> dict[str, float]:
    """The speed reported by the interface that has our address; many virtual interfaces report none."""
    with contextlib.suppress(OSError):
        known = psutil.net_if_stats()
        for name, addresses in psutil.net_if_addrs().items():
            if any(one.address == host for one in addresses) and name in known and 0 < known[name].speed < 65535:
                return {"interface_bits_per_s": known[name].speed * 1e6}
    return {}


def _gpus() -> dict[str, float]:
    """Runs in a separate process, since using a device here would initialise it for good."""
    command = own_command("everstep.agents.node.gpu_checkup")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GPUS_S, check=True)
        answer = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {"gpu_wrong": 1.0}  # it hung, or ended without an answer
    return {str(name): float(value) for name, value in answer.items()}


def _injected(faults: str) -> Mapping[str, float]:
    found: dict[str, float] = {}
    for fault in json.loads(faults) if faults else ():
        if fault.get("kind") == INJECTED:
            found |= fault.get("figures", {"product_wrong": 1.0})
    return found
