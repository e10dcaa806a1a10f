"""torch on the GPU, or on the CPU in a rehearsal: the tests go through this, so that their logic runs anywhere."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable
from typing import Any

import torch
from options import in_rehearsal
from torch import Tensor


def device() -> torch.device:
    """The device that tests run on."""
    return torch.device("cpu" if in_rehearsal() else "cuda:0")


def synchronise() -> None:
    """Wait for everything that was launched."""
    if not in_rehearsal():
        torch.cuda.synchronize()


class _NoStream:
    """A stream of the rehearsal: work is done when it is asked for."""

    cuda_stream = 0

    def synchronize(self) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass


def new_stream() -> Any:
    """A stream beside the current one."""
    return _NoStream() if in_rehearsal() else torch.cuda.Stream()


def on(stream: Any) -> contextlib.AbstractContextManager[Any]:
    """Launch inside the block goes to that stream."""
    return contextlib.nullcontext() if in_rehearsal() else torch.cuda.stream(stream)


def device_seconds(work: Callable[[], Any], *, repeats: int, warm_up: int = 2) -> list[float]:
    """Device time of each repetition, by events (wall time in a rehearsal).

    Without warm-up nothing is waited for before, so that work on other streams goes on beside it.
    """
    for _ in range(warm_up):
        work()
    if warm_up:
        synchronise()
    seconds = []
    for _ in range(repeats):
        if in_rehearsal():
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
            continue
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        stop.record()
        stop.synchronize()
        seconds.append(start.elapsed_time(stop) / 1000)
    return seconds


def spin_for(seconds: float) -> None:
    """Launch one kernel that runs for about that long, and return at once. It ends by itself."""
    if not in_rehearsal():
        torch.cuda._sleep(int(seconds * 1.7e9))  # cycles


def pinned(size: int) -> Tensor:
    """Pinned host bytes."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=not in_rehearsal())


def free_bytes() -> int:
    """Free device memory."""
    return 1 << 30 if in_rehearsal() else int(torch.cuda.mem_get_info()[0])


class _DevicePointer:
    """Raw device memory for torch.as_tensor."""

    def __init__(self, pointer: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
            "strides": None,
        }


def bytes_at(pointer: int, size: int) -> Tensor:
    """Device memory of the driver's as a torch tensor of bytes; nobody owns it."""
    if in_rehearsal():
        return torch.frombuffer((ctypes.c_ubyte * size).from_address(pointer), dtype=torch.uint8)
    return torch.as_tensor(_DevicePointer(pointer, size), device="cuda:0")


def host_bytes(memory: Any) -> Tensor:
    """A writable buffer (an mmap, say) as a torch tensor of bytes, not copied."""
    return torch.frombuffer(memory, dtype=torch.uint8)


def no_memory_error() -> type[BaseException]:
    """What torch raises when the device has no memory left."""
    return torch.OutOfMemoryError
