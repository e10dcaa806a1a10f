"""A worker's view of the membership: from its node agent, or, in a script without the launcher, by itself."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from everstep.comms.mesh.communicator import Aborted, Peer
from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.events import Job, Saved
from everstep.elastic.protocol.worker_messages import FromWorker, ToWorker, read_order, write
from everstep.resharding.placement import Placement
from everstep.resharding.plan import (
    Plan,
    Report,
    plan_resume,
    plan_start,
)
from everstep.resharding.planners import initial_layout

from .collectives import group
from .errors import JobEnded, UsageError
from .notices import Shown

MESSAGE_BYTES = 128 << 20  # of one message between a worker and its agent; gRPC's limit on the way on is twice that


@dataclass(frozen=True)
class Orders:
    """A plan, and where to reach the others."""

    plan: Plan
    peers: Mapping[int, Peer]
    keepers: Mapping[str, str]  # node -> address
    placement: Placement
    nodes: Mapping[int, str]  # rank -> node


class Conclusion(NamedTuple):
    """No rank trains beyond `version`: save it as the checkpoint `name`, if one is required."""

    version: int
    name: str


class Membership(ABC):
    """The side of the control plane that `worker` has."""

    def __init__(self, worker: e.WorkerId) -> None:
        self.worker = worker
        self._on_abort: Callable[[], None] = lambda: None
        self.save_asked = False  # a checkpoint is requested now
        self.lost_group: object | None = None  # that the script had made by then: it cannot be used any more
        self.changed = worker.incarnation > 0  # members were lost or joined; for a replacement, before it began
        self.conclusion: Conclusion | None = None  # is due

    def ask_save(self) -> None:
        """A checkpoint is requested. Safe in a signal handler."""
        self.save_asked = True

    def save_answered(self) -> None:
        """A checkpoint was saved since it was requested."""
        self.save_asked = False

    def take_conclusion(self) -> Conclusion | None:
        """The conclusion that is due, which this rank carries out."""
        conclusion, self.conclusion = self.conclusion, None
        return conclusion

    @abstractmethod
    def declare(self) -> None:
        """This script is elastic."""

    @abstractmethod
    def ready(self, peer: Peer, job: Job, saved: Sequence[Saved], memory_bytes: int, abort: Callable[[], None]) -> None:
        """This worker has built its model, and found these checkpoints, newest first.

        `abort` is called from now on, in any thread, when the worker has to stop waiting for other ranks.
        """

    @abstractmethod
    def orders(self, on_wait: Callable[[], None]) -> Orders:
        """Wait for a plan that is not out of date.

        Raises Aborted when a report is due again first, JobEnded when the job is over.
        """

    @abstractmethod
    def report(self, make: Callable[[int], Report]) -> None:
        """Answer the newest abort with the report that `make` gives for its generation."""

    @abstractmethod
    def proposed(self, last: bool) -> Orders | None:
        """A join or leave that waits for the members to switch. `last`: no further step will ask."""

    @abstractmethod
    def superseded(self, generation: int) -> bool:
        """Whether `generation` is over already."""

    @abstractmethod
    def begun(self, step: int) -> None:
        """This worker needs others for `step` now. Raises Aborted if no other rank trains that far."""

    @abstractmethod
    def interrupted(self) -> bool:
        """Whether a report is due, or the job has ended."""

    @abstractmethod
    def tell(self, message: FromWorker) -> None:
        """Send the coordinator a message that needs no answer."""

    def note(self, what: str, fields: Mapping[str, Any]) -> None:
        """Have a line written to the event log. Values of `fields` are JSON."""
        self.tell(e.WorkerNoted(self.worker, what, fields))

    @abstractmethod
    def wait_for_end(self, on_wait: Callable[[], None]) -> bool:
        """Wait until training is over (True), or a report or the last checkpoint is due (False).

        Raises JobEnded when the job is over.
        """


class Solo(Membership):
    """A script started without the launcher: one worker, which is all the members."""

    def __init__(self) -> None:
        super().__init__(e.WorkerId(0, 0))
        self._orders: Orders | None = None
        self._saved: list[Saved] = []  # the checkpoints that can be resumed from, newest first
        self._older = False  # whether a damaged checkpoint may be skipped
        self._shown = Shown()
        self._newest = -1  # the newest version that is saved
        self.lost = ""  # the state that is not saved at the end, and why

    def declare(self) -> None:
        pass

    def ready(self, peer: Peer, job: Job, saved: Sequence[Saved], memory_bytes: int, abort: Callable[[], None]) -> None:
        self._on_abort = abort
        # One process holds all layers for any number of `stages`: the layout does not change the results.
        layout = initial_layout(job.model, [0], 1, job.micro_batches)
        nowhere = Placement(generation=1, width=0, losses=0, wanted=0, stripes=())
        self._saved, self._older = list(saved), job.on_damage == "older"
        self._newest = max((item.version for item in saved), default=-1)
        self._orders = Orders(plan_start(layout), {0: peer}, {}, nowhere, {0: ""})
        self._job = job
        if saved:
            self._resume(1)

    def _resume(self, generation: int) -> None:
        """Resume from the newest remaining checkpoint."""
        assert self._orders is not None
        newest, layout = self._saved[0], replace(self._orders.plan.layout, generation=generation)
        plan = plan_resume(self._job.model, layout, newest.version, newest.agreement, newest.name)
        self._orders = replace(self._orders, plan=plan)

    def orders(self, on_wait: Callable[[], None]) -> Orders:
        assert self._orders is not None
        return self._orders

    def report(self, make: Callable[[int], Report]) -> None:
        """No coordinator needs a report; the next plan exists already."""

    def proposed(self, last: bool) -> Orders | None:
        return None

    def superseded(self, generation: int) -> bool:
        return False

    def begun(self, step: int) -> None:
        """There are no others."""

    def interrupted(self) -> bool:
        return False

    def tell(self, message: FromWorker) -> None:
        if isinstance(message, e.CheckpointSaved):
            self._newest = max(self._newest, message.saved.version)
        elif isinstance(message, e.WorkerFinished):
            self._last = Conclusion(message.version, message.name)
            saves = self._job.checkpoints and message.version > max(0, self._newest)
            self.conclusion = self._last if saves else None
        elif isinstance(message, e.WorkerConcluded):
            if self._newest < self._last.version:
                newest = f"the newest checkpoint is of {self._newest} steps" if self._newest >= 0 else "there is none"
                why = message.why or "it did not get whole"
                self.lost = f"the state after {self._last.version} steps is not saved ({why}); {newest}"
                print(f"everstep: error: {self.lost}", file=sys.stderr, flush=True)
        elif isinstance(message, e.CheckpointUnreadable):
            self._saved = [item for item in self._saved if item.name != message.name]
            if not self._older or not self._saved:
                raise UsageError(message.why)
            assert self._orders is not None
            print(f"everstep: {message.why}: the checkpoint before it is used", file=sys.stderr, flush=True)
            self._resume(self._orders.plan.generation + 1)
            self._on_abort()

    def note(self, what: str, fields: Mapping[str, Any]) -> None:
        if what == "checkpoint_failed":
            print(f"everstep: a checkpoint could not be saved: {fields['why']}", file=sys.stderr, flush=True)
        elif what == "warning" and self._shown.first(fields["notice"], fields["text"]):
            print(f"everstep: warning: {fields['text']} [{fields['notice']}]", file=sys.stderr, flush=True)

    def wait_for_end(self, on_wait: Callable[[], None]) -> bool:
        return self.conclusion is None


class AgentMembership(Membership):
    """The control channel to the node agent: JSON lines, read by a thread of its own."""

    def __init__(self, fd: int, worker: e.WorkerId) -> None:
        super().__init__(worker)
        self._socket = socket.socket(fileno=fd)
        self._changed = threading.Condition()
        self._send_lock = threading.Lock()
        self._aborted = 0  # the newest generation that this worker was ordered to stop for
        self._aborted_at = 0.0
        self._reported = 0  # the newest generation that this worker has reported for
        self._orders: Orders | None = None
        self._proposal: Orders | None = None
        self._past_last = False
        self._begun = -1  # the last step that needed other ranks here
        self._left_at: int | None = None  # some rank has left the loop at this version
        self._trained = False
        self._ended = False
        threading.Thread(target=self._listen, name="everstep-control", daemon=True).start()

    def _listen(self) -> None:
        with self._socket.makefile("rb") as stream:
            for line in stream:
                self._heard(read_order(self.worker, line.decode()))
        os._exit(1)  # the agent is gone: this worker cannot continue without it

    def _heard(self, message: ToWorker) -> None:
        with self._changed:
            if isinstance(message, e.AbortGeneration) and message.generation > self._aborted:
                self._aborted, self._aborted_at = message.generation, time.monotonic()
                self._proposal = None
                self.conclusion = None
                self.changed, self.lost_group = True, group()
                self._on_abort()
            elif isinstance(message, e.CarryOut):
                self._take(message)
            elif isinstance(message, e.AskSave):
                self.save_asked = True
            elif isinstance(message, e.TellLeft):
                self._left_at = message.version
                self._tell_if_past()
            elif isinstance(message, e.Conclude):
                self.conclusion = Conclusion(message.version, message.name)
                if self._begun >= self.conclusion.version:  # else it has that step before it to do, as all others have
                    self._on_abort()
            elif isinstance(message, e.EndTraining):
                self._trained = True
            elif isinstance(message, e.EndWorker):
                self._ended = True
                self._on_abort()
            self._changed.notify_all()

    def _take(self, message: e.CarryOut) -> None:
        plan = message.plan
        peers = {rank: Peer(**peer) for rank, peer in message.peers.items()}
        orders = Orders(plan, peers, message.keepers, message.placement, message.nodes)
        if plan.generation < self._aborted:
            return
        if plan.version is None and self.worker.rank not in plan.fresh:
            if self._past_last:
                self.tell(e.WorkerIdled(self.worker, plan.generation))
            else:
                self._proposal = orders
        else:
            self._orders = orders

    def declare(self) -> None:
        self.tell(e.WorkerDeclaredElastic(self.worker))

    def ready(self, peer: Peer, job: Job, saved: Sequence[Saved], memory_bytes: int, abort: Callable[[], None]) -> None:
        self._on_abort = abort
        self.tell(e.WorkerReady(self.worker, asdict(peer), job, tuple(saved), memory_bytes))

    def orders(self, on_wait: Callable[[], None]) -> Orders:
        with self._changed:
            while True:
                if self._ended:
                    raise JobEnded
                if self._aborted > self._reported:
                    raise Aborted(self._aborted)  # before the plan for the last report came
                if self._orders is not None and self._orders.plan.generation >= self._aborted:
                    orders, self._orders = self._orders, None
                    return orders
                self._changed.wait(0.05)
                on_wait()

    def report(self, make: Callable[[int], Report]) -> None:
        with self._changed:
            if self._ended:
                raise JobEnded
            generation, since = self._aborted, self._aborted_at
            self._reported = generation
        report = make(generation)
        self.tell(e.WorkerReported(self.worker, generation, report, time.monotonic() - since))

    def superseded(self, generation: int) -> bool:
        with self._changed:
            return self._ended or self._aborted > generation

    def begun(self, step: int) -> None:
        with self._changed:
            self._begun = step
            self._tell_if_past()
            if self.conclusion is not None and step >= self.conclusion.version:
                raise Aborted(self._reported)

    def _tell_if_past(self) -> None:
        """Report to the coordinator if this rank continues the loop past the version at which another rank left it."""
        if self._left_at is not None and self._begun >= self._left_at:
            self.tell(e.WorkerWentOn(self.worker, self._begun))

    def interrupted(self) -> bool:
        with self._changed:
            return self._ended or self._aborted > self._reported

    def proposed(self, last: bool) -> Orders | None:
        with self._changed:
            self._past_last = self._past_last or last
            proposal = self._proposal
            if last:
                self._proposal = None
            return proposal

    def tell(self, message: FromWorker) -> None:
        line = write(message).encode() + b"\n"
        if len(line) > MESSAGE_BYTES:
            kind = type(message).__name__
            raise UsageError(
                f"a message of this worker to its node agent ({kind!r}) has {len(line) / 2**20:.0f} MiB, and the limit "
                f"is {MESSAGE_BYTES >> 20} MiB: it grows with the number of parameters and of registered states"
            )
        with self._send_lock:
            self._socket.sendall(line)

    def wait_for_end(self, on_wait: Callable[[], None]) -> bool:
        with self._changed:
            while not self._trained and self.conclusion is None and self._aborted <= self._reported:
                if self._ended:
                    raise JobEnded
                self._changed.wait(0.05)
                on_wait()
            return self._trained
