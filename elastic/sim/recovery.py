"""A simulated worker's recovery: the contract of `elastic.recovery.Recovery`, statement for statement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from everstep.elastic.protocol import events as e
from everstep.resharding.plan import Plan, Report

from .keeper import sources_first
from .links import Aborted
from .pipeline import StepState
from .restore import Sources
from .values import ShardState
from .world import Steps

if TYPE_CHECKING:
    from .worker import SimWorker

KEEPER_PATIENCE_S = 5.0
ANSWERED_PATIENCE_S = 1.0
AGAIN_S = 0.02


class Recovery:
    """Reports, and carries out plans, for one worker."""

    def __init__(self, worker: SimWorker) -> None:
        self.worker = worker
        self.fresh = True
        self._nodes: Sequence[str] = ()

    def recover(self) -> Steps[None]:
        """After `Aborted`: report, wait for the plan, carry it out; start again if it happens again."""
        worker = self.worker
        worker.mark("recover")
        worker.switch = None
        while True:
            worker.control.report(self._make_report)
            try:
                orders = yield from worker.control.orders()
                yield from self.carry_out(orders)
            except Aborted:
                continue
            return

    def enter(self) -> Steps[None]:
        """A new worker: wait for the first plan that has a place for it, and carry it out."""
        try:
            orders = yield from self.worker.control.orders()
            yield from self.carry_out(orders)
        except Aborted:
            yield from self.recover()

    def _make_report(self) -> Report:
        worker = self.worker
        if self.fresh or worker.layout is None or worker.state is None:
            return Report(rank=worker.rank, generation=0, fresh=True)
        state = worker.state
        protected, before = worker.protection.report(worker.version)
        valid = worker.values_version == state.step
        return Report(
            rank=worker.rank,
            generation=worker.layout.generation,
            owned_version=worker.owned_version,
            owned=tuple(sorted(worker.owned)),
            values_version=worker.values_version,
            layers=(worker.held.start, worker.held.stop),
            agreed=worker.agreed,
            agreement=worker.agreement,
            protected=protected,
            protected_before=before,
            outlives=worker.snapshots.protected,
            held=tuple(sorted(state.held)) if valid else (),
            started=tuple(sorted(state.started)) if valid else (),
            todo=tuple(state.todo) if valid else (),
        )

    # ------------------------------------------------------------ carrying out a plan

    def carry_out(self, orders: e.CarryOut) -> Steps[None]:
        """Enter the plan's generation with everything it asks for in place."""
        worker, plan = self.worker, orders.plan
        peers = {rank: e.WorkerId(rank, peer["incarnation"]) for rank, peer in orders.peers.items()}
        self._nodes = sources_first(orders.keepers, worker.around.node)
        yield worker.around.world.between(0.0, 0.003)
        worker.links.edit(plan.generation, peers)
        if worker.control.superseded(plan.generation):
            raise Aborted
        yield 0.001
        yield from worker.snapshots.wait()
        self._enter_protection(orders)
        fresh = self.fresh
        back = not fresh and worker.rank in plan.fresh
        version, agreement = yield from self._find_place(plan)
        worker.mark("join" if fresh else "restore")
        if back:
            self._forget_all(version, agreement)
        if not fresh and not back and worker.owned_version == version - 1:
            worker.update(agreement, worker.gradients)
        was_current = not fresh and not back and worker.values_version == version
        seeded = version == 0 and worker.pristine
        worker.pristine = seeded
        self._take_places(plan, version, anew=fresh or back, seeded=seeded)
        yield from self._restore(plan, version)
        if worker.rank in plan.refresh:
            worker.values_version = -1
        yield from worker.publish(version, plan.layout, plan.refresh)
        self._settle(plan, version, agreement, was_current=was_current, back=back)
        self.fresh = False
        if plan.generation > 1:
            if plan.version is None and not fresh:
                worker.around.tell(e.WorkerSwitched(worker.id, plan.generation))
            else:
                worker.around.tell(e.WorkerResumed(worker.id, plan.generation, 0.0, 0.0))

    def _find_place(self, plan: Plan) -> Steps[tuple[int, str]]:
        worker = self.worker
        if self.fresh and plan.guide is not None:
            version, agreement, left = yield from worker.links.receive(plan.guide, ("guide",))
            worker.leave_at = left
            return version, agreement
        version = worker.version if plan.version is None else plan.version
        agreement = worker.agreement if plan.version is None else plan.agreement
        if worker.rank == plan.guide:
            for rank in plan.fresh:
                worker.links.send(rank, ("guide",), (version, agreement, worker.leave_at))
        return version, agreement

    def _enter_protection(self, orders: e.CarryOut) -> None:
        worker, plan = self.worker, orders.plan
        joins = plan.version is None and not plan.leaving
        worker.protection.enter(plan.generation, orders.placement, joins=joins)
        worker.snapshots.protected = max(worker.snapshots.protected, plan.protected)
        worker.snapshots.enter(plan.generation, orders.placement)

    def _forget_all(self, version: int, agreement: str) -> None:
        """Go back: what was agreed, reduced and computed since `version` will be again, and come out the same."""
        worker = self.worker
        worker.version = worker.owned_version = version
        worker.values_version = -1
        worker.owned = set()
        worker.gradients = {}
        worker.agreed, worker.agreement = version - 1, agreement

    def _take_places(self, plan: Plan, version: int, *, anew: bool, seeded: bool) -> None:
        worker = self.worker
        stage = plan.layout.stage_of(worker.rank)
        if (worker.held.start, worker.held.stop) != (stage.start, stage.stop):
            worker.values_version = worker.values_version if seeded else -1
            worker.hold(stage.start, stage.stop, free=not seeded)
        shards = {s.index for s in worker.spec.shards if plan.layout.owners[s.index] == worker.rank}
        gained = {gain.shard for gain in plan.gains if gain.rank == worker.rank}
        kept = shards - gained if not anew else set()
        worker.snapshots.leave(worker.mine - shards, version)
        for shard in worker.mine - shards:
            worker.optimizer.pop(shard, None)
        worker.mine = shards
        worker.owned = set(shards) if seeded else kept
        worker.owned_version = version

    def _restore(self, plan: Plan, version: int) -> Steps[None]:
        """Fetch what is missing from wherever it is; when it is nowhere, tell the coordinator, and wait for the end."""
        worker = self.worker
        for shard in sorted(worker.mine - worker.owned):
            self._load(shard, worker.snapshots.stored(shard, version))
        started, told = worker.around.world.now, False
        while worker.mine - worker.owned:
            missing = sorted(worker.mine - worker.owned)
            sources = Sources(worker.around.board, worker.around.node, self._nodes, worker.links.check)
            found = yield from sources.fetch(missing, version, replay=True)
            for shard, state in found.items():
                self._load(shard, state)
            missing = sorted(worker.mine - worker.owned)
            patience_s = KEEPER_PATIENCE_S if sources.unreachable else ANSWERED_PATIENCE_S
            if missing and not told and worker.around.world.now - started > patience_s:
                told = True
                worker.around.tell(e.WorkerLacking(worker.id, plan.generation, version, tuple(missing)))
            worker.links.check()
            yield AGAIN_S

    def _load(self, shard: int, state: ShardState | None) -> None:
        if state is not None:
            self.worker.load(shard, state)
            self.worker.owned.add(shard)

    def _settle(self, plan: Plan, version: int, agreement: str, *, was_current: bool, back: bool) -> None:
        """Everything is at `version`: go on with its step."""
        worker = self.worker
        worker.layout = plan.layout
        worker.values_version = version
        facts = worker.around.facts
        facts.entered(worker.id, plan, version)
        facts.owned(worker.id, plan.generation, version, {s: worker.shard_state(s) for s in worker.owned})
        if self.fresh or back:
            worker.version = version
            worker.agreed, worker.agreement = version - 1, agreement
            if agreement:
                worker.protection.adopt(agreement)
                worker.tell_committed(agreement)
        if was_current and worker.state is not None and plan.version is not None:
            worker.protect(anyway=True)
            worker.state.resume(plan.work, plan.kept, plan.started)
            worker.pipeline.resend(worker.state, plan.started)
            return
        if not self.fresh and worker.version == version - 1:
            worker.agreed, worker.agreement = version - 1, agreement
            worker.protection.adopt(agreement)
            worker.commit(agreement)
        worker.protect(anyway=True)
        worker.state = StepState.begin(version, worker.rank, plan.work)
        worker.state.kept = plan.kept
