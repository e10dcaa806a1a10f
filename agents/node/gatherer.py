"""Reads the telemetry of a node's workers, keeper and host, about once a second, in a thread of the agent.

Workers only write into shared memory; nothing here is ever waited for by them. What is read goes to the agent's metrics
and, in a bounded message, to the coordinator.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import psutil

from everstep.agents.analysis.step_times import StepSums
from everstep.agents.monitoring.metrics import NodeMetrics
from everstep.agents.monitoring.pages import Negotiated, PageServer
from everstep.checkpointing.access.client import KeeperClient, KeeperRefused
from everstep.comms.base.security import Security
from everstep.comms.control import telemetry_pb2 as pb
from everstep.elastic.contract.telemetry import SPANS_KEPT, Records, TelemetryReader
from everstep.elastic.protocol.events import WorkerId

from .host import HostReader
from .tracing import EndedSpans, pieces

PERIOD_S = 1.0
STEPS_PER_RANK = 32  # in one message
STEPS_PER_MESSAGE = 256
LINKS_PER_MESSAGE = 64
LAYERS_PER_MESSAGE = 1024  # of all ranks together, and those of one rank in any case
KEEPER_READINGS = 600
MESSAGES_PER_S = 500  # of all nodes together: agents of large jobs send less often


class _Watched:
    """A worker whose telemetry ring is read."""

    def __init__(self, worker: WorkerId, fd: int) -> None:
        self.id = worker
        self.reader = TelemetryReader(fd)
        self.sums = StepSums(worker.rank)
        self.kept: deque[Records] = deque()  # the newest spans, for traces
        self.kept_records = 0

    def read(self) -> list[pb.StepTimes]:
        records = self.reader.read()
        if len(records):
            self.kept.append(records)
            self.kept_records += len(records)
            while self.kept_records - len(self.kept[0]) >= SPANS_KEPT:
                self.kept_records -= len(self.kept.popleft())
        return self.sums.add(records)


class Gatherer:
    """The agent calls `watch` and `ended`; `send` gets a message about once a second, from another thread.

    `keeper` returns the address of the node's keeper and the token to use it; None while there is none. `ranks` returns
    what the workers do now. Metrics are served at `serve_at` (host:port), if given. Raises AddressTaken if the address
    is in use.
    """

    def __init__(
        self,
        job: str,
        node: str,
        send: Callable[[pb.Telemetry], None],
        keeper: Callable[[], tuple[str, str] | None] = lambda: None,
        ranks: Callable[[], Sequence[pb.RankState]] = tuple,
        *,
        keeper_limit_bytes: int = 0,
        serve_at: str = "",
        security: Security | None = None,
        period_s: float = PERIOD_S,
    ) -> None:
        self._send = send
        self._where_keeper_is = keeper
        self._ranks = ranks
        self._metrics = NodeMetrics(job, node)
        self._keeper_limit_bytes = keeper_limit_bytes
        self._pages: PageServer | None = None
        if serve_at:
            pages = {"/metrics": Negotiated(self._metrics.answer)}
            self._pages = PageServer(serve_at, pages, security or Security())
        self._period_s = period_s
        self._lock = threading.Lock()
        self._watched: dict[WorkerId, _Watched] = {}
        self._finished: list[pb.StepTimes] = []  # not sent yet
        self._nodes = 1
        self._missed_spans = 0  # of workers that have ended
        self._layers_from = 0  # counts the workers whose layers were sent
        self._left_out = 0
        self._keeper: KeeperClient | None = None
        self._keeper_work: deque[pb.KeeperWork] = deque(maxlen=KEEPER_READINGS)
        self._former = EndedSpans()
        self._telling = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="everstep-gatherer", daemon=True)

    @property
    def url(self) -> str:
        """Where metrics are served; empty if they are not."""
        return f"{self._pages.url}/metrics" if self._pages is not None else ""

    def start(self) -> None:
        self._thread.start()

    def watch(self, worker: WorkerId, fd: int, nodes: int = 1) -> None:
        """A worker was started in a job of so many nodes; `fd` is its progress page's, and may be closed then."""
        with self._lock:
            self._nodes = nodes
            self._watched[worker] = _Watched(worker, fd)

    def ended(self, worker: WorkerId) -> None:
        """A worker is gone: read its ring for the last time."""
        with self._lock:
            watched = self._watched.pop(worker, None)
            if watched is not None:
                self._read(watched)
                self._missed_spans += watched.reader.missed
                self._former.add(worker, watched.kept)
                watched.reader.close()
                self._metrics.worker_ended(worker.rank)

    def spans(self) -> list[tuple[WorkerId, list[Records]]]:
        """This node's part of a trace: the newest spans of each worker, also of recently ended ones, oldest first."""
        with self._lock:
            for watched in self._watched.values():
                self._read(watched)
            alive = [(watched.id, list(watched.kept)) for watched in self._watched.values()]
            return [*self._former.items(), *alive]

    def tell_spans(self, asked: pb.AskSpans, answer: Callable[[pb.Spans], None]) -> None:
        """Answer piece by piece, from a thread: not while another answer is being given."""

        def tell() -> None:
            with self._telling:
                for piece in pieces(asked, self.spans(), list(self._keeper_work)):
                    answer(piece)

        if not self._telling.locked():
            threading.Thread(target=tell, name="everstep-spans", daemon=True).start()

    def close(self) -> None:
        """Stop reading."""
        self._closing.set()
        if self._pages is not None:
            self._pages.close()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * self._period_s)
        with self._lock:
            for watched in self._watched.values():
                watched.reader.close()
            self._watched.clear()
        if self._keeper is not None:
            self._keeper.close()

    def _run(self) -> None:
        host = HostReader()
        due_s = 0.0
        while not self._closing.wait(self._period_s):
            with contextlib.suppress(OSError, psutil.Error):  # retried at the next turn
                reading, gpus = self.look(host)
                if time.monotonic() >= due_s:
                    due_s = time.monotonic() + max(self._period_s, self._nodes / MESSAGES_PER_S) - self._period_s / 2
                    self._send(self.message(reading, gpus))
        host.close()

    def look(self, host: HostReader) -> tuple[pb.HostReading, list[pb.GpuReading]]:
        """Read everything once, for the metrics here."""
        reading, gpus = host.read(self._ask_keeper(), self._keeper_limit_bytes), host.gpus()
        work = (time.monotonic(), reading.keeper_bytes, reading.parity_bytes)
        self._keeper_work.append(pb.KeeperWork(at_s=work[0], bytes=work[1], parity_bytes=work[2]))
        with self._lock:
            for watched in self._watched.values():
                self._read(watched)
            self._metrics.host(reading, gpus, self._missed())
        return reading, gpus

    def _missed(self) -> int:
        return self._missed_spans + sum(watched.reader.missed for watched in self._watched.values())

    def message(self, reading: pb.HostReading, gpus: list[pb.GpuReading]) -> pb.Telemetry:
        """The report for the coordinator: all telemetry since the last report, within bounds."""
        with self._lock:
            links = [link for watched in self._watched.values() for link in watched.sums.links()]
            layers = self._layers()
            steps, self._finished = self._finished, []
            missed = self._missed()
        links.sort(key=lambda link: link.send_s + link.receive_s + link.wait_s, reverse=True)
        return pb.Telemetry(
            at_s=time.monotonic(),
            unix_s=time.time(),
            steps=steps,
            ranks=self._ranks(),
            links=links[:LINKS_PER_MESSAGE],
            layers=layers,
            host=reading,
            gpus=gpus,
            missed_spans=missed,
            left_out=self._left_out,
            metrics=self._pages.address if self._pages is not None else "",
        )

    def _layers(self) -> list[pb.LayerTimes]:
        """What layers cost, of as many workers as a message has room for; the others are next."""
        found: list[pb.LayerTimes] = []
        waiting = list(self._watched.values())
        turn = self._layers_from % len(waiting) if waiting else 0
        for watched in (*waiting[turn:], *waiting[:turn]):
            if sum(len(times.layer) for times in found) >= LAYERS_PER_MESSAGE:
                break
            found.append(watched.sums.layers())
            self._layers_from += 1
        return [times for times in found if times.layer]

    def _read(self, watched: _Watched) -> None:
        ended = watched.read()
        self._left_out += max(0, len(ended) - STEPS_PER_RANK)
        self._finished += ended[-STEPS_PER_RANK:]
        self._left_out += max(0, len(self._finished) - STEPS_PER_MESSAGE)
        del self._finished[:-STEPS_PER_MESSAGE]
        self._metrics.worker(watched.id.rank, watched.sums.totals, ended)

    def _ask_keeper(self) -> dict[str, float] | None:
        """The keeper's statistics; None while it is unavailable."""
        place = self._where_keeper_is()
        try:
            if self._keeper is not None and (place is None or place[0] != self._keeper.address):
                self._forget_keeper()
            if place is None:
                return None
            if self._keeper is None:
                self._keeper = KeeperClient(*place, on_wait=self._patient)
            return self._keeper.ask({"op": "held"})
        except (OSError, ValueError, KeeperRefused, _Closing):
            self._forget_keeper()
            return None

    def _patient(self) -> None:
        if self._closing.is_set():
            raise _Closing

    def _forget_keeper(self) -> None:
        if self._keeper is not None:
            with contextlib.suppress(OSError):
                self._keeper.close()
            self._keeper = None


class _Closing(Exception):
    """The agent ends."""
