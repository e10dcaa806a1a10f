"""Translates messages of agents and workers to protocol events, and protocol effects to messages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields

from everstep.comms.control import everstep_pb2 as pb
from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.worker_messages import ToWorker, read_event, write


def agent_event(node: str, message: pb.AttachRequest, local: Callable[[float], float]) -> e.Event | None:
    """The event that an agent's message is; `local` makes a node's time the coordinator's. Raises Unreadable."""
    body = message.WhichOneof("body")
    if body == "ready":
        ready = message.ready
        stores = tuple(ready.stores)
        known = (ready.host, ready.slots, ready.keeper, ready.order, ready.memory_bytes)
        return e.NodeJoined(node, *known, stores, dict(sorted(ready.health.items())), tuple(ready.domains))
    if body == "unhealthy":
        told = message.unhealthy
        return e.NodeUnhealthy(node, told.host, told.why, dict(sorted(told.health.items())))
    if body == "died":
        return _died(message.died, local)
    if body == "store":
        return e.StoreOpened(node, message.store.port)
    if body == "stop":
        return e.StopRequested(message.stop.why, node=node)
    if body == "drain":
        return e.DrainRequested(node, message.drain.why)
    if body == "from_worker":
        worker = message.from_worker.worker
        return read_event(e.WorkerId(worker.rank, worker.incarnation), message.from_worker.json)
    return None


def _died(died: pb.WorkerDied, local: Callable[[float], float]) -> e.WorkerDied:
    return e.WorkerDied(
        e.WorkerId(died.worker.rank, died.worker.incarnation),
        died.cause,
        clean=died.clean,
        step=died.step,
        phase=died.phase,
        finished_micro_batches=died.finished_micro_batches,
        detected_at_s=local(died.detected_at_s),
        killed_at_s=local(died.killed_at_s),
        hang=died.hang,
        stacks=died.stacks,
    )


def order(effect: e.Effect) -> tuple[str, pb.AttachResponse] | None:
    """The node that an effect is an order to, and the order; None for effects that are none."""
    if isinstance(effect, e.StartWorkers):
        return effect.node, pb.AttachResponse(start=_start(effect))
    if isinstance(effect, e.KillWorkers):
        kill = pb.KillWorkers(workers=[proto(worker) for worker in effect.workers])
        return effect.node, pb.AttachResponse(kill=kill)
    if isinstance(effect, e.ReleaseNode):
        return effect.node, pb.AttachResponse(end=pb.EndJob(succeeded=True, why=effect.why, rank=-1, released=True))
    if isinstance(effect, e.TellNode):
        return effect.node, pb.AttachResponse(notice=pb.Notice(text=effect.text))
    return None


class WorkerOrders:
    """Writes orders to workers. The text of a plan is made once for all that get it: it may have a megabyte."""

    def __init__(self) -> None:
        self._plan: e.CarryOut | None = None
        self._text = ""

    def write(self, effect: e.Effect) -> tuple[e.WorkerId, pb.AttachResponse] | None:
        """The worker that an effect is an order to, and the order; None for effects that are none."""
        if not isinstance(effect, ToWorker):
            return None
        text = self._plan_text(effect) if isinstance(effect, e.CarryOut) else write(effect)
        return effect.worker, pb.AttachResponse(to_worker=pb.ToWorker(worker=proto(effect.worker), json=text))

    def _plan_text(self, effect: e.CarryOut) -> str:
        last = self._plan
        names = [field.name for field in fields(effect) if field.name != "worker"]
        if last is None or any(getattr(effect, name) is not getattr(last, name) for name in names):
            self._plan, self._text = effect, write(effect)
        return self._text


def _start(effect: e.StartWorkers) -> pb.StartWorkers:
    return pb.StartWorkers(
        workers=[proto(worker) for worker in effect.workers],
        world_size=effect.world_size,
        restart_count=effect.restart_count,
        master_addr=effect.master[0],
        master_port=effect.master[1],
        group_rank=effect.group_rank,
        group_world_size=effect.group_world_size,
        begun=pb.Begun(**asdict(effect.begun)) if effect.begun else None,
    )


def proto(worker: e.WorkerId) -> pb.WorkerId:
    return pb.WorkerId(rank=worker.rank, incarnation=worker.incarnation)
