"""Translates messages of agents and workers to protocol events, and protocol effects to messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from everstep.comms.control import everstep_pb2 as pb
from everstep.elastic.protocol import events as e
from everstep.resharding.plan import Report
from everstep.resharding.units import ModelSpec


def agent_event(node: str, message: pb.AttachRequest, local: Callable[[float], float]) -> e.Event | None:
    """The event that an agent's message is; `local` makes a node's time the coordinator's. Raises ValueError."""
    body = message.WhichOneof("body")
    if body == "ready":
        ready = message.ready
        stores = tuple(ready.stores)
        known = (ready.host, ready.slots, ready.keeper, ready.order, ready.memory_bytes)
        return e.NodeJoined(node, *known, stores, dict(sorted(ready.health.items())))
    if body == "unhealthy":
        told = message.unhealthy
        return e.NodeUnhealthy(node, told.host, told.why, dict(sorted(told.health.items())))
    if body == "died":
        return _died(message.died, local)
    if body == "store":
        return e.StoreOpened(node, message.store.port)
    if body == "stop":
        return e.StopRequested(message.stop.why)
    if body == "drain":
        return e.DrainRequested(node, message.drain.why)
    if body == "from_worker":
        worker = message.from_worker.worker
        return worker_event(e.WorkerId(worker.rank, worker.incarnation), json.loads(message.from_worker.json))
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


def worker_event(worker: e.WorkerId, message: dict[str, Any]) -> e.Event | None:
    """The event for a worker's message; None if the message's kind is unknown."""
    kind = message.pop("kind")
    if kind == "elastic":
        return e.WorkerDeclaredElastic(worker)
    if kind == "ready":
        job = message["job"]
        job["model"] = ModelSpec.from_json(job["model"])
        for name in ("state_bytes", "gradient_bytes", "sample_digests"):
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
    if kind == "left":
        return e.WorkerLeft(worker, message["version"], message["name"])
    if kind == "went_on":
        return e.WorkerWentOn(worker, message["step"])
    if kind == "finished":
        return e.WorkerFinished(worker, message["version"], message["name"])
    if kind == "concluded":
        return e.WorkerConcluded(worker, message["name"], message["why"])
    if kind == "raised":
        return e.WorkerRaised(worker, message["message"], message["traceback"])
    return None


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


def worker_order(effect: e.Effect) -> tuple[e.WorkerId, pb.AttachResponse] | None:
    """The worker that an effect is an order to, and the order; None for effects that are none."""
    if isinstance(effect, e.CarryOut):
        text = _plan(effect)
    elif isinstance(effect, e.AbortGeneration):
        text = json.dumps({"kind": "abort", "generation": effect.generation})
    elif isinstance(effect, e.AskSave):
        text = json.dumps({"kind": "save"})
    elif isinstance(effect, e.TellLeft):
        text = json.dumps({"kind": "left", "version": effect.version})
    elif isinstance(effect, e.Conclude):
        text = json.dumps({"kind": "conclude", "version": effect.version, "name": effect.name})
    elif isinstance(effect, e.EndTraining):
        text = json.dumps({"kind": "trained"})
    else:
        return None
    return effect.worker, pb.AttachResponse(to_worker=pb.ToWorker(worker=proto(effect.worker), json=text))


def _start(effect: e.StartWorkers) -> pb.StartWorkers:
    return pb.StartWorkers(
        workers=[proto(worker) for worker in effect.workers],
        world_size=effect.world_size,
        restart_count=effect.restart_count,
        master_addr=effect.master[0],
        master_port=effect.master[1],
        group_rank=effect.group_rank,
        group_world_size=effect.group_world_size,
        begun=pb.Begun(samples=effect.begun.samples, values=effect.begun.values) if effect.begun else None,
    )


def _plan(effect: e.CarryOut) -> str:
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


def proto(worker: e.WorkerId) -> pb.WorkerId:
    return pb.WorkerId(rank=worker.rank, incarnation=worker.incarnation)
