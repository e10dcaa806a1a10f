"""Puts a worker's engine together from the script's objects and what the launcher gave, and describes the job."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from everstep.checkpointing.access.client import KeeperLink
from everstep.checkpointing.access.snapshot import Snapshots
from everstep.checkpointing.universal.lineage import Lineage
from everstep.comms.mesh.communicator import Communicator
from everstep.elastic.contract.digest import state_digest
from everstep.elastic.contract.membership import Membership
from everstep.elastic.contract.progress import Progress
from everstep.elastic.contract.settings import Settings, WorkerContext
from everstep.elastic.engine.engine import Engine
from everstep.elastic.holding.hyperparameters import pack
from everstep.elastic.holding.stack import LayerStack
from everstep.elastic.holding.user_optimizer import UserOptimizer
from everstep.elastic.protocol.events import Job
from everstep.elastic.protocol.protection import state_slots
from everstep.elastic.step.data import DataSource
from everstep.elastic.step.loss_scale import LOSS_SCALE
from everstep.elastic.step.reduction import Reduction
from everstep.elastic.step.sampled import SAMPLER
from everstep.elastic.step.stream_states import STREAM_STATE, StreamStates
from everstep.elastic.step.streams import STREAM
from everstep.elastic.step.taking_turns import TakingTurns

from .replacement import loads_values


def engine_of(
    context: WorkerContext | None,
    comm: Communicator,
    membership: Membership,
    progress: Progress,
    *,
    settings: Settings,
    stack: LayerStack,
    optimizer: UserOptimizer,
    data: DataSource,
    described: dict[str, Any],
    values: str,
    loss_fn: Callable[[Any, Any], Any],
    reduction: Reduction,
    registered: dict[str, Any],
    stream_states: StreamStates,
    loops: bool,
) -> Engine:
    """The engine of this worker; without a launcher (`context` None) it has no keeper."""
    link, lineage, slots = None, None, 2
    if context is not None:
        # The token is a secret; its hash names the run.
        lineage = Lineage(hashlib.sha256(context.token.encode()).hexdigest()[:16])
        link = KeeperLink(context.keeper_name, context.token, context.rank, context.incarnation)
        slots = state_slots(settings.protection, context.max_nodes, checkpoints=bool(settings.checkpoint))
    engine = Engine(
        settings=settings,
        stack=stack,
        optimizer=optimizer,
        data=data,
        described=described,
        loss_fn=loss_fn,
        reduction=reduction,
        comm=comm,
        membership=membership,
        snapshots=Snapshots(link, slots, progress.telemetry.copied),
        progress=progress,
        link=link,
        lineage=lineage,
        registered=registered,
        stream_states=stream_states,
        loops=loops,
        seeded=not loads_values(membership, context.begun if context else None, values),
        token=context.token if context else "",
        node=context.node if context else "",
    )
    engine.pipeline.repetition.repeat(settings.repeat_every)
    if reduction.skip_nonfinite:
        engine.drive(LOSS_SCALE, reduction.loss_scale)
    if data.sampled is not None and loops and settings.epochs:
        engine.drive(SAMPLER, data.sampled)
    if data.streams is not None and data.streams.stateful:
        engine.drive(STREAM, data.streams)
    stream_states.begin(data.order, stack.device, 1 if loops else settings.stages)
    engine.drive(STREAM_STATE, stream_states)
    return engine


def job_of(engine: Engine, described: dict[str, Any], values: str) -> Job:
    """What the coordinator knows of the job, and what all ranks have to agree on. `values`: of the model as built."""
    settings, stack, data = engine.settings, engine.stack, engine.data
    return Job(
        steps=settings.steps,
        stages=max(0, settings.stages),
        micro_batches=settings.micro_batches,
        global_batch_size=settings.global_batch_size,
        model=stack.spec,
        seed=settings.seed,
        values=values,
        constants=state_digest(dict(stack.constants())),
        samples=data.samples,
        shuffle=data.order.shuffle,
        sample_digests=tuple(described["sample_digests"]),
        epochs=settings.epochs,
        last_batch=settings.last_batch,
        loss_reduction=settings.loss_reduction,
        optimizer=engine.optimizer.describe() + engine.reduction.describe() + _turns(data.order.turns),
        settings=json.dumps(pack(engine.optimizer.hyper_parameters())),
        protection=settings.protection,
        node_losses=settings.node_losses,
        on_loss=settings.on_loss,
        checkpoints=bool(settings.checkpoint),
        one_stage="run.prepare drives one, run.steps(...) several" if engine.loops else stack.why_one_stage(),
        on_damage=settings.on_damage,
        state_bytes=tuple(engine.record_bytes),
        gradient_bytes=tuple(engine.gradient_bytes(shard) for shard in stack.spec.shards),
    )


def _turns(turns: TakingTurns) -> str:
    """How several optimizers take turns, in words."""
    if max(turns.every) > 1:
        return f" in turns every {turns.every} batches"
    return f" in {len(turns.every)} turns" if turns.alternates else ""
