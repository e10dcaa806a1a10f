"""A simulated worker: carries out the instructions of the worker's state machine with hashes for tensors.

Every decision is the product's own (`protocol/worker.py`, `legs.py`, `protecting.py`). The simulated worker itself
replaces only the loop of `elastic/api/run.py`: it calls the machine at step boundaries, and recovers when a generation
ends. It calls `mark` where the real worker marks its progress, which is where faults strike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from everstep.elastic.protocol import events as e
from everstep.elastic.protocol import worker_events as w
from everstep.elastic.protocol.agreement import Share
from everstep.elastic.protocol.backing_up import backup_ranks
from everstep.elastic.protocol.replicas import Odd
from everstep.elastic.protocol.terms import Terms
from everstep.elastic.protocol.worker import offered, step
from everstep.elastic.protocol.worker_state import new_worker, report, violations
from everstep.resharding.layout import Layout
from everstep.resharding.neighbors import stand_ins
from everstep.resharding.plan import Plan, Report
from everstep.resharding.work import Work

from .backups import Backups
from .control import Control, JobEnded
from .exchange import Exchange
from .keeper import sources_first
from .links import Aborted, Links
from .pipeline import Pipeline, StepState
from .prefetcher import Prefetcher
from .protection import Protection
from .replicas import Replicas, flipped
from .restore import Sources
from .snapshots import Snapshots
from .surroundings import Surroundings
from .values import (
    ShardState,
    agreement_of,
    digest_of,
    initial,
    made_up,
    updated,
)
from .world import Steps

KEEPER_PATIENCE_S = 5.0
ANSWERED_PATIENCE_S = 1.0
AGAIN_S = 0.02


class SimWorker:
    """One incarnation of one rank."""

    def __init__(self, worker: e.WorkerId, around: Surroundings, poke: Callable[[], None]) -> None:
        self.id = worker
        self.rank = worker.rank
        self.around = around
        self.job = around.job
        self.spec = around.job.model
        self.machine = new_worker(worker.rank, self.spec, self.job.steps)
        self.links = Links(worker.rank, lambda to, g, key, data: around.send(worker.rank, to, g, key, data))
        self.control = Control(worker, around.tell, self.links.abort)
        self.snapshots = Snapshots(around.world, worker, around.board.keepers[around.node], around.state_slots, poke)
        self.protection = Protection(around.world, self.snapshots, around.interval, replay=self.replays)
        self.exchange = Exchange(self.spec, self.links, self.job.micro_batches)
        self.backups = Backups(self.links, self.snapshots)
        self.prefetch = Prefetcher(around.board, around.node, lambda phase: self.mark(phase))
        self.replicas = Replicas(self.spec, self.links, self.snapshots, self.backups, around.verify_every)
        self.flips: list[str] = []  # bits to flip: of an "owned" value, one that is only "read", or a "backup"
        self.pipeline = Pipeline(self.links, self.spec.layers, self._layer_values, around.forward_s)
        self.pipeline.mark = lambda phase: self.mark(phase)
        self.values = {s.index: initial(s.index).value for s in self.spec.shards}
        self._published = dict(self.values)  # what the runtime wrote last
        self.optimizer: dict[int, str] = {}
        self.mine: frozenset[int] = frozenset()  # shards the optimizer runs on; `owned` are those that are complete
        self.state: StepState | None = None
        self.gradients: dict[int, str] = {}
        self.finished = False
        self._orders: dict[int, e.CarryOut] = {}
        self._nodes: Sequence[str] = ()
        self._carriers: dict[type[Any], Callable[[Any], Steps[w.Event | None]]] = {
            w.SendReport: self._send_report,
            w.AwaitPlan: self._await_plan,
            w.EditLinks: self._edit_links,
            w.AskPlace: self._ask_place,
            w.TellPlace: self._tell_place,
            w.TakeUnseen: self._nothing,
            w.Prefetch: self._begin_prefetch,
            w.DropPrefetched: self._drop_prefetched,
            w.EnterProtection: self._enter_protection,
            w.ForgetSince: self._forget_since,
            w.RunOptimizer: self._run_optimizer,
            w.TakePlaces: self._take_places,
            w.OpenCheckpoint: self._nothing,
            w.Restore: self._restore,
            w.Refresh: self._refresh,
            w.Publish: self._publish,
            w.NoteChange: self._nothing,
            w.ComeUp: self._adopt,
            w.AdoptAgreement: self._adopt,
            w.TellCommitted: self._tell_committed,
            w.CommitStep: self._commit,
            w.Protect: self._protect,
            w.BeginStep: self._begin_step,
            w.ResumeStep: self._resume_step,
            w.TellEntered: self._tell_entered,
            w.Compute: self._compute,
            w.Reduce: self._reduce,
            w.Agree: self._agree,
            w.TellIdled: self._tell_idled,
            w.ForgetSnapshots: self._forget_snapshots,
            w.HandOver: self._hand_over,
            w.ReportLeft: self._tell_left,
            w.WaitUntilWhole: self._conclude,
        }

    @property
    def replays(self) -> bool:
        return self.job.protection == "replay"

    @property
    def version(self) -> int:
        return self.machine.version

    @property
    def layout(self) -> Layout | None:
        return self.machine.layout

    @property
    def owned(self) -> frozenset[int]:
        return self.machine.holding.owned

    def mark(self, phase: str) -> None:
        self.around.mark(self.id, phase, self.version)

    def _layer_values(self, layer: int) -> list[str]:
        return [self.values[shard.index] for shard in self.spec.shards_of_layer[layer]]

    def shard_state(self, shard: int) -> ShardState:
        return ShardState(self.values[shard], self.optimizer.get(shard, ""))

    # ------------------------------------------------------------ life

    def _happened(self, event: w.Event | None) -> Steps[None]:
        """Pass an event to the machine, and carry out its instructions until none is left."""
        while event is not None:
            self.machine, instructions = step(self.machine, event)
            if found := violations(self.machine):
                raise AssertionError(f"{self.id}: {'; '.join(found)}; what happened: {', '.join(self.machine.story)}")
            event = None
            for number, instruction in enumerate(instructions, 1):
                try:
                    event = yield from self._carriers[type(instruction)](instruction)
                except Aborted:
                    # The machine has taken all of the list for done. What only informs others may be left out.
                    undone = [item for item in instructions[number:] if not isinstance(item, w.TellEntered)]
                    assert not undone, f"{self.id}: an abort in {instruction} leaves {undone} undone"
                    raise

    def life(self) -> Steps[None]:
        """From the fork to the end of the job."""
        try:
            yield self.around.startup_s
            self.around.tell(e.WorkerDeclaredElastic(self.id))
            yield self.around.startup_s / 2
            peer, around = {"incarnation": self.id.incarnation}, self.around
            around.tell(e.WorkerReady(self.id, peer, self.job, around.saved, around.memory_bytes))
            try:
                yield from self._happened(w.Started())
            except Aborted:
                yield from self._recover()
            while not (yield from self._trained()):
                pass
            self.mark("end")
            yield self.around.epilogue_s
            self.finished = True
            self.around.tell(e.WorkerFinished(self.id, self.version, f"v{self.version}"))
            while not (yield from self.control.wait_for_end()):
                yield from self._due()
                while not self.machine.ended():
                    yield from self._guarded(w.StepDue())
            yield self.around.epilogue_s / 2
        except JobEnded:
            return

    def _trained(self) -> Steps[bool]:
        """Do the next operation of the training loop; True if none is left."""
        machine = self.machine
        if machine.switch is not None:
            yield from self._guarded(w.SwitchDue())
        elif machine.leave_at is None and self.around.leaves_at <= self.version < self.job.steps:
            yield from self._guarded(w.LoopLeft())
        elif not machine.ended():
            yield from self._guarded(w.StepDue())
            yield self.around.world.between(0.0, self.around.forward_s)  # the user's code between steps
        else:
            yield from self._guarded(w.EndDue())
            return self.machine.ended() and self.machine.switch is None
        return False

    def _due(self) -> Steps[None]:
        """After Aborted: save the last checkpoint, or recover."""
        conclusion, self.control.conclusion = self.control.conclusion, None
        if conclusion is None:
            yield from self._recover()
            return
        if self.version != conclusion.version:
            raise AssertionError(f"{self.id} is at {self.version}, and is to save {conclusion.version}")
        yield from self.snapshots.wait()
        saved = e.Saved(self.version, conclusion.name, self.machine.agreement)
        states = {shard: self.shard_state(shard) for shard in self.owned}
        yield self.around.storage.write_s()
        self.around.tell(e.WorkerConcluded(self.id, conclusion.name, self.around.save(self.id, saved, states)))

    def _guarded(self, event: w.Event) -> Steps[None]:
        """Run an operation that waits for others; if the generation ends, recover instead."""
        try:
            yield from self._happened(event)
        except Aborted:
            if self.control.conclusion is None:
                yield from self._recover()
                return
            yield from self._due()
            if (yield from self.control.wait_for_end()):
                raise AssertionError(f"{self.id} continued, and was notified that training is over") from None
            yield from self._due()

    def _recover(self) -> Steps[None]:
        """After Aborted: report, wait for the plan, carry it out; start again after another abort."""
        holding = self.machine.holding
        if holding.values_version == holding.owned_version == self.version and self._changed():
            yield from self._happened(w.Spoiled())
        self.mark("recover")
        while True:
            try:
                yield from self._happened(w.Interrupted())
            except Aborted:
                continue
            return

    def _changed(self) -> bool:
        """Whether a value that is held here is not what was published: the contract of `elastic.holding.watch`."""
        layers = range(*self.machine.holding.layers)
        held = {shard.index for layer in layers for shard in self.spec.shards_of_layer[layer]}
        return any(self.values[shard] != self._published[shard] for shard in held)

    # ------------------------------------------------------------ entering a generation

    def _nothing(self, it: object) -> Steps[None]:
        """An instruction that concerns only the user's code."""
        yield from ()

    def _send_report(self, it: w.SendReport) -> Steps[None]:
        yield from ()
        self.control.report(self._report)

    def _report(self) -> Report:
        protected, before = self.protection.report(self.version)
        outlives = self.snapshots.protected
        return report(self.machine, self.state, protected=protected, protected_before=before, outlives=outlives)

    def _await_plan(self, it: w.AwaitPlan) -> Steps[w.Event]:
        orders = yield from self.control.orders()
        self._orders[orders.plan.generation] = orders
        return w.Assigned(orders.plan)

    def _edit_links(self, it: w.EditLinks) -> Steps[w.Event]:
        orders = self._orders[it.plan.generation]
        self._orders = {it.plan.generation: orders}
        peers = {rank: e.WorkerId(rank, peer["incarnation"]) for rank, peer in orders.peers.items()}
        self._nodes = sources_first(orders.keepers, self.around.node)
        yield self.around.world.between(0.0, 0.003)
        self.links.edit(it.plan.generation, peers)
        if self.control.superseded(it.plan.generation):
            raise Aborted
        yield 0.001
        yield from self.snapshots.wait()
        return w.Linked()

    def _ask_place(self, it: w.AskPlace) -> Steps[w.Event]:
        return w.Placed(*(yield from self.links.receive(it.rank, ("guide",))))

    def _tell_place(self, it: w.TellPlace) -> Steps[None]:
        yield from ()
        with contextlib.suppress(Aborted):
            for rank in it.ranks:
                self.links.send(rank, ("guide",), (it.version, it.agreement, self.machine.leave_at))

    def _enter_protection(self, it: w.EnterProtection) -> Steps[None]:
        yield from ()
        plan, placement = it.plan, self._orders[it.plan.generation].placement
        self.protection.enter(plan.generation, placement, joins=plan.version is None and not plan.leaving)
        # With a checkpoint or a fork, what outlived nodes was of another line.
        self.snapshots.outlives(plan.protected, forget=bool(plan.checkpoint or plan.forks))
        for shard in plan.stand_ins:
            self.snapshots.discard(shard)
        self.snapshots.enter(plan.generation, replace(placement, stripes=()) if self.replays else placement, plan.lines)
        self.mark("join" if self.machine.fresh else "restore")

    def _forget_since(self, it: w.ForgetSince) -> Steps[None]:
        yield from ()
        self.gradients = {}
        if it.agreement:
            self.protection.adopt(it.agreement)
        entering = self.machine.entering
        assert entering is not None
        self.around.facts.went_back(self.id, entering.plan, it.since)

    def _take_places(self, it: w.TakePlaces) -> Steps[None]:
        yield from ()
        if it.layers is not None:
            self._hold(*it.layers, free=not it.seeded)
        orders, before = self._orders[it.plan.generation], self.mine.union(self.backups.places.mine)
        ranks = backup_ranks(it.plan.layout, orders.placement, orders.nodes) if self.replays else {}
        self.backups.enter(ranks, discard=it.discard, seeded=it.seeded, gone=it.plan.stand_ins)
        self.snapshots.leave(before - it.shards.union(self.backups.places.mine), it.version)
        for shard in self.mine - it.shards:
            self.optimizer.pop(shard, None)
        self.mine = it.shards

    def _hold(self, start: int, stop: int, *, free: bool) -> None:
        """Hold these layers; freed values are gone, and new layers have no values yet."""
        if free:
            kept = {s.index for layer in range(start, stop) for s in self.spec.shards_of_layer[layer]}
            self.values = {shard: value if shard in kept else "freed" for shard, value in self.values.items()}

    def _restore(self, it: w.Restore) -> Steps[w.Event]:
        """Fetch the shards that are missing here, and the backups that are not up to date."""
        if it.plan.checkpoint:
            return (yield from self._read_checkpoint(it))
        ahead = yield from self.prefetch.read([move.shard for move in it.moves], it.version)
        rest = yield from self._fetch(it, [move.shard for move in it.moves if move.shard not in ahead])
        for shard, state in {**ahead, **rest}.items():
            self.load(shard, state)
        self.backups.load((yield from self._fetch(it, self.backups.places.behind())))
        return w.Restored()

    def _fetch(self, it: w.Restore, wanted: Iterable[int]) -> Steps[dict[int, ShardState]]:
        """Shards from wherever they are, or approximated from others.

        If some are missing everywhere, this rank reports them to the coordinator, which ends the generation.
        """
        found: dict[int, ShardState] = {}
        wanted, substitutes = set(wanted), it.plan.stand_ins
        for shard in sorted(wanted.intersection(substitutes)):
            neighbors = yield from self._fetch(it, stand_ins(self.spec, substitutes)[shard])
            found[shard] = made_up(neighbors)
        for shard in sorted(wanted - found.keys()):
            state = self.snapshots.stored(shard, it.version, it.plan.lines_before)
            if state is not None:
                found[shard] = state
        started, told = self.around.world.now, False
        while missing := sorted(wanted - found.keys()):
            agreed_in = Terms.of(it.agreement).generation if it.agreement else 0
            check, lines = self.links.check, it.plan.lines_before
            sources = Sources(self.around.board, self.around.node, self._nodes, check, lines, agreed_in)
            found.update((yield from sources.fetch(missing, it.version, replay=True)))
            missing = sorted(wanted - found.keys())
            patience_s = KEEPER_PATIENCE_S if sources.unreachable else ANSWERED_PATIENCE_S
            if missing and not told and self.around.world.now - started > patience_s:
                told = True
                self.around.tell(e.WorkerLacking(self.id, it.plan.generation, it.version, tuple(missing)))
            self.links.check()
            yield AGAIN_S
        return found

    def _read_checkpoint(self, it: w.Restore) -> Steps[w.Event]:
        """Read the owned shards from storage; if they are damaged, report that, and wait for the generation to end."""
        yield self.around.world.between(0.001, 0.05)
        self.links.check()
        states = self.around.storage.read(it.plan.checkpoint)
        if states is None:
            self.around.tell(e.CheckpointUnreadable(self.id, it.plan.checkpoint, "a chunk is damaged"))
        while states is None:
            self.links.check()
            yield None
        for move in it.moves:
            self.load(move.shard, states[move.shard])
        self.backups.load({shard: states[shard] for shard in self.backups.places.mine})
        return w.Restored()

    def _adopt(self, it: w.ComeUp | w.AdoptAgreement) -> Steps[None]:
        yield from ()
        if it.agreement:
            self.protection.adopt(it.agreement)

    def _resume_step(self, it: w.ResumeStep) -> Steps[None]:
        yield from ()
        assert self.state is not None
        self.state.resume(Work(it.plan.work, it.plan.kept, it.plan.layout.order), it.plan.started)
        self.pipeline.resend(self.state, it.plan.started)

    def _tell_entered(self, it: w.TellEntered) -> Steps[None]:
        yield from ()
        facts, plan = self.around.facts, self._orders[it.generation].plan
        facts.entered(self.id, plan, self.version)
        facts.owned(self.id, it.generation, self.version, {s: self.shard_state(s) for s in self.owned})
        if plan.version is None and not it.switched:
            self.mark("joined")
        if it.tell and it.switched:
            self.around.tell(e.WorkerSwitched(self.id, it.generation))
        elif it.tell:
            self.around.tell(e.WorkerResumed(self.id, it.generation, 0.0, 0.0))

    def _hand_over(self, it: w.HandOver) -> Steps[None]:
        """The others continue without this rank: take part in recoveries that include it, until it is released."""
        self.mark("leave")
        yield from self.snapshots.wait()
        self.around.tell(e.WorkerSwitched(self.id, it.generation))
        if (yield from self.control.wait_for_end()):
            raise JobEnded
        raise Aborted

    # ------------------------------------------------------------ one step

    def _begin_step(self, it: w.BeginStep) -> Steps[None]:
        yield from ()
        self.state = StepState.begin(it.version, self.rank, it.work)

    def _compute(self, it: w.Compute) -> Steps[w.Event]:
        assert self.state is not None
        self.control.begun(it.step)
        self._flip("read")
        yield from self.pipeline.run(self.state, it.depth)
        return w.Computed()

    def _reduce(self, it: w.Reduce) -> Steps[w.Event]:
        layout, state = self.layout, self.state
        assert layout is not None
        assert state is not None
        self.mark("reduce")
        for shard in sorted(self.mine):
            self.snapshots.open_gradient(shard, state.step)
        self.gradients = yield from self.exchange.reduce(state, layout, sorted(self.mine))
        for shard, gradient in self.gradients.items():
            self.snapshots.seal_gradient(shard, state.step, gradient)
        yield from self.backups.exchange(state.step, layout, self.gradients)
        return w.Reduced()

    def _agree(self, it: w.Agree) -> Steps[w.Event]:
        self.mark("agree")
        yield from self.snapshots.wait()
        yield from self.protection.wait(it.step, self.links.check)
        self._flip("owned", "backup")
        layout = self.layout
        assert layout is not None
        proposal = self._offered(last=it.last)
        mine = Share(
            digest=digest_of(self.gradients),
            join=proposal.generation if proposal else 0,
            waits=self.prefetch.waits(proposal, self.rank),
            kept=self.protection.share(it.step, self.rank),
            replicas=self.replicas.imbalance(it.step, layout, self.machine.holding.layers, self.values),
        )
        share = yield from self.links.merged((it.step,), mine)
        if odd := (yield from self.replicas.odd(it.step, layout, share)):
            yield from self._distrust(it.step, layout, odd)
        wanted = proposal is not None and share.join == proposal.generation
        terms = self.protection.agreed(it.step, share.kept)
        agreement = agreement_of(it.step, share.digest, generation=layout.generation, **terms)
        self.around.facts.agreed(self.id, it.step, agreement)
        return w.Agreed(agreement, proposal, wanted, share.waits)

    def _begin_prefetch(self, it: w.Prefetch) -> Steps[None]:
        yield from ()
        layout, nodes = self.layout, self._orders[it.plan.generation].nodes
        assert layout is not None
        sources = {nodes[layout.owners[move.shard]] for move in it.plan.gained}
        self.prefetch.begin(it.plan, sources, self.rank, self.version)

    def _drop_prefetched(self, it: w.DropPrefetched) -> Steps[None]:
        yield from ()
        self.prefetch.end()

    def _distrust(self, step: int, layout: Layout, odd: list[Odd]) -> Steps[None]:
        """Replicas differ: the wrong ones are discarded and reported to the coordinator, which ends the generation."""
        self.state = StepState.begin(step, self.rank, layout.work)
        mine = [item for item in odd if item.rank == self.rank]
        for item in mine:
            if item.backup:
                self.backups.places.in_sync.discard(item.shard)
                self.snapshots.discard(item.shard)
        wrong = frozenset(item.shard for item in mine if not item.backup)
        yield from self._happened(w.Distrusted(wrong, values=bool(wrong)))
        yield from self.replicas.all_know(step)
        if self.rank == min(self.links.members):
            for item in {(item.rank, item.backup): item for item in reversed(odd)}.values():
                where = "backup" if item.backup else "replica"
                found = e.CorruptionFound(self.id, layout.generation, where, rank=item.rank, shard=item.shard)
                self.around.tell(found)
        while True:
            self.links.check()
            yield None

    def _flip(self, *kinds: str) -> None:
        """Flip the bits that are due: not in version 0, which is compared before training."""
        held = {s.index for layer in range(*self.machine.holding.layers) for s in self.spec.shards_of_layer[layer]}
        shards = {"owned": self.owned, "read": held - self.owned, "backup": self.backups.places.in_sync}
        for kind in [kind for kind in self.flips if kind in kinds and shards[kind] and self.version]:
            self.flips.remove(kind)
            shard = min(shards[kind])
            if kind == "backup":
                state = self.backups.states[shard]
                self.backups.states[shard] = state._replace(value=flipped(state.value, self.rank))
            else:
                self.values[shard] = flipped(self.values[shard], self.rank)
            self.mark("flip")

    def _offered(self, *, last: bool) -> Plan | None:
        orders = self.control.proposed(last)
        if orders is not None:
            self._orders[orders.plan.generation] = orders
        return offered(self.machine, orders.plan if orders else None)

    def _tell_idled(self, it: w.TellIdled) -> Steps[None]:
        yield from ()
        self.around.tell(e.WorkerIdled(self.id, it.generation))

    def _forget_snapshots(self, it: w.ForgetSnapshots) -> Steps[None]:
        yield from ()
        self.snapshots.forget(nodes=self.protection.nodes)

    def _run_optimizer(self, it: w.RunOptimizer) -> Steps[None]:
        yield from ()
        self.mark("update")
        for shard in sorted(self.mine):
            if shard in self.gradients:
                self.load(shard, updated(self.shard_state(shard), self.gradients[shard]))
        self.backups.update()

    def load(self, shard: int, state: ShardState) -> None:
        self.values[shard], self.optimizer[shard] = state

    def _publish(self, it: w.Publish) -> Steps[w.Event]:
        yield from self.exchange.publish(it.version, it.layout, self.values)
        self._published = dict(self.values)
        return w.Published()

    def _refresh(self, it: w.Refresh) -> Steps[w.Event]:
        yield from self.exchange.publish(it.version, it.plan.layout, self.values, it.plan.values)
        self._published = dict(self.values)
        return w.Published()

    def _commit(self, it: w.CommitStep) -> Steps[None]:
        """Version step + 1 is held here: start protecting it."""
        yield from ()
        self.mark("commit")
        if it.free:
            stage = it.layout.stage_of(self.rank)
            self._hold(stage.start, stage.stop, free=True)
        self.prefetch.committed(Terms.of(it.agreement))
        self._keep(anyway=self.machine.ended())
        if self.around.saves_every and self.version % self.around.saves_every == 0:
            saved = e.Saved(self.version, f"v{self.version}-g{it.layout.generation}", it.agreement)
            states = {shard: self.shard_state(shard) for shard in self.owned}
            delay_s = self.around.world.between(0.001, 0.3)
            self.around.world.after(delay_s, lambda: self.around.save(self.id, saved, states))
        yield from self._tell_committed(w.TellCommitted(it.agreement, it.layout.generation))

    def _tell_committed(self, it: w.TellCommitted) -> Steps[None]:
        """Report to the coordinator that a step is committed."""
        yield from ()
        terms = Terms.of(it.agreement)
        told = {name: getattr(terms, name) for name in ("digest", "protected", "every")}
        self.around.tell(e.WorkerCommitted(self.id, terms.step, it.agreement, generation=it.generation, **told))

    def _protect(self, it: w.Protect) -> Steps[None]:
        yield from ()
        self._keep(anyway=True)

    def _keep(self, *, anyway: bool) -> None:
        """Have the keeper hold this version of every owned shard; the copy overlaps the next step."""
        self.snapshots.protect(sorted(self.mine.union(self.backups.places.mine)))
        protect = self.protection.begins(self.version, anyway=anyway)
        shards = sorted(self.owned | self.backups.places.in_sync)
        self.snapshots.begin(self.version, self._state_of, shards, protect=protect)

    def _state_of(self, shard: int) -> ShardState:
        return self.shard_state(shard) if shard in self.mine else self.backups.states[shard]

    # ------------------------------------------------------------ the end

    def _tell_left(self, it: w.ReportLeft) -> Steps[None]:
        yield from ()
        self.around.tell(e.WorkerLeft(self.id, it.version, f"v{it.version}"))
        proposal = self._offered(last=True)
        if proposal is not None:
            self.around.tell(e.WorkerIdled(self.id, proposal.generation))

    def _conclude(self, it: w.WaitUntilWhole) -> Steps[w.Event]:
        """Past the last step: return when its version is whole here, parity included."""
        if it.protect:
            self._keep(anyway=True)
        yield from self.snapshots.wait()
        yield from self.protection.wait(self.version + 1, self.links.check)
        return w.Concluded()
