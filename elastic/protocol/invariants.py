"""Invariants of the coordinator, checked after every event, in jobs and in the simulator.

Each function raises InvariantBroken, with what was expected and what was found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from everstep.resharding.layout import Layout
from everstep.resharding.moves import What
from everstep.resharding.placement import Placement
from everstep.resharding.plan import Plan
from everstep.resharding.units import ModelSpec

from . import events as e
from .state import Phase, State, Status


class InvariantBroken(AssertionError):
    """The coordinator violated one of its invariants."""


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise InvariantBroken(what)


def check_turn(before: State, after: State, effects: Sequence[e.Effect]) -> None:
    """Call `check_step` if anything but times has changed: cheap enough for every event of a job.

    A heartbeat of ten thousand nodes changes neither workers nor phase, so it is not checked.
    """
    if effects or after.phase is not before.phase or after.workers is not before.workers:
        check_step(before, after, effects)


def check_step(before: State, after: State, effects: Sequence[e.Effect]) -> None:
    """Check a single step of the coordinator."""
    check_state(after, known=before.layout)
    _expect(after.generation >= before.generation, f"generation {before.generation} went back to {after.generation}")
    _expect(after.recorded >= before.recorded, f"step {before.recorded} of the ledger went back to {after.recorded}")
    if after.lines == before.lines and not _went_back_to_checkpoint(before, after):
        _expect(after.protected >= before.protected, f"protected {before.protected} went back to {after.protected}")
    _check_going_back(before, after)
    if before.phase is Phase.DONE:
        _expect(after == before and not effects, "something happened after the end")
    for rank, worker in before.workers.items():
        now = after.workers[rank].id.incarnation if rank in after.workers else after.vacant.get(rank, -1)
        _expect(now >= worker.id.incarnation, f"rank {rank} went back")
    for rank, last in before.vacant.items():
        started = rank in after.workers and after.workers[rank].id.incarnation > last
        _expect(started or after.vacant.get(rank) == last, f"vacant rank {rank} went back")
    _check_plans(before, after, [effect for effect in effects if isinstance(effect, e.CarryOut)])
    for effect in effects:
        if isinstance(effect, e.AbortGeneration):
            _expect(before.generation < effect.generation <= after.generation, f"a stale abort: {effect}")
        if isinstance(effect, e.StartWorkers):
            _expect(all(after.workers[w.rank].id == w for w in effect.workers), f"a worker that is not known: {effect}")
            _expect(effect.node in after.nodes or after.phase is Phase.DONE, f"workers for a lost node: {effect}")


def _check_going_back(before: State, after: State) -> None:
    """Only a rollback gives up committed or agreed steps, and never protected ones."""
    if after.rolled_back == before.rolled_back:
        _expect(after.committed >= before.committed, f"commit {before.committed} went back to {after.committed}")
        _expect(after.agreed >= before.agreed, f"agreement {before.agreed} went back to {after.agreed}")
        return
    _expect(after.rolled_back == after.generation, f"a rollback of {after.rolled_back} in {after.generation}")
    _expect(after.committed == after.agreed, f"went back to the commit of {after.committed}, but {after.agreed}")
    if _went_back_to_checkpoint(before, after):
        return
    _expect(
        after.agreed + 1 >= before.protected, f"version {before.protected} was protected; {after.agreed + 1} is left"
    )


def _went_back_to_checkpoint(before: State, after: State) -> bool:
    """Whether a return to a checkpoint was planned: protected versions do not cover more losses than `node_losses`."""
    versions = [saved.version for saved in after.saved]
    return after.rolled_back > before.rolled_back and after.protected < 0 and after.agreed + 1 in versions[:1]


def _check_plans(before: State, after: State, orders: Sequence[e.CarryOut]) -> None:
    """Every plan is sent to all its members, once, the same to all, and belongs to the newest generation."""
    by_generation: dict[int, list[e.CarryOut]] = {}
    for order in orders:
        by_generation.setdefault(order.plan.generation, []).append(order)
    for generation, group in by_generation.items():
        plan = group[0].plan
        _expect(before.generation < generation or before.phase is Phase.RECOVERING, f"a plan again: {generation}")
        _expect(generation == after.generation, f"plan {generation} in generation {after.generation}")
        _expect(len({order.plan.digest for order in group}) == 1, f"generation {generation} has several plans")
        _expect(plan.lines == after.lines, f"plan {generation} is of {plan.lines}, and the job of {after.lines}")
        ranks = [order.worker.rank for order in group]
        meant = sorted((*plan.layout.ranks, *plan.leaving))
        _expect(sorted(ranks) == meant, f"plan {generation} went to {ranks}, and is for {meant}")
        for order in group:
            _expect(after.workers[order.worker.rank].id == order.worker, f"a plan for {order.worker}, who is gone")
            _expect(set(order.peers) == set(plan.layout.ranks), f"peers {sorted(order.peers)}: {plan.layout.ranks}")
            _expect(set(order.keepers) == set(after.nodes), f"keepers of {sorted(order.keepers)}: {list(after.nodes)}")
            _expect(order.placement == after.placement, f"generation {generation} has several placements")
        if after.job is not None:
            check_plan(after.job.model, plan)
            check_placement(after, group[0].placement, plan.layout)


def check_state(state: State, known: Layout | None = None) -> None:
    """Check a state by itself. `known`: a layout that was checked before."""
    for rank, worker in state.workers.items():
        _expect(worker.id.rank == rank, f"rank {rank} is filed as {worker.id}")
        _expect(worker.node in state.nodes or state.phase is Phase.DONE, f"{worker.id} is on no node")
    _expect(
        not state.workers.keys() & state.vacant.keys(), f"ranks {set(state.workers) & set(state.vacant)} are vacant"
    )
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
        _expect(bool(waiting) or starting, "a recovery that waits for no worker")
        lost = set(state.recovery.nodes_lost) & set(state.nodes)
        _expect(not lost, f"nodes {lost} are lost and there")
    if state.join is not None and state.phase is not Phase.DONE:
        _expect(state.join.generation == state.generation, "the join is of another generation")
        joiners = [r for r in state.join.layout.ranks if state.workers[r].status is Status.READY]
        same = state.layout is not None and state.join.layout.ranks == state.layout.ranks
        _expect(bool(joiners or state.join.leaving or same), "a switch without joining or leaving ranks")
    _expect(state.leaving.keys() <= state.nodes.keys(), f"{list(state.leaving)} leave, of {list(state.nodes)}")
    for rank, worker in state.workers.items():
        if worker.status is Status.LEFT and state.phase is Phase.RUNNING and state.layout is not None:
            _expect(rank not in state.layout.ranks, f"rank {rank} has left, and is in the layout")
    if state.job is not None and state.layout is not None and state.layout is not known:
        check_layout(state.job.model, state.layout)


def check_placement(state: State, placement: Placement, layout: Layout) -> None:
    """Every shard is in one stripe, whose blocks are on different live nodes; there are none if no node may be lost."""
    assert state.job is not None
    _expect(placement.generation == layout.generation, f"parity of {placement.generation} in {layout.generation}")
    for stripe in placement.stripes:
        nodes = (*stripe.nodes, *stripe.parity)
        _expect(len(set(nodes)) == len(nodes), f"a stripe has two blocks on one node: {stripe}")
        _expect(set(nodes) <= set(state.nodes), f"a stripe has blocks on lost nodes: {stripe}, of {list(state.nodes)}")
        _expect(len(stripe.parity) == placement.losses, f"{len(stripe.parity)} parity rows for {placement.losses}")
        owners = tuple(state.workers[layout.owners[shard]].node for shard in stripe.shards)
        _expect(owners == stripe.nodes, f"the shards of {stripe} are on {owners}")
    members = {state.workers[rank].node for rank in layout.ranks}
    protects = state.job.protection != "none" and len(members) > 1
    covered = sorted(shard for stripe in placement.stripes for shard in stripe.shards)
    _expect(covered == (list(range(len(layout.owners))) if protects else []), f"the shards in stripes are {covered}")
    _expect(placement.losses == (min(state.job.node_losses, len(members) - 1) if protects else 0), f"{placement}")


def check_layout(spec: ModelSpec, layout: Layout) -> None:
    """One owner per shard, one place per layer and micro-batch; ranks are unique."""
    layout.validate(spec)
    ranks = [rank for stage in layout.stages for rank in stage.ranks]
    _expect(len(ranks) == len(set(ranks)), f"a rank twice in {ranks}")


def check_plan(spec: ModelSpec, plan: Plan) -> None:
    """Every (layer, micro-batch) is computed or kept exactly once, by members; shards move to owners and readers."""
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
    for rank in (*plan.fresh, *plan.receivers, *(s.rank for s in plan.kept)):
        _expect(rank in plan.layout.ranks, f"plan {plan.generation}: rank {rank} is no member")
    for rank in set(plan.fresh) - set(plan.receivers) if plan.version != 0 else ():
        stage = plan.layout.stage_of(rank)
        reads = any(spec.shards_of_layer[layer] for layer in range(stage.start, stage.stop))
        _expect(not reads, f"plan {plan.generation}: rank {rank} is fresh, and gets no values")
    _expect(plan.protected <= (plan.version or 0), f"plan {plan.generation} protects {plan.protected}: {plan.version}")
    _check_moves(spec, plan)


def _check_moves(spec: ModelSpec, plan: Plan) -> None:
    seen = Counter((move.shard, move.what) for move in plan.moves)
    twice = [f"{shard} to {what.value}" for (shard, what), times in seen.items() if times > 1]
    _expect(not twice, f"plan {plan.generation}: shards that move twice: {twice[:5]}")
    reading: set[tuple[int, tuple[int, ...]]] = set()  # most moves share a few tuples of ranks and layers
    for move in plan.moves:
        _expect(bool(move.to and move.sources), f"plan {plan.generation}: to no rank, or from nowhere: {move}")
        if move.what is What.OWN:
            _expect(move.to == (plan.layout.owners[move.shard],), f"plan {plan.generation}: not to its owner: {move}")
        layers = spec.parameters[spec.shards[move.shard].parameter].layers
        if move.what is What.VALUE and (id(move.to), layers) not in reading:
            reading.add((id(move.to), layers))
            holders = {rank for layer in layers for rank in plan.layout.holders(layer)}
            _expect(holders.issuperset(move.to), f"plan {plan.generation}: to a rank that does not read it: {move}")
