"""The mesh, with every transfer recorded as spans: sends, waits and receives, by peer."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from everstep.comms.mesh.communicator import Aborted, Key
from everstep.comms.mesh.mesh import MeshCommunicator

from .progress import Progress, Waits
from .telemetry import Spent

LEAST_WAIT_NS = 2000  # a message that is there already is not waited for


class TimedMesh(MeshCommunicator):
    """A mesh communicator that writes spans of its calls, and, while it waits, the ranks that it waits for."""

    def __init__(self, progress: Progress, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, on_wait=lambda: progress.tick(self._waits()), **settings)
        self._telemetry = progress.telemetry
        self._awaited: tuple[int, Collection[tuple[int, Key]]] | None = None

    def _waits(self) -> Waits | None:
        """The ranks that a call waits for now."""
        if self._awaited is None:
            return None
        since_ns, wanted = self._awaited
        return Waits(since_ns / 1e9, ranks=tuple(sorted({rank for rank, _ in wanted})))

    def send(self, to: int, key: Key, payload: Sequence[Tensor]) -> None:
        """See `Communicator.send`."""
        started = time.monotonic_ns()
        self._awaited = started, ((to, key),)
        try:
            super().send(to, key, payload)
        finally:
            self._awaited = None
        size = sum(tensor.nbytes for tensor in payload)
        self._telemetry.span(Spent.SEND, started, micro_batch=key.micro_batch, peer=to, amount=size)

    def receive_any(self, wanted: Collection[tuple[int, Key]]) -> tuple[int, Key, Tensor]:
        """See `Communicator.receive_any`."""
        started = time.monotonic_ns()
        telemetry = self._telemetry
        self._awaited = started, wanted
        try:
            source, key, data = super().receive_any(wanted)
        except Aborted:
            telemetry.span(Spent.WAIT, started)
            raise
        finally:
            self._awaited = None
        ended = time.monotonic_ns()
        began = min(max(started, self.began_ns), ended)
        if began - started > LEAST_WAIT_NS:
            telemetry.span(Spent.WAIT, started, micro_batch=key.micro_batch, peer=source, end_ns=began)
        else:
            began = started
        telemetry.span(Spent.RECEIVE, began, micro_batch=key.micro_batch, peer=source, amount=data.nbytes, end_ns=ended)
        return source, key, data
