"""The coordinator's shell: feeds events to the pure machine, carries out its effects, keeps its event log."""

from __future__ import annotations

import json
import queue
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ..comms import everstep_pb2 as pb
from ..comms.rpc import Session, serve
from ..elastic.protocol import coordinator
from ..elastic.protocol import events as e
from ..elastic.protocol.protection import describe_protection
from ..elastic.protocol.state import Config
from ..resharding.plan import Report
from ..resharding.units import ModelSpec

TICK_S = 0.1
PROTOCOL = 1
REMEMBERED_STEPS = 2000
CLOCK_TRUST_S = 60.0  # a node's monotonic clock that is further off than this is another machine's


class PortTaken(Exception):
    """The coordinator's address is in use."""


class CoordinatorServer:
    """One job's coordinator: a gRPC server, and one thread that owns the state."""

    def __init__(
        self, job: str, config: Config, address: str, *, events: TextIO | None = None, store_host: str = "127.0.0.1"
    ) -> None:
        self.job = job
        self._state = coordinator.initial_state(config, time.monotonic())
        self._queue: queue.SimpleQueue[tuple[Session | None, Any]] = queue.SimpleQueue()
        self._sessions: dict[str, Session] = {}
        self._token = secrets.token_hex(16)
        self._events = events
        self.listeners: list[Callable[[Mapping[str, Any]], None]] = []
        self._store = TCPStore(store_host, 0, is_master=True, wait_for_workers=False)
        self._store_attempt = 0
        self._store_host = store_host
        self._committed_s: dict[int, float] = {}  # step -> when
        self.ended = threading.Event()
        served = serve(address, self)
        if served is None:
            raise PortTaken(address)
        self._server, self.port = served
        self._thread = threading.Thread(target=self._run, name="everstep-coordinator", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ called by gRPC threads

    def deliver(self, session: Session, request: pb.AttachRequest) -> None:
        """A message from an agent."""
        self._queue.put((session, request))

    def lost(self, session: Session, why: str) -> None:
        """An agent's stream ended."""
        self._queue.put((session, why))

    def status(self) -> str:
        """A summary, as JSON."""
        state = self._state
        return json.dumps(
            {
                "job": self.job,
                "phase": state.phase.value,
                "generation": state.layout.generation if state.layout else 0,
                "committed_step": state.committed,
                "steps": state.job.steps if state.job else None,
                "layout": state.layout.describe() if state.layout else None,
                "protection": describe_protection(state.job.protection, state.placement)
                if state.job and state.placement
                else None,
                "exposure": self._exposure(),
                "checkpoint": {"steps": state.saved[0].version, "name": state.saved[0].name} if state.saved else None,
                "nodes": sorted(state.nodes),
                "workers": {str(w.id.rank): w.status.value for w in state.workers.values()},
            }
        )

    def _exposure(self) -> dict[str, float | None] | None:
        """What the loss of a node would take along: versions, and seconds since the one that outlives it was made."""
        state = self._state
        if state.placement is None or not state.placement.stripes:
            return None
        made_s = self._committed_s.get(state.protected - 1)
        seconds = round(time.monotonic() - made_s, 3) if made_s is not None else None
        return {"steps": state.committed + 1 - state.protected, "seconds": seconds}

    def close(self) -> None:
        """Stop serving."""
        self._queue.put((None, None))
        self._thread.join(timeout=5)
        for session in self._sessions.values():
            session.end()
        self._server.stop(grace=1.0).wait(timeout=5)

    # ------------------------------------------------------------ the one thread

    def _run(self) -> None:
        next_tick = time.monotonic()
        while True:
            timeout = max(0.0, next_tick - time.monotonic())
            try:
                session, item = self._queue.get(timeout=timeout)
            except queue.Empty:
                next_tick = time.monotonic() + TICK_S
                self._step(e.Ticked())
                continue
            if session is None:
                return
            try:
                event = self._event(session, item)
                if event is not None:
                    self._step(event)
            except Exception as error:  # a bug of ours: end the job rather than let it stand still
                trace = traceback.format_exc()
                self._end(e.EndJob(False, f"the coordinator failed, a bug of everstep: {error!r}", trace))
                return

    def _event(self, session: Session, item: pb.AttachRequest | str) -> e.Event | None:
        if isinstance(item, str):
            if self._sessions.get(session.node) is session:
                del self._sessions[session.node]
                return e.NodeLost(session.node, item)
            return None
        body = item.WhichOneof("body")
        if body == "hello":
            self._greet(session, item.hello)
            return None
        if self._sessions.get(session.node) is not session:
            return None  # has not said hello, or was declared lost: nothing it says counts
        if body == "ready":
            ready = item.ready
            return e.NodeJoined(session.node, ready.host, ready.slots, ready.keeper, ready.order, ready.memory_bytes)
        if body == "heartbeat":
            session.send(heartbeat=pb.Heartbeat())
            return e.HeartbeatReceived(session.node)
        if body == "died":
            return self._died(item.died)
        if body == "stop":
            return e.StopRequested(item.stop.why)
        if body == "from_worker":
            return worker_event(_worker_id(item.from_worker.worker), json.loads(item.from_worker.json))
        return None

    def _greet(self, session: Session, hello: pb.Hello) -> None:
        if hello.job != self.job or hello.protocol != PROTOCOL:
            why = f"this coordinator runs job {self.job!r}, protocol {PROTOCOL}; the node asked for {hello.job!r}, "
            session.send(refused=pb.Refused(why=f"{why}protocol {hello.protocol}"))
        elif hello.node in self._sessions:
            session.send(refused=pb.Refused(why=f"a node named {hello.node!r} is in the job already"))
        else:
            session.node = hello.node
            self._sessions[hello.node] = session
            session.send(welcome=pb.Welcome(token=self._token))

    @staticmethod
    def _died(died: pb.WorkerDied) -> e.WorkerDied:
        now = time.monotonic()

        def trusted(stamp: float) -> float:
            return stamp if 0 <= now - stamp <= CLOCK_TRUST_S else 0.0

        return e.WorkerDied(
            _worker_id(died.worker),
            died.cause,
            clean=died.clean,
            step=died.step,
            phase=died.phase,
            finished_micro_batches=died.finished_micro_batches,
            detected_at_s=trusted(died.detected_at_s),
            killed_at_s=trusted(died.killed_at_s),
        )

    def _step(self, event: e.Event) -> None:
        self._state, effects = coordinator.step(self._state, event, time.monotonic())
        for effect in effects:
            self._carry_out(effect)

    def _carry_out(self, effect: e.Effect) -> None:
        if isinstance(effect, e.CarryOut):
            self._to_worker(effect.worker, _plan_message(effect))
        elif isinstance(effect, e.AbortGeneration):
            self._to_worker(effect.worker, json.dumps({"kind": "abort", "generation": effect.generation}))
        elif isinstance(effect, e.AskSave):
            self._to_worker(effect.worker, json.dumps({"kind": "save"}))
        elif isinstance(effect, e.StartWorkers):
            self._send(effect.node, start=self._start_message(effect))
        elif isinstance(effect, e.KillWorkers):
            self._send(effect.node, kill=pb.KillWorkers(workers=[_proto(w) for w in effect.workers]))
        elif isinstance(effect, e.RefuseNode):
            self._send(effect.node, refused=pb.Refused(why=effect.why))
        elif isinstance(effect, e.FenceNode):
            session = self._sessions.pop(effect.node, None)
            if session is not None:
                session.send(fence=pb.Fence(why=effect.why))
                session.end()
        elif isinstance(effect, e.TellNode):
            self._send(effect.node, notice=pb.Notice(text=effect.text))
        elif isinstance(effect, e.Record):
            self._record({"event": effect.event, **effect.fields})
        else:
            self._end(effect)

    def _send(self, node: str, **body: Any) -> None:
        session = self._sessions.get(node)
        if session is not None:
            session.send(**body)

    def _to_worker(self, worker: e.WorkerId, text: str) -> None:
        known = self._state.workers.get(worker.rank)
        if known is not None:
            self._send(known.node, to_worker=pb.ToWorker(worker=_proto(worker), json=text))

    def _start_message(self, effect: e.StartWorkers) -> pb.StartWorkers:
        nodes = list(self._state.nodes)
        if effect.restart_count != self._store_attempt:
            # A store of its own for every attempt, as torchrun has: torch prefixes no keys by it.
            self._store = TCPStore(self._store_host, 0, is_master=True, wait_for_workers=False)
            self._store_attempt = effect.restart_count
        return pb.StartWorkers(
            workers=[_proto(w) for w in effect.workers],
            world_size=effect.world_size,
            restart_count=effect.restart_count,
            master_addr=self._store_host,
            master_port=self._store.port,
            group_rank=nodes.index(effect.node),
            group_world_size=len(nodes),
        )

    def _end(self, effect: e.EndJob) -> None:
        self._record({"event": "ended", "succeeded": effect.succeeded, "why": effect.why})
        for session in self._sessions.values():
            end = pb.EndJob(succeeded=effect.succeeded, why=effect.why, detail=effect.detail, rank=effect.rank)
            session.send(end=end)
        self.ended.set()

    def _record(self, fields: Mapping[str, Any]) -> None:
        line = {"at_s": time.monotonic(), **fields}
        if fields["event"] == "committed":
            self._committed_s[fields["step"]] = line["at_s"]
            self._committed_s.pop(fields["step"] - REMEMBERED_STEPS, None)
        if self._events is not None:
            self._events.write(json.dumps(line) + "\n")
            self._events.flush()
        for listener in self.listeners:
            listener(line)


def worker_event(worker: e.WorkerId, message: dict[str, Any]) -> e.Event | None:
    """The event that a worker's message is; None for a kind that is not known."""
    kind = message.pop("kind")
    if kind == "elastic":
        return e.WorkerDeclaredElastic(worker)
    if kind == "ready":
        job = message["job"]
        job["model"] = ModelSpec.from_json(job["model"])
        for name in ("state_bytes", "gradient_bytes"):
            job[name] = tuple(job[name])
        return e.WorkerReady(worker, message["peer"], e.Job(**job), tuple(e.Saved(*item) for item in message["saved"]))
    if kind == "reported":
        report = Report.from_json(message["report"])
        return e.WorkerReported(worker, message["generation"], report, message["busy_s"])
    if kind == "resumed":
        return e.WorkerResumed(worker, message["generation"], message["edit_s"], message["restore_s"])
    if kind == "switched":
        return e.WorkerSwitched(worker, message["generation"])
    if kind == "idled":
        return e.WorkerIdled(worker, message["generation"])
    if kind == "committed":
        return e.WorkerCommitted(worker, **message)
    if kind == "lacking":
        return e.WorkerLacking(worker, message["generation"], message["version"], tuple(message["shards"]))
    if kind == "corruption":
        return e.CorruptionFound(worker, **message)
    if kind == "noted":
        return e.WorkerNoted(worker, message["what"], message["fields"])
    if kind == "saved":
        saved = e.Saved(message["version"], message["name"], message["agreement"])
        return e.CheckpointSaved(worker, saved, message["fields"])
    if kind == "unreadable":
        return e.CheckpointUnreadable(worker, message["name"], message["why"])
    if kind == "finished":
        return e.WorkerFinished(worker)
    if kind == "raised":
        return e.WorkerRaised(worker, message["message"], message["traceback"])
    return None


def _plan_message(effect: e.CarryOut) -> str:
    return json.dumps(
        {
            "kind": "plan",
            "plan": effect.plan.to_json(),
            "digest": effect.plan.digest,
            "peers": {str(rank): peer for rank, peer in effect.peers.items()},
            "keepers": dict(effect.keepers),
            "placement": effect.placement.to_json(),
            "nodes": {str(rank): node for rank, node in effect.nodes.items()},
            "rank": effect.worker.rank,
        }
    )


def _worker_id(worker: pb.WorkerId) -> e.WorkerId:
    return e.WorkerId(worker.rank, worker.incarnation)


def _proto(worker: e.WorkerId) -> pb.WorkerId:
    return pb.WorkerId(rank=worker.rank, incarnation=worker.incarnation)
