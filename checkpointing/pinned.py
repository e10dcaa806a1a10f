"""Copies from a GPU behind its compute: on a stream of their own, into snapshot memory that is pinned where it lies.

Not run anywhere yet: it was written without a GPU at hand. On the CPU nothing of it is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .record import Record
from .segment import Segment


class Pinned:
    """The side stream of a worker's snapshots, and the segments that are pinned for it."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._segments: set[int] = set()

    def after_compute(self, device: torch.device) -> None:
        """Copies begun from now on see what the compute stream has been told to do so far."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def copy(self, record: Record, room: Tensor, segment: Segment) -> None:
        """Write a record whose tensors are on a GPU; returns when the bytes are there."""
        assert self._stream is not None
        self._pin(segment)
        with torch.cuda.stream(self._stream):
            record.write_from_device(room)
        self._stream.synchronize()

    def _pin(self, segment: Segment) -> None:
        """Register the segment's memory with the driver, once; if it refuses, copies are slower, and right."""
        if id(segment) in self._segments:
            return
        self._segments.add(id(segment))
        whole = torch.frombuffer(segment.memory, dtype=torch.uint8)
        torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), whole.numel(), 0)  # type: ignore[no-untyped-call]
