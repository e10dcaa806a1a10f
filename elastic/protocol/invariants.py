"""What must hold of the coordinator whatever happens: asserted in the simulator after every event, and in tests.

Each function raises InvariantBroken, which says what was expected and what was found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ...resharding.layout import Layout
from ...resharding.plan import Plan
from ...resharding.units import ModelSpec
from . import events as e
from .state import Phase, State, Status


class InvariantBroken(AssertionError):
    """The coordinator broke one of its own rules."""


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise InvariantBroken(what)


def check_step(before: State, after: State, effects: Sequence[e.Effect]) -> None:
    """What a single step of the coordinator may do."""
    check_state(after)
    _expect(after.generation >= before.generation, f"generation {before.generation} went back to {after.generation}")
    _expect(after.committed >= before.committed, f"commit {before.committed} went back to {after.committed}")
    _expect(after.agreed >= before.agreed, f"agreement {before.agreed} went back to {after.agreed}")
    if before.phase is Phase.DONE:
        _expect(after == before and not effects, "something happened after the end")
    for rank, worker in before.workers.items():
        now = after.workers.get(rank)
        _expect(now is not None and now.id.incarnation >= worker.id.incarnation, f"rank {rank} went back")
    _check_plans(before, after, [effect for effect in effects if isinstance(effect, e.CarryOut)])
    for effect in effects:
        if isinstance(effect, e.AbortGeneration):
            _expect(before.generation < effect.generation <= after.generation, f"a stale abort: {effect}")
        if isinstance(effect, e.StartWorkers):
            _expect(all(after.workers[w.rank].id == w for w in effect.workers), f"a worker that is not known: {effect}")


def _check_plans(before: State, after: State, orders: Sequence[e.CarryOut]) -> None:
    """Every plan goes to all its members, once, the same to all, and belongs to the newest generation."""
    by_generation: dict[int, list[e.CarryOut]] = {}
    for order in orders:
        by_generation.setdefault(order.plan.generation, []).append(order)
    for generation, group in by_generation.items():
        plan = group[0].plan
        _expect(before.generation < generation or before.phase is Phase.RECOVERING, f"a plan again: {generation}")
        _expect(generation == after.generation, f"plan {generation} in generation {after.generation}")
        _expect(len({order.plan.digest for order in group}) == 1, f"generation {generation} has several plans")
        ranks = [order.worker.rank for order in group]
        _expect(sorted(ranks) == sorted(plan.layout.ranks), f"plan {generation} went to {ranks}: {plan.layout.ranks}")
        for order in group:
            _expect(after.workers[order.worker.rank].id == order.worker, f"a plan for {order.worker}, who is gone")
            _expect(set(order.peers) == set(plan.layout.ranks), f"peers {sorted(order.peers)}: {plan.layout.ranks}")
        if after.job is not None:
            check_plan(after.job.model, plan)


def check_state(state: State) -> None:
    """What holds of every state."""
    for rank, worker in state.workers.items():
        _expect(worker.id.rank == rank, f"rank {rank} is filed as {worker.id}")
        # A worker of a node that is gone ends the job.
        _expect(worker.node in state.nodes or state.phase is Phase.DONE, f"{worker.id} is on no node")
    if state.phase is Phase.RUNNING:
        layout = state.layout
        assert layout is not None
        members = {worker.id.rank for worker in state.members()}
        _expect(members == set(layout.ranks), f"members {sorted(members)} of the layout of {layout.ranks}")
        _expect(layout.generation <= state.generation, f"layout {layout.generation} of {state.generation}")
    if state.phase is Phase.RECOVERING:
        assert state.recovery is not None
        _expect(state.recovery.generation == state.generation, "the recovery is of another generation")
        _expect(state.join is None, "a join is prepared while recovering")
        live = {worker.id for worker in state.workers.values()}
        waiting = (state.recovery.awaited & live) - set(state.recovery.reports)
        starting = any(worker.status is Status.STARTING for worker in state.workers.values())
        _expect(bool(waiting) or starting, "a recovery that waits for nobody")
    if state.join is not None:
        _expect(state.join.generation == state.generation, "the join is of another generation")
        joiners = [r for r in state.join.layout.ranks if state.workers[r].status is Status.READY]
        _expect(bool(joiners), "a join that nobody joins")
    if state.job is not None and state.layout is not None:
        check_layout(state.job.model, state.layout)


def check_layout(spec: ModelSpec, layout: Layout) -> None:
    """One owner per shard, one place per layer and micro-batch; ranks are unique."""
    layout.validate(spec)
    ranks = [rank for stage in layout.stages for rank in stage.ranks]
    _expect(len(ranks) == len(set(ranks)), f"a rank twice in {ranks}")


def check_plan(spec: ModelSpec, plan: Plan) -> None:
    """Every (layer, micro-batch) is computed or kept exactly once, by members; gains are of owners."""
    check_layout(spec, plan.layout)
    leaves = Counter(
        (layer, segment.micro_batch)
        for segment in (*plan.work, *plan.kept)
        for layer in range(segment.start, segment.stop)
    )
    everything = {(layer, m) for layer in range(spec.layers) for m in range(plan.layout.micro_batches)}
    odd = sorted(everything.symmetric_difference(leaves)) + sorted(leaf for leaf, n in leaves.items() if n > 1)
    _expect(not odd, f"plan {plan.generation}: leaves (layer, micro-batch) {odd[:5]} are not there exactly once")
    _expect(set(plan.started) <= set(plan.work), f"plan {plan.generation}: started segments that are not to be run")
    for segment in plan.work:
        stage = plan.layout.stage_of(segment.rank)
        inside = stage.start <= segment.start and segment.stop <= stage.stop
        _expect(inside, f"plan {plan.generation}: rank {segment.rank} does not hold the layers of {segment}")
    for rank in (*plan.fresh, *plan.refresh, *(s.rank for s in plan.kept)):
        _expect(rank in plan.layout.ranks, f"plan {plan.generation}: rank {rank} is no member")
    _expect(set(plan.fresh) <= set(plan.refresh) or plan.version == 0, f"plan {plan.generation}: fresh, without values")
    gained = {gain.shard for gain in plan.gains}
    _expect(len(gained) == len(plan.gains), f"plan {plan.generation}: a shard is gained twice")
    for gain in plan.gains:
        owner = plan.layout.owners[gain.shard]
        _expect(gain.rank == owner, f"plan {plan.generation}: rank {gain.rank} gains a shard of {owner}")
