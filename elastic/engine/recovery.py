"""Recovery: from an aborted generation to one version on all ranks again, inside the step.

The survivor reports what it has; the coordinator's plan says what everybody does; carrying it out is the same code
for a loss, for a rank that joins, and for the start.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import torch

from everstep.checkpointing.access.restore import Fetched, Sources
from everstep.checkpointing.memory.record import ShardState, read_record
from everstep.checkpointing.universal.manifest import CheckpointError
from everstep.checkpointing.universal.store import StoreError
from everstep.comms.mesh.communicator import Aborted, Key, Kind
from everstep.elastic.contract.errors import JobEnded
from everstep.elastic.contract.membership import Orders
from everstep.elastic.contract.progress import Phase
from everstep.elastic.contract.stateful import decode
from everstep.elastic.contract.telemetry import Spent
from everstep.elastic.guard.backups import Copies, backup_ranks
from everstep.elastic.holding.zero import ShardedOptimizer
from everstep.elastic.step.steps import StepState
from everstep.resharding.neighbors import stand_ins
from everstep.resharding.plan import Plan, Report
from everstep.resharding.work import Work

from .engine import (
    DECISION,
    SAVES,
    Engine,
    Step,
)
from .resume import CheckpointStates

KEEPER_PATIENCE_S = 5.0  # how long a keeper that cannot be reached is waited for: it may be starting again
ANSWERED_PATIENCE_S = 1.0  # how long shards that all keepers say they lack are: a worker may be writing them
FETCH_AGAIN_S = 0.02  # between two times that keepers are asked for what they lack
_GUIDE = Key(Kind.SWITCH, 0)


class Recovery:
    """Reports, and carries out plans, for one engine."""

    def __init__(self, engine: Engine, token: str, node: str, fresh: bool) -> None:
        self.engine = engine
        self.token = token
        self.node = node
        self.fresh = fresh  # has nothing of the job yet
        self.resumed = False  # from a checkpoint
        self._joined: tuple[int, dict[str, Any]] = (-1, {})  # the version this rank joined at, and what was agreed then
        self._after: dict[str, Any] = {}  # how the user's code has left things where the guide is
        self.keepers: dict[str, str] = {}  # node -> address, our own first

    def recover(self) -> None:
        """After `Aborted`: report, wait for the plan, carry it out; start again if it happens again."""
        engine = self.engine
        if engine.values_version == engine.owned_version == engine.version and engine.watch.changed(thorough=True):
            engine.values_version, engine.owned = -1, set()  # put in for an evaluation: others are not to get that
        engine.progress.mark(Phase.RECOVER, engine.version)
        engine.telemetry.interrupted()
        began_ns = time.monotonic_ns()
        engine.switch = None
        while True:
            engine.membership.report(self.make_report)
            try:
                self.carry_out(self._orders())
            except Aborted:
                continue
            engine.telemetry.span(Spent.RECOVER, began_ns)
            return

    def enter(self) -> None:
        """A new worker: wait for the first plan that has a place for it, and carry it out."""
        engine = self.engine
        try:
            with engine.progress.waiting("the other workers to be ready, and the coordinator's first plan"):
                orders = engine.membership.orders(engine.progress.tick)
            self.carry_out(orders)
        except Aborted:
            self.recover()

    def _orders(self) -> Orders:
        with self.engine.progress.waiting("the reports of all ranks, and the coordinator's plan"):
            return self.engine.membership.orders(self.engine.progress.tick)

    def leave(self, orders: Orders) -> None:
        """The others go on without this rank. It stays for a recovery that still counts it in, until it is let go.

        Raises JobEnded then, and Aborted in that case.
        """
        engine = self.engine
        engine.progress.mark(Phase.LEAVE, engine.version)
        engine.settle()
        engine.snapshots.wait(engine.progress.tick)
        with engine.progress.waiting(SAVES):
            engine.checkpoints.conclude(self._patient)
        engine.membership.tell("switched", generation=orders.plan.generation)
        with engine.progress.waiting("the coordinator to let this node go"):
            over = engine.membership.wait_for_end(engine.progress.tick)
        if over:
            raise JobEnded
        raise Aborted(orders.plan.generation)

    def committed(self, shards: list[int]) -> dict[int, ShardState]:
        """What keepers hold of this version; not all, if they lack some after a while. Raises Aborted."""
        engine = self.engine
        found: dict[int, ShardState] = {}
        engine.snapshots.wait(self._patient)
        deadline = time.monotonic() + KEEPER_PATIENCE_S
        while self.keepers and len(found) < len(shards) and time.monotonic() < deadline:
            sources = Sources(self.keepers, self.token, self._patient)
            try:
                absent = [index for index in shards if index not in found]
                fetched = sources.fetch(absent, engine.version, replay=False)
            finally:
                sources.close()
            found.update({index: read_record(blobs[0]) for index, (_, blobs) in fetched.items()})
            self._patient()
        return found

    def make_report(self, generation: int) -> Report:
        """What this worker has."""
        engine = self.engine
        if self.fresh or engine.layout is None or engine.state is None:
            return Report(rank=engine.rank, generation=0, fresh=True)
        state = engine.state
        protected, before = engine.protection.report(engine.version)
        valid = engine.values_version == state.step
        return Report(
            rank=engine.rank,
            generation=engine.layout.generation,
            owned_version=engine.owned_version,
            owned=tuple(sorted(engine.owned)),
            values_version=engine.values_version,
            layers=(engine.stack.held.start, engine.stack.held.stop),
            agreed=engine.agreed,
            agreement=engine.agreement,
            protected=protected,
            protected_before=before,
            outlives=engine.snapshots.protected,
            held=tuple(sorted(state.held)) if valid else (),
            started=tuple(sorted(state.started)) if valid else (),
            todo=tuple(state.todo) if valid else (),
        )

    # ------------------------------------------------------------ carrying out a plan

    def carry_out(self, orders: Orders) -> None:
        """Enter the plan's generation with everything it asks for in place."""
        engine, plan = self.engine, orders.plan
        started, began_ns = time.monotonic(), time.monotonic_ns()
        engine.telemetry.generation = plan.generation
        engine.telemetry.interrupted()
        self.keepers = dict(sorted(orders.keepers.items(), key=lambda item: item[0] != self.node))
        with engine.progress.waiting(f"links to the other ranks of generation {plan.generation}"):
            engine.comm.edit(plan.generation, orders.peers)
        if engine.membership.superseded(plan.generation):  # an abort that the edit may have cleared
            raise Aborted(plan.generation)
        edited = time.monotonic()
        engine.telemetry.span(Spent.EDIT, began_ns)
        began_ns = time.monotonic_ns()
        engine.snapshots.wait(engine.progress.tick)
        engine.pipeline.end_step()
        fresh = self.fresh
        back = not fresh and engine.rank in plan.fresh  # to an older version: what is held here is not used
        version, agreement = self._find_place(plan)
        self._enter_protection(orders)  # not before a member has: this node's keeper may serve others of the last one
        engine.progress.mark(Phase.JOIN if fresh else Phase.RESTORE, version)
        if back:
            engine.checkpoints.abandon()
            self._forget_all(version, agreement)
        if not fresh and not back and engine.owned_version == version - 1:
            engine.update(agreement)
        was_current = not fresh and not back and engine.values_version == version
        seeded = version == 0 and engine.pristine and not plan.checkpoint
        engine.pristine = seeded
        self._take_places(orders, version, anew=fresh or back, seeded=seeded)
        if plan.checkpoint:
            self._read_checkpoint(plan, version, agreement)
        self._restore(plan, engine.optimizer, engine.owned, version, agreement)
        self._restore(plan, engine.backups.copies, engine.backups.level, version, agreement)
        if engine.rank in plan.refresh:
            engine.values_version = -1
        engine.exchange.publish(version, plan.layout, plan.refresh)
        self._settle(plan, version, agreement, was_current, back=back)
        engine.telemetry.span(Spent.RESTORE, began_ns)
        engine.telemetry.interrupted()
        self.fresh = False
        if plan.generation > 1:
            kind = "switched" if plan.version is None and not fresh else "resumed"
            times = {"edit_s": edited - started, "restore_s": time.monotonic() - edited}
            engine.membership.tell(kind, generation=plan.generation, **times)

    def _find_place(self, plan: Plan) -> tuple[int, str]:
        """The version the plan brings us to, and what was agreed in the step before it."""
        engine = self.engine
        if self.fresh:  # what the guide of a plan told that was aborted since may be of another version
            self._after, engine.results, engine.leave_at = {}, [], None
        if self.fresh and plan.guide is not None:
            message = json.loads(bytes(engine.comm.receive(plan.guide, _GUIDE)))
            self._after = message["after"]
            self.engine.adjustments.take_records(message["records"])
            engine.results = [Step(*step) for step in message["unseen"]]
            engine.leave_at = message["left"]
            return message["version"], message["agreement"]
        version = engine.version if plan.version is None else plan.version
        agreement = engine.agreement if plan.version is None else plan.agreement
        resumed = agreement and not json.loads(agreement).keys().isdisjoint(("after", "advance"))
        if self.fresh and not resumed:  # what the others' code made of the last step is lost with them
            engine.results = [Step(*step) for step in self._unseen(version, agreement)]
        if engine.rank == plan.guide:
            told = {"version": version, "agreement": agreement, "after": self._after_users(version)}
            told |= {"left": engine.leave_at, "unseen": self._unseen(version, agreement)}
            message = json.dumps({**told, "records": engine.adjustments.records()}).encode()
            for rank in plan.fresh:
                engine.comm.send(rank, _GUIDE, [message])
        return version, agreement

    def _after_users(self, version: int) -> dict[str, Any]:
        """How the user's code has left things here; the settings only if they are those of `version` already."""
        if self._in_turn(version):
            return {}  # what it makes of the step it makes there again, from where it began
        after = self.engine.after_users()
        return after if self.engine.version == version else {"users": after["users"]}

    def _in_turn(self, version: int) -> bool:
        """Whether the user's code here is at the last step before `version`, or has left the loop in it."""
        turn = self.engine.turn
        return turn is not None and turn.index == version - 1 and self.engine.version == version

    def _unseen(self, version: int, agreement: str) -> list[list[Any]]:
        """The steps before `version` that the user's code here has not seen yet, so that it has not run for them."""
        engine = self.engine
        if engine.turn is not None and self._in_turn(version):
            return [[engine.turn.index, engine.turn.loss, engine.turn.gradient_norm]]
        steps = [[step.index, step.loss, step.gradient_norm] for step in engine.results]
        if engine.version < version and agreement:
            terms = json.loads(agreement)
            steps.append([terms["step"], terms["loss"], terms["norm"]])
        return steps

    def _enter_protection(self, orders: Orders) -> None:
        """The keeper of this node hears of the generation, and of the parity it holds in it."""
        engine, plan = self.engine, orders.plan
        joins = plan.version is None and not plan.leaving
        engine.protection.enter(plan.generation, orders.placement, joins=joins)
        engine.snapshots.protected = -1 if plan.checkpoint else max(engine.snapshots.protected, plan.protected)
        placement = orders.placement
        if engine.settings.protection == "replay":  # workers do it, not keepers
            placement = replace(placement, stripes=())
        engine.snapshots.enter(plan.generation, placement, orders.keepers, engine.record_bytes)

    def _forget_all(self, version: int, agreement: str) -> None:
        """Go back: what was agreed, reduced and computed since `version` will be again, and come out the same.

        All of it at once, the scheduler too: after an abort the next plan need not go back once more.
        """
        engine = self.engine
        terms: dict[str, Any] = json.loads(agreement) if agreement else {}
        engine.adjustments.leave(engine.version, version, loops=engine.loops)
        self._catch_up(terms or engine.birth, version, back=True, advance=bool(terms))
        if engine.loops:  # the user's own loop computes again, and begins where it had left things then
            self._leave_as_users(terms.get("after", {}))
        engine.version = engine.owned_version = version
        engine.values_version = -1
        engine.owned = set()
        engine.gradients = {}
        engine.agreed, engine.agreement = version - 1, agreement

    def _take_places(self, orders: Orders, version: int, *, anew: bool, seeded: bool) -> None:
        """Hold the layers and own the shards of the plan; what is gained has no values yet, unless from the seed."""
        engine, plan, layout = self.engine, orders.plan, orders.plan.layout
        backed = {s.index for s in engine.backups.shards}
        stage = layout.stage_of(engine.rank)
        if (engine.stack.held.start, engine.stack.held.stop) != (stage.start, stage.stop):
            engine.values_version = engine.values_version if seeded else -1
            engine.stack.hold(stage.start, stage.stop, free=not seeded)
        shards = layout.index(engine.stack.spec).owned(engine.rank)
        gained = {gain.shard for gain in plan.gains if gain.rank == engine.rank}
        kept = {s.index for s in shards} - gained if not anew else set()
        before = backed | {s.index for s in engine.optimizer.owned}
        engine.optimizer.own(shards)
        engine.owned = {s.index for s in shards} if seeded else kept
        engine.owned_version = version
        replay = engine.settings.protection == "replay"
        ranks = backup_ranks(layout, orders.placement, orders.nodes) if replay else {}
        engine.backups.take_places(layout, ranks, anew=anew)
        if seeded:
            for shard in engine.backups.shards:
                engine.backups.copies.seed(shard)
                engine.backups.level.add(shard.index)
        now = {s.index for s in (*shards, *engine.backups.shards)}
        engine.snapshots.leave(before - now, version)

    def _restore(self, plan: Plan, optimizer: ShardedOptimizer, held: set[int], version: int, agreement: str) -> None:
        """Fetch the shards that are not `held` from the keepers, and add them to it.

        The last step is replayed where only its gradient is there.
        """
        engine = self.engine
        missing = [s.index for s in optimizer.owned if s.index not in held]
        if not missing:
            return
        for index in [i for i in missing if i in plan.substitutes]:
            self._make_up(plan, optimizer, index, version, agreement)
            held.add(index)
        missing = [index for index in missing if index not in held]
        with engine.progress.waiting(f"{len(missing)} shards of version {version} in the keepers"):
            found = self._fetch_all(plan, missing, version)
        terms = json.loads(agreement) if agreement else {}
        replays: dict[int, torch.Tensor] = {}
        for index, (stored, blobs) in found.items():
            optimizer.load(index, read_record(blobs[0]))
            if stored < version:
                dtype = engine.exchange.accumulation(engine.stack.spec.shards[index])
                replays[index] = torch.frombuffer(bytearray(blobs[1]), dtype=dtype)
        if replays:
            optimizer.update(replays, terms)
        held.update(found)

    def _read_checkpoint(self, plan: Plan, version: int, agreement: str) -> None:
        """Read what is owned here from the checkpoint that all go on from.

        If it is damaged, the coordinator is told, and decides.

        Raises Aborted when the generation ends.
        """
        engine = self.engine
        try:
            states = CheckpointStates(engine.settings, engine.stack, plan.checkpoint)
            states.load_constants()
            engine.pipeline.forwards.remember()
            for optimizer, held in ((engine.optimizer, engine.owned), (engine.backups.copies, engine.backups.level)):
                for shard in optimizer.owned:
                    optimizer.load(shard.index, states.state(shard))
                    held.add(shard.index)
                    self._patient()
            script = json.loads(agreement).get("script") if agreement else None
            engine.checkpoints.resumed(version, script, plan.checkpoint, states.lineage)
            return
        except (CheckpointError, StoreError) as error:
            engine.membership.tell("unreadable", name=plan.checkpoint, why=str(error))
        with engine.progress.waiting(DECISION):
            while True:
                self._patient()
                time.sleep(0.01)

    def _make_up(self, plan: Plan, optimizer: ShardedOptimizer, index: int, version: int, agreement: str) -> None:
        """A shard that is gone for good: the average of its neighbours', weighted by the norms of their gradients.

        Lossy, and what the user asked for (on_loss="neighbors"). Its optimizer state starts anew.
        """
        engine = self.engine
        spec = engine.stack.spec
        sources = stand_ins(spec, plan.substitutes)[index]
        copies = Copies(engine.optimizer.user, engine.stack)
        copies.own(spec.shards[i] for i in sources)
        self._restore(plan, copies, set(), version, agreement)
        norms: dict[str, float] = json.loads(agreement)["layers"] if agreement else {}
        weights = [norms.get(str(spec.home(spec.shards[i])), 0.0) for i in sources]
        if not sum(weights):
            weights = [1.0] * len(sources)
        values = [copies.state(i)["value"].double() * weight for i, weight in zip(sources, weights, strict=True)]
        value = torch.stack(values).sum(0) / sum(weights)
        dtype = copies.state(sources[0])["value"].dtype
        optimizer.load(index, {"value": value.to(dtype)})

    def _fetch_all(self, plan: Plan, missing: list[int], version: int) -> dict[int, Fetched]:
        """All the missing shards: from our own memory, from whichever keepers have them, from parity.

        A keeper that restarts is waited for. When some shards are nowhere, the coordinator is told, and ends this
        generation. Raises Aborted when the generation ends.
        """
        found: dict[int, Fetched] = {}
        for index in missing:
            data = self.engine.snapshots.resume(index, version)
            if data is not None:
                found[index] = (version, [data])
        started = time.monotonic()
        told = False
        while absent := [index for index in missing if index not in found]:
            sources = Sources(self.keepers, self.token, self._patient)
            try:
                found.update(sources.fetch(absent, version, replay=True))
            finally:
                sources.close()
                for item in sources.damage:
                    self.engine.membership.tell("corruption", generation=plan.generation, **item)
            if len(found) == len(missing):
                break
            patience_s = KEEPER_PATIENCE_S if sources.unreachable else ANSWERED_PATIENCE_S
            if not told and time.monotonic() - started > patience_s:
                told = True
                gone = [index for index in missing if index not in found]
                self.engine.membership.tell("lacking", generation=plan.generation, version=version, shards=gone)
            self._patient()
            time.sleep(FETCH_AGAIN_S)
        return found

    def _patient(self) -> None:
        self.engine.progress.tick()
        self.engine.comm.ready(())  # raises Aborted

    def _settle(self, plan: Plan, version: int, agreement: str, was_current: bool, *, back: bool) -> None:
        """Everything is at `version`: go on with its step."""
        engine = self.engine
        fresh = self.fresh
        engine.layout = plan.layout
        engine.values_version = version
        if plan.generation > 1:
            engine.adjustments.interrupted(version)
        terms: dict[str, Any] = json.loads(agreement) if agreement else {}
        if fresh:
            engine.version = version
            engine.agreed, engine.agreement = version - 1, agreement
            self.resumed = bool(plan.checkpoint)
            self._joined = (version, terms)
            self.come_up()
            engine.shown = max([engine.shown, *(step.index for step in engine.results)])
        if terms and (fresh or back):  # all who committed the step may have died before they could say so
            engine.tell_committed(terms, agreement)
        if was_current and engine.state is not None and plan.version is not None:
            engine.protect(anyway=True)
            engine.pipeline.extend_step()
            engine.watch.remember(only_new=True)
            engine.state.resume(Work(plan.work, plan.kept), plan.started)
            engine.pipeline.resend(engine.state, {s.span for s in plan.started})
            return
        if not fresh and engine.version == version - 1:
            engine.agreed, engine.agreement = version - 1, agreement
            engine.protection.adopt(terms)
            engine.commit(agreement)
        engine.protect(anyway=True)
        work = Work(plan.work, plan.kept)
        engine.state = StepState.begin(version, engine.rank, engine.settings.micro_batches, work)
        engine.pipeline.begin_step()
        engine.watch.remember()

    def come_up(self) -> None:
        """This rank joined: bring what the user's code and the schedulers have changed to where it joined."""
        version, terms = self._joined
        if self.engine.version != version:
            return
        if terms:
            self._catch_up(terms, version, back=False, advance=True)
        self._leave_as_users(self._after or terms.get("after", {}))
        if not (self.resumed and self.engine.settings.resume_hyperparameters == "script"):
            self.engine.adjustments.join(version, clip=not self.resumed)

    def _leave_as_users(self, after: dict[str, Any]) -> None:
        """The user's code has run elsewhere for the steps before this one: take over what it made of them."""
        engine = self.engine
        if "groups" in after:
            engine.adjustments.set(after)
        for name, state in after.get("users", {}).items():
            if name in engine.registered:
                engine.registered[name].load_state_dict(decode(state))
            else:
                engine.unclaimed[name] = state

    def _catch_up(self, terms: dict[str, Any], version: int, *, back: bool, advance: bool) -> None:
        """Bring the registered objects (the scheduler) to the version that the others are at, or go back to.

        What the user's own code steps between steps is left alone when going back, since that code does not run
        again for steps that it has seen; unless its loop computes them.
        """
        engine = self.engine
        engine.adjustments.set(terms)
        for name, state in terms["registered"].items():
            if name not in engine.registered:
                engine.unclaimed[name] = state
            elif not back or engine.loops or name in engine.driven:
                engine.registered[name].load_state_dict(decode(state))
        if advance:
            engine.protection.adopt(terms)
            for _ in range(terms.get("advance", 1)):
                for step in engine.on_commit:
                    step()
        engine.adjustments.settle(version)
