"""Recovery: carries out the instructions that bring an aborted generation to one version on all ranks again.

A survivor reports what it holds, and the coordinator's plan says what each rank does. The worker's state machine turns
the plan into instructions, which are the same after a loss, for a rank that joins, and at the start.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from everstep.checkpointing.universal.manifest import CheckpointError
from everstep.checkpointing.universal.store import StoreError
from everstep.comms.mesh.communicator import Aborted, Key, Kind
from everstep.comms.mesh.tensors import host_bytes, of_bytes
from everstep.elastic.contract.errors import JobEnded
from everstep.elastic.contract.notices import Notice, warn
from everstep.elastic.contract.progress import StepPhase
from everstep.elastic.contract.telemetry import Spent
from everstep.elastic.protocol import events as e
from everstep.elastic.protocol import worker_events as w
from everstep.elastic.protocol.backing_up import backup_ranks
from everstep.elastic.protocol.terms import Terms
from everstep.elastic.protocol.worker_state import report
from everstep.resharding.moves import What, received
from everstep.resharding.plan import Plan, Report
from everstep.resharding.work import Work

from .damage import DECISION
from .engine import (
    SAVES,
    STATE,
    Engine,
)
from .loading import LiveValues
from .position import Position
from .user_loop import Step

_GUIDE, _CALLS = Key(Kind.SWITCH, 0), Key(Kind.SWITCH, 1)


class Recovery:
    """Makes reports and carries out plans for one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.loader = engine.loader
        self.resumed = False  # whether the job resumed from a checkpoint
        # The version at which this rank joined, and the agreement before it.
        self._joined: tuple[int, Terms | None] = (-1, None)
        self._after: Mapping[str, Any] = {}  # the state of the user's code on the guide
        self.guide_begun = True  # its loop had begun
        self._began = self._edited = 0.0  # times within the entry into the current generation
        self._edited_ns = 0
        self._ahead = 0  # bytes that were copied ahead of it
        engine.worker.carries(
            {
                w.SendReport: self._send_report,
                w.AwaitPlan: self._await_plan,
                w.EditLinks: self._edit_links,
                w.AskPlace: self._ask_place,
                w.TellPlace: self._tell_place,
                w.TakeUnseen: self._take_unseen,
                w.EnterProtection: self._enter_protection,
                w.ForgetSince: self._forget_since,
                w.TakePlaces: self._take_places,
                w.OpenCheckpoint: self._open_checkpoint,
                w.Restore: self._restore,
                w.Refresh: self._refresh,
                w.NoteChange: lambda it: engine.adjustments.interrupted(it.version),
                w.ComeUp: self._come_up,
                w.ResumeStep: self._resume_step,
                w.TellEntered: self._tell_entered,
                w.HandOver: self._hand_over,
            }
        )

    def recover(self) -> None:
        """After `Aborted`: report, wait for the plan, carry it out; start again after another abort."""
        engine, state = self.engine, self.engine.worker.state
        holding = state.holding
        same = holding.values_version == holding.owned_version == state.version
        if same and engine.watch.changed(thorough=True):  # the script has replaced values, for an evaluation
            engine.worker.happened(w.Spoiled())
        engine.progress.mark(StepPhase.RECOVER, engine.version)
        engine.telemetry.interrupted()
        began_ns = time.monotonic_ns()
        while True:
            try:
                engine.worker.happened(w.Interrupted())
            except Aborted:
                continue
            engine.telemetry.span(Spent.RECOVER, began_ns)
            return

    def enter(self) -> None:
        """A new worker: wait for the first plan that includes it, and carry it out."""
        try:
            self.engine.worker.happened(w.Started(seeded=self.engine.seeded))
        except Aborted:
            self.recover()

    def switch(self) -> None:
        """Enter the generation of an agreed join or departure. Raises JobEnded if this rank leaves."""
        self.engine.settle()
        self.engine.worker.happened(w.SwitchDue())

    def _send_report(self, it: w.SendReport) -> None:
        self.engine.membership.report(self._report)

    def _await_plan(self, it: w.AwaitPlan) -> w.Event:
        engine = self.engine
        what = "the reports of all ranks, and the coordinator's plan"
        if it.first:
            what = "the other workers to be ready, and the coordinator's first plan"
        with engine.progress.waiting(what):
            orders = engine.membership.orders(engine.progress.tick)
        engine.orders[orders.plan.generation] = orders
        return w.Assigned(orders.plan)

    def _hand_over(self, it: w.HandOver) -> None:
        """The others continue without this rank. It takes part in recoveries that include it, until it is released.

        Raises JobEnded when it is released, and Aborted for such a recovery.
        """
        engine = self.engine
        engine.progress.mark(StepPhase.LEAVE, engine.version)
        engine.snapshots.wait(engine.progress.tick)
        with engine.progress.waiting(SAVES):
            engine.checkpoints.conclude(self._patient)
        engine.membership.tell(e.WorkerSwitched(engine.membership.worker, it.generation))
        with engine.progress.waiting("the coordinator to let this node go"):
            over = engine.membership.wait_for_end(engine.progress.tick)
        if over:
            raise JobEnded
        raise Aborted(it.generation)

    def _report(self, generation: int) -> Report:
        engine = self.engine
        protected, before = engine.protection.report(engine.version)
        outlives = engine.snapshots.protected
        state = engine.worker.state
        return report(
            state,
            engine.state,
            protected=protected,
            protected_before=before,
            outlives=outlives,
            calls=engine.calls.count,
        )

    # ------------------------------------------------------------ carrying out a plan

    def _edit_links(self, it: w.EditLinks) -> w.Event:
        engine, plan = self.engine, it.plan
        orders = engine.orders[plan.generation]
        self._began, began_ns = time.monotonic(), time.monotonic_ns()
        self._ahead = engine.prefetch.bytes if engine.prefetch.generation == plan.generation else 0
        engine.follow(orders)
        self.loader.enter(orders.keepers, plan.lines)
        with engine.progress.waiting(f"links to the other ranks of generation {plan.generation}"):
            engine.comm.edit(plan.generation, orders.peers)
        if plan.caller == engine.rank:
            self._send_calls(plan.behind)
        if engine.membership.superseded(plan.generation):  # the edit of the membership may have cleared an abort
            raise Aborted(plan.generation)
        self._edited, self._edited_ns = time.monotonic(), time.monotonic_ns()
        engine.telemetry.span(Spent.EDIT, began_ns)
        engine.snapshots.wait(engine.progress.tick)
        engine.pipeline.end_step()
        self._fetch_large(plan)
        return w.Linked()

    def _fetch_large(self, plan: Plan) -> None:
        """A new rank without a guide, or one that goes back, needs what the plan's agreement refers to.

        So does one that was interrupted in a step that others have agreed on.
        """
        engine, entering = self.engine, self.engine.worker.state.entering
        assert entering is not None
        if plan.version is not None and plan.agreement and not entering.fresh and plan.version > engine.version:
            engine.large.fetch_ahead(plan.agreement)
        if plan.version is None or not (entering.back or (entering.fresh and plan.guide is None and plan.agreement)):
            return

        def saved(digests: list[str]) -> Iterator[tuple[str, bytes]]:
            return self.loader.open_checkpoint(plan.checkpoint).contents(digests)

        try:
            engine.large.fetch_agreed(plan.agreement, plan.version, saved if plan.checkpoint else None)
        except (CheckpointError, StoreError) as error:
            self._unreadable(plan.checkpoint, error)

    def _send_calls(self, ranks: Sequence[int]) -> None:
        """Send the results of the script's calls to ranks that lack some, and cannot make these calls any more."""
        message = of_bytes(json.dumps(self.engine.calls.records()).encode())
        for rank in ranks:
            self.engine.comm.send(rank, _CALLS, [message])

    def _take_calls(self, plan: Plan) -> None:
        if self.engine.rank in plan.behind:
            self.engine.calls.take(json.loads(bytes(host_bytes(self.engine.comm.receive(plan.caller, _CALLS)))))

    def _ask_place(self, it: w.AskPlace) -> w.Event:
        engine = self.engine
        found = Position.of_message(engine.comm.receive(it.rank, _GUIDE))
        engine.large.fetch_told(found.agreement, found.after)
        self._after, self.guide_begun = found.after, found.begun
        engine.adjustments.take_records(found.records)
        engine.turns.take_records(found.turns)
        engine.calls.take(found.calls)
        engine.pipeline.forwards.attributes.join(found.attributes)
        engine.user_loop.join(found.unseen, open_turn=found.turning)
        return w.Placed(found.version, found.agreement, found.left)

    def _take_unseen(self, it: w.TakeUnseen) -> None:
        """Changes that other ranks' code made after the last step are lost with them, unless a checkpoint has them."""
        engine = self.engine
        self._after, self.guide_begun = {}, True  # a guide of a generation that was aborted may have sent others
        terms = Terms.of(it.agreement) if it.agreement else None
        resumed = terms is not None and (terms.advance is not None or (terms.after is not None and terms.shown))
        engine.user_loop.join([], open_turn=False)
        unseen = [] if resumed else self._unseen(it.version, it.agreement)
        engine.user_loop.join(unseen, open_turn=terms is not None and terms.after is None)

    def _tell_place(self, it: w.TellPlace) -> None:
        """Tell newcomers where the job is. Never raises Aborted: the machine counts on what follows in its list.

        A newcomer that does not receive this takes part in the next recovery as one without any state.
        """
        engine, version = self.engine, it.version
        after = self._after_users(version)
        engine.large.tell_place(it.agreement, after, version)
        message = Position(
            version=version,
            agreement=it.agreement,
            left=engine.leave_at,
            begun=engine.user_loop.begun,
            unseen=tuple(self._unseen(version, it.agreement)),
            turning=not self._in_turn(version),
            after=after,
            records=engine.adjustments.records(),
            turns=engine.turns.records(),
            calls=engine.calls.records(),
            attributes=engine.pipeline.forwards.attributes.changed(),
        ).to_message()
        with contextlib.suppress(Aborted):
            for rank in it.ranks:
                engine.comm.send(rank, _GUIDE, [message])

    def _after_users(self, version: int) -> dict[str, Any]:
        """The state of the user's code here; the settings only if they belong to `version` already."""
        if self._in_turn(version):  # it repeats the code behind the step, and its changes, from where that began
            return {"users": self.engine.turns.began} if self.engine.loops else {}
        after = self.engine.turns.state_at(self.engine.version)
        # Before the loop begins, the script is about to set it, as the newcomer's will.
        if not self.engine.user_loop.begun and STATE in after["users"]:
            entered = self.engine.registered.objects[STATE].entered
            after = {**after, "users": {**after["users"], STATE: entered or {}}}
        return after if self.engine.version == version else {"users": after["users"]}

    def _in_turn(self, version: int) -> bool:
        """Whether the user's code here is at the last step before `version`, or has left the loop in it."""
        turn = self.engine.user_loop.turn
        return turn is not None and turn.index == version - 1 and self.engine.version == version

    def _unseen(self, version: int, agreement: str) -> list[Step]:
        """The steps before `version` for which the user's code on this rank has not run."""
        engine = self.engine
        loop = engine.user_loop
        if loop.turn is not None and self._in_turn(version):
            return [loop.turn]
        steps = list(loop.unseen)
        if engine.version < version and agreement:
            terms = Terms.of(agreement)
            steps.append(Step(terms.step, terms.loss, terms.norm))
        return steps

    def _enter_protection(self, it: w.EnterProtection) -> None:
        """Inform this node's keeper of the generation, and of the parity that it holds in it."""
        engine, plan = self.engine, it.plan
        orders = engine.orders[plan.generation]
        joins = plan.version is None and not plan.leaving
        engine.protection.enter(plan.generation, orders.placement, joins=joins)
        snapshots = engine.snapshots
        # With a checkpoint or a fork, what outlived nodes was of another line.
        snapshots.outlives(plan.protected, forget=bool(plan.checkpoint or plan.forks))
        for shard in plan.stand_ins:
            snapshots.discard(shard)
        placement = orders.placement
        if engine.settings.protection == "replay":  # under replay the workers hold the copies, not the keepers
            placement = replace(placement, stripes=())
        snapshots.enter(plan.generation, placement, orders.keepers, engine.record_bytes, plan.lines)
        entering = engine.worker.state.entering
        assert entering is not None
        if entering.fresh and entering.version == 0:  # until a version outlives nodes, this is the one to return to
            engine.large.protect(engine.birth["registered"], 0, plan.layout)
        engine.progress.mark(StepPhase.JOIN if entering.fresh else StepPhase.RESTORE, entering.version)

    def _forget_since(self, it: w.ForgetSince) -> None:
        """Go back: agreements, gradients and results since `version` are computed again, with the same result.

        Everything goes back at once, the scheduler included: a plan after another abort need not repeat it.
        """
        engine = self.engine
        engine.checkpoints.abandon()
        terms = Terms.of(it.agreement) if it.agreement else None
        self._warn_of_unknown_states(it.version)
        present = engine.adjustments.terms()
        self._catch_up(terms, it.version, back=True)
        engine.user_loop.go_back(it.version)
        agreed = engine.registered.of_users(terms.registered if terms else engine.birth["registered"])
        left = {**engine.adjustments.terms(), "users": agreed, **((terms and terms.after) or {})}
        engine.turns.go_back(it.version, left)
        engine.adjustments.set(present)  # what the user's code has set is its own until the next step begins
        engine.drop_gradients()

    def _warn_of_unknown_states(self, version: int) -> None:
        """Say so where no rank can tell this one what repeated steps began with: all began later than these."""
        engine = self.engine
        known = engine.turns.unknown(version)
        if known > version and any(engine.registered.users().values()):
            text = (
                f"rank {engine.rank} computes steps {version} to {known - 1} again, which were computed before its "
                f"script began: all workers had been lost. The values that run.state and registered objects had in "
                f"step {version} are used in all of them: a loss that reads what the script changes there between "
                "steps gives other bytes. For equal ones, start the job again from a checkpoint"
            )
            warn(engine.membership, Notice.STATE_UNKNOWN, text, rank=engine.rank, step=version)

    def _take_places(self, it: w.TakePlaces) -> None:
        """Hold the layers and own the shards of the plan; gained layers have no values yet, unless from the seed."""
        engine, layout = self.engine, it.plan.layout
        orders = engine.orders[it.plan.generation]
        if it.layers is not None:
            engine.stack.hold(*it.layers, free=not it.seeded)
        before = {s.index for s in (*engine.backups.shards, *engine.store.owned)}
        engine.store.own([s for s in engine.stack.spec.shards if s.index in it.shards])
        replay = engine.settings.protection == "replay"
        ranks = backup_ranks(layout, orders.placement, orders.nodes) if replay else {}
        engine.backups.take_places(layout, ranks, discard=it.discard)
        engine.backups.in_sync.difference_update(it.plan.stand_ins)
        if it.seeded:
            engine.store.seed()
            engine.backups.store.seed()
            engine.backups.in_sync.update(shard.index for shard in engine.backups.shards)
        now = it.shards | {s.index for s in engine.backups.shards}
        engine.snapshots.leave(before - now, it.version)

    def _restore(self, it: w.Restore) -> w.Event:
        """Carry out the moves of missing shards, and of backups that are not up to date."""
        engine, checkpoint = self.engine, self.loader.checkpoint
        backups = [s.index for s in engine.backups.shards if s.index not in engine.backups.in_sync]
        passive = it.plan.moves_of(backups, engine.rank, What.BACKUP)
        try:
            self.loader.load(it.plan, engine.store, it.moves, it.version, it.agreement)
            self.loader.load(it.plan, engine.backups.store, passive, it.version, it.agreement)
        except (CheckpointError, StoreError) as error:
            self._unreadable(it.plan.checkpoint, error)
        engine.backups.in_sync.update(backups)
        if checkpoint is not None:
            script = Terms.of(it.agreement).script if it.agreement else None
            engine.checkpoints.resumed(it.version, script, it.plan.checkpoint, checkpoint.lineage)
        return w.Restored()

    def _refresh(self, it: w.Refresh) -> w.Event:
        """Send the values of owned shards to the ranks that lack them, and receive those that this rank lacks."""
        engine, plan = self.engine, it.plan
        engine.exchange.send_values(it.version, plan.layout, plan.values)
        moves = [m for m in received(plan.values, engine.rank) if plan.layout.owners[m.shard] != engine.rank]
        self.loader.load(plan, LiveValues(engine.stack), moves, it.version, it.agreement)
        engine.stack.refresh()
        return w.Published()

    def _open_checkpoint(self, it: w.OpenCheckpoint) -> None:
        engine = self.engine
        try:
            self.loader.open_checkpoint(it.name).load_constants()
            engine.pipeline.forwards.remember()
        except (CheckpointError, StoreError) as error:
            self._unreadable(it.name, error)

    def _unreadable(self, name: str, error: Exception) -> NoReturn:
        """Report a damaged checkpoint to the coordinator, and wait for its decision. Raises Aborted."""
        engine = self.engine
        engine.membership.tell(e.CheckpointUnreadable(engine.membership.worker, name, str(error)))
        with engine.progress.waiting(DECISION):
            while True:
                self._patient()
                time.sleep(0.01)

    def _patient(self) -> None:
        self.engine.progress.tick()
        self.engine.comm.ready(())  # raises Aborted

    def _come_up(self, it: w.ComeUp) -> None:
        engine = self.engine
        terms = Terms.of(it.agreement) if it.agreement else None
        self.resumed = bool(it.plan.checkpoint)
        self._joined = (it.version, terms)
        self.come_up()
        engine.user_loop.joined(it.version)

    def _resume_step(self, it: w.ResumeStep) -> None:
        engine, plan = self.engine, it.plan
        _, state = engine.current()
        engine.pipeline.extend_step()
        engine.watch.remember(only_new=True)
        state.resume(Work(plan.work, plan.kept, plan.layout.order), plan.started)
        engine.pipeline.resend(state, plan.started)

    def _tell_entered(self, it: w.TellEntered) -> None:
        engine = self.engine
        engine.telemetry.span(Spent.RESTORE, self._edited_ns)
        engine.telemetry.interrupted()
        if engine.user_loop.begun:
            engine.large.release()
        self._take_calls(engine.orders[it.generation].plan)
        if not it.tell:
            return
        worker = engine.membership.worker
        if it.switched:
            moved, switch_s = self.loader.moved, time.monotonic() - self._began
            if engine.prefetch.generation == it.generation:
                moved += engine.prefetch.bytes - self._ahead
            engine.membership.tell(e.WorkerSwitched(worker, it.generation, switch_s, self._ahead, moved))
            return
        edit_s, restore_s = self._edited - self._began, time.monotonic() - self._edited
        engine.membership.tell(e.WorkerResumed(worker, it.generation, edit_s, restore_s))

    def come_up(self) -> None:
        """This rank joined: bring what the user's code and the schedulers have changed to the position of the job."""
        version, terms = self._joined
        if self.engine.version != version:
            return
        if terms is not None:
            self._catch_up(terms, version, back=False)
        self.engine.turns.adopt(self._after or (terms and terms.after) or {})
        self.engine.turns.enter(version)
        if not (self.resumed and self.engine.settings.resume_hyperparameters == "script"):
            self.engine.adjustments.join(version, clip=not self.resumed)

    def _catch_up(self, terms: Terms | None, version: int, *, back: bool) -> None:
        """Bring the registered objects (the scheduler) to the version that the other ranks are at, or go back to.

        `terms`: the agreement in the step before it, None at the beginning. When going back, what the user's code has
        changed stays as it is until the next step begins (`UserTurns`).
        """
        engine = self.engine
        registered = engine.registered
        states: Mapping[str, Any] = terms.registered if terms else engine.birth["registered"]
        engine.adjustments.set(terms.settings if terms else engine.birth)
        for name, state in states.items():
            if not back or name in registered.driven or name not in registered.objects:
                registered.load(name, state)
        if terms is not None:
            engine.protection.adopt(terms)
            for step in range(version - 1, version) if terms.advance is None else range(terms.advance):
                for advance in engine.on_commit:
                    advance(step)
            engine.reduction.loss_scale.advance(terms, engine.data.order)
        engine.adjustments.settle()
