"""The engine of a worker: carries out the instructions of the worker's state machine that make up a step.

    compute -> reduce -> agree -> update -> publish -> commit

Operations that wait for other ranks raise `Aborted` when the generation ends; `Recovery` then reports that to the
machine, and carries out the instructions that bring this rank and the others to one version again.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from everstep.checkpointing.access.client import KeeperLink
from everstep.checkpointing.access.snapshot import Snapshots
from everstep.checkpointing.memory.record import ShardState
from everstep.checkpointing.universal.lineage import Lineage
from everstep.checkpointing.universal.writer import folder_name
from everstep.comms.mesh.communicator import Communicator
from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.membership import Membership, Orders
from everstep.elastic.contract.progress import Progress, StepPhase
from everstep.elastic.contract.settings import Settings
from everstep.elastic.contract.stateful import REGISTERED_BYTES, check_size
from everstep.elastic.contract.telemetry import Spent
from everstep.elastic.guard.agreeing import Agreeing, Own, Settled
from everstep.elastic.guard.backups import Backups
from everstep.elastic.guard.checkpoint_agreement import Checkpoints
from everstep.elastic.guard.protection import Protection
from everstep.elastic.guard.replicas import Replicas
from everstep.elastic.guard.stop_request import StopRequest
from everstep.elastic.holding.adjustments import Adjustments
from everstep.elastic.holding.hyperparameters import pack
from everstep.elastic.holding.shard_store import ShardStore
from everstep.elastic.holding.stack import LayerStack
from everstep.elastic.holding.user_optimizer import UserOptimizer
from everstep.elastic.holding.watch import Change, ParameterWatch, describe
from everstep.elastic.protocol import events as e
from everstep.elastic.protocol import worker_events as w
from everstep.elastic.protocol.replicas import disputed
from everstep.elastic.protocol.terms import Terms
from everstep.elastic.protocol.worker import offered
from everstep.elastic.protocol.worker_state import new_worker
from everstep.elastic.step.data import DataSource
from everstep.elastic.step.early_parts import EarlyParts
from everstep.elastic.step.exchange import Exchange
from everstep.elastic.step.pipeline import Pipeline
from everstep.elastic.step.reduction import Reduction
from everstep.elastic.step.steps import StepState
from everstep.elastic.step.stream_states import StreamStates
from everstep.elastic.step.worker_processes import Key
from everstep.resharding.layout import Layout
from everstep.resharding.plan import Plan
from everstep.resharding.units import Shard
from everstep.resharding.work import Work

from .call_log import CallLog
from .damage import Damage
from .driver import Driver
from .large_state import LargeState
from .loading import Loader
from .prefetcher import Prefetcher
from .registered import Registered
from .remarks import Remarks
from .user_loop import Step, UserLoop
from .user_turns import UserTurns

# What a rank waits for, apart from other ranks, in words that follow "waits for".
SNAPSHOT = "its snapshot to be copied to keeper memory"
PARITY = "the keepers of its parity group to hold the last version"
SAVES = "checkpoints that are being saved"
STATE = "run.state"  # its name among the registered objects
PACE = 0.3  # share of a step's duration over which its snapshot is spread


class Engine:
    """One worker's training state. Versions count committed steps: version v is the state before step v."""

    def __init__(
        self,
        *,
        settings: Settings,
        stack: LayerStack,
        optimizer: UserOptimizer,
        data: DataSource,
        described: dict[str, Any],
        loss_fn: Callable[[Any, Any], Any],
        reduction: Reduction,
        comm: Communicator,
        membership: Membership,
        snapshots: Snapshots,
        progress: Progress,
        link: KeeperLink | None,
        lineage: Lineage | None,
        registered: dict[str, Any],
        stream_states: StreamStates,
        loops: bool,
        seeded: bool,
        token: str,
        node: str,
    ) -> None:
        self.settings = settings
        self.stack = stack
        self.optimizer = optimizer
        self.store = ShardStore(optimizer, stack.view)  # of the shards owned here
        self.data = data
        self.comm = comm
        self.membership = membership
        self.snapshots = snapshots
        self.progress = progress
        self.telemetry = progress.telemetry
        self._remarks = Remarks(membership, lambda: self.version)
        self.reduction = reduction
        what = (settings.seed, self.fetch, loss_fn, reduction)
        early = EarlyParts(stack, comm, lambda: self.layout)
        self.pipeline = Pipeline(stack, comm, progress, *what, self._remarks.script, early, stream_states)
        self.exchange = Exchange(stack, comm, early)
        self.protection = Protection(settings, snapshots, membership)
        self.backups = Backups(optimizer, comm, snapshots, self.exchange)
        self.prefetch = Prefetcher(optimizer, self.exchange, membership, token)
        self.loader = Loader(self, token, node)
        self.watch = ParameterWatch(stack)
        self.damage = Damage(self, self.loader)
        progress.faults.flips(self.damage.inject)
        self.replicas = Replicas(self.store, snapshots, self.backups, self.exchange, settings.verify_every)
        whose = {"optimizer": optimizer.name, "data": described}
        whose |= {"settings": pack(optimizer.hyper_parameters()), "dtypes": optimizer.masters()}
        self.checkpoints = Checkpoints(settings, stack, snapshots, membership, whose, link, lineage)
        self.large = LargeState(self, link, token)
        self.registered = Registered(registered, self.large.values)
        self.stream_states = stream_states
        self.loops = loops  # the user's own loop computes the micro-batches
        self.record_bytes = [optimizer.state_bytes(shard) for shard in stack.spec.shards]
        self.on_commit: list[Callable[[int], None]] = []  # called with each step that is committed: the scheduler's
        self.adjustments = Adjustments(optimizer, stack)
        self.turns = UserTurns(self.registered, self.adjustments, optimizer)
        self.agreeing = Agreeing(stack, comm, self.adjustments, self.protection, self.checkpoints, self.replicas)
        self.worker = Driver(new_worker(comm.rank, stack.spec, settings.steps))
        self.state: StepState | None = None
        self.orders: dict[int, Orders] = {}  # generation -> the plan and addresses known for it
        self.seeded = seeded  # the script has built its model from the seed, and loaded nothing into it
        self.gradients: dict[int, Tensor] = {}  # reduced, of the shards owned here; in keeper memory
        self.user_loop = UserLoop()
        self.after_leaving: dict[str, Any] | None = None  # the state of the user's code at that time
        self.birth: dict[str, Any] = {}  # hyper-parameters and registered states before the first step
        self.calls = CallLog()
        self.stop_request = StopRequest(membership)
        self._stopping: signal.Signals | None = None  # the signal that stops a script without the launcher
        self.worker.carries(
            {
                w.Compute: self._compute,
                w.Reduce: self._reduce,
                w.Agree: self._agree,
                w.Prefetch: self._prefetch,
                w.DropPrefetched: lambda it: self.prefetch.end(),
                w.AdoptAgreement: lambda it: self.protection.adopt(Terms.of(it.agreement)),
                w.ForgetSnapshots: lambda it: self.snapshots.forget(nodes=self.protection.nodes),
                w.RunOptimizer: lambda it: self.update(it.agreement),
                w.Publish: self._publish,
                w.CommitStep: self._commit,
                w.BeginStep: self._begin_step,
                w.Protect: lambda it: self.protect(anyway=True),
                w.TellCommitted: lambda it: self._tell_committed(it.agreement, it.generation),
                w.TellIdled: lambda it: self._tell_idled(it.generation),
                w.ReportLeft: self._tell_left,
                w.WaitUntilWhole: self._conclude,
            }
        )

    # ------------------------------------------------------------ what the state machine knows

    @property
    def rank(self) -> int:
        return self.comm.rank

    @property
    def version(self) -> int:
        """The number of steps committed here."""
        return self.worker.state.version

    @property
    def layout(self) -> Layout | None:
        """The layout of the last generation that this rank entered."""
        return self.worker.state.layout

    @property
    def owned(self) -> frozenset[int]:
        """The shards that are held completely."""
        return self.worker.state.holding.owned

    @property
    def agreement(self) -> str:
        """The agreement of the last step."""
        return self.worker.state.agreement

    @property
    def switch(self) -> Plan | None:
        """A join or departure that all members enter before the next step."""
        return self.worker.state.switch

    @property
    def leave_at(self) -> int | None:
        """The version at which the user's code has left the loop."""
        return self.worker.state.leave_at

    def ended(self) -> bool:
        """Whether all steps of the job are committed."""
        return self.worker.state.ended()

    # ------------------------------------------------------------ one step

    def current(self) -> tuple[Layout, StepState]:
        assert self.layout is not None
        assert self.state is not None
        return self.layout, self.state

    def _upcoming(self) -> Iterator[Key]:
        """The micro-batches that this rank will fetch, as long as the membership and the data stay as they are."""
        layout, state = self.current()
        yield from [(state.step, span.micro_batch) for span in state.todo]
        ends = {0, len(self.stack.layers)}  # of the pipeline, where inputs and targets are needed
        mine = [span.micro_batch for span in layout.work.spans_of(self.rank) if ends & {span.start, span.stop}]
        yield from self.data.upcoming(mine, state.step + 1, self.settings.steps)

    def fetch(self, step: int, micro_batch: int) -> Any:
        """The samples of a micro-batch. The worker processes of a DataLoader fetch ahead for this rank."""
        return self.data.fetch(step, micro_batch, self._upcoming)

    def run_step(self) -> None:
        """Compute, reduce, agree on, update and commit the step of this version."""
        self.worker.happened(w.StepDue())

    def complete(self) -> None:
        """The same for a step whose micro-batches the user's own loop has computed."""
        self.worker.happened(w.Computed())

    def _compute(self, it: w.Compute) -> w.Event:
        self.settle()
        _, state = self.current()
        self.membership.begun(it.step)
        self.pipeline.run(state, it.depth)
        return w.Computed()

    def _reduce(self, it: w.Reduce) -> w.Event:
        layout, state = self.current()
        self.membership.begun(it.step)
        # Before any gradient leaves this rank: those of changed weights would be summed with those of the true ones.
        self.check_values(thorough=True)
        began_ns = time.monotonic_ns()
        self.progress.mark(StepPhase.REDUCE, state.step, finished=len(state.held))
        self.pipeline.end_step()
        # Sums are written to the keeper's memory: a rank that dies behind the agreement leaves there, beside the shard,
        # the gradient that leads to the next version.
        gradients = {
            shard.index: self.snapshots.gradient(
                shard.index, state.step, shard.elements, self.exchange.accumulation(shard)
            )
            for shard in self.store.owned
        }
        divisor = self.reduction.divisor(state.size, scaled=not self.data.order.collects(state.step))
        self.exchange.reduce(state, layout, gradients, divisor)
        for shard in self.store.owned:
            dtype = self.exchange.accumulation(shard)
            self.snapshots.seal_gradient(shard.index, state.step, shard.elements, dtype)
        self.gradients = gradients
        self.backups.exchange(state.step, layout, gradients)
        self.telemetry.span(Spent.REDUCE, began_ns)
        return w.Reduced()

    def _agree(self, it: w.Agree) -> w.Event:
        """Exchange norms and losses. The answer confirms that every owner's gradient and snapshot are in its keeper."""
        layout, state = self.current()
        self.progress.mark(StepPhase.AGREE, state.step)
        agree_ns = began_ns = time.monotonic_ns()
        waiting = self.progress.waiting
        # Once the ranks have agreed, survivors update, and the old version is gone but for what the keepers hold.
        with waiting(SNAPSHOT):
            self.snapshots.wait(self.patient)
        with waiting(PARITY):
            self.protection.wait(state.step, self.patient)
        self.telemetry.span(Spent.BLOCKED, began_ns)
        if it.last:
            with waiting(SAVES):
                self.checkpoints.conclude(self.patient)  # so that there is room for the last checkpoint
        proposal = self.offered(last=it.last)
        registered = self._registered(state.step)
        self.large.agree(registered, state.step)
        carried = self.stream_states.own(state.step, {leg.micro_batch for leg in state.held})
        own = Own(
            step=state.step,
            norms={i: float(torch.linalg.vector_norm(g)) for i, g in self.gradients.items() if self._counts(i)},
            losses=state.losses,
            tokens=sum(state.tokens.values()),
            summed=state.summed(self.agreeing.trained),
            touched=state.touched,
            idle_before=Terms.of(self.agreement).idle if self.agreement else (),
            digest=self.snapshots.digest(self.owned),
            skip_nonfinite=self.reduction.skip_nonfinite,
            join=proposal.generation if proposal else 0,
            waits=self.prefetch.waits(proposal, self.rank),
            suspects=self.damage.suspects,
            end=self.stop_request.at(state.step) or self.data.ends(state.step, self._upcoming),
            state=self.registered.compared(registered),
            carries=bool(carried),
        )
        merged, replicas = self.agreeing.begin(own, layout)
        if disputed(replicas):
            self.damage.distrust(state.step, replicas)
        self.damage.compared()
        settled = self.agreeing.settle(own, merged)
        if settled.partly and not self.loops and self.rank == min(self.comm.members):
            self._remarks.partial(state.step, settled.partly)
        self.data.share_states(state.step, registered, self.agreeing.texts, self._upcoming)
        if merged.carries:
            self.large.carry(state.step, carried, registered)
        answer = self._agreed_on(state.step, own, settled, proposal, registered)
        self.telemetry.span(Spent.AGREE, agree_ns)
        return answer

    def offered(self, *, last: bool) -> Plan | None:
        """A join or departure that waits for the members to switch. `last`: no further step will ask."""
        orders = self.membership.proposed(last=last)
        if orders is not None:
            self.orders[orders.plan.generation] = orders
        return offered(self.worker.state, orders.plan if orders else None)

    def _prefetch(self, it: w.Prefetch) -> None:
        layout, state = self.current()
        self.prefetch.begin(self.orders[it.plan.generation], layout, self.rank, state.step)

    def _agreed_on(
        self, step: int, own: Own, settled: Settled, proposal: Plan | None, registered: dict[str, Any]
    ) -> w.Event:
        share = settled.share
        neighbors = self.settings.on_loss == "neighbors"
        terms = Terms(
            step=step,
            generation=self.current()[0].generation,
            **self.reduction.agreed(share, settled.settings.get("clip", {}).get("norm"), self.data.order.size(step)),
            **settled.settings,
            idle=settled.idle,
            registered=registered,
            layers=self.agreeing.layer_norms(own, settled.settings) if neighbors else {},
            digest=f"{share.digest:016x}",
            end=share.end[1] if share.end else "",
            **self.protection.agreed(step, share, speaks=self.rank == min(self.comm.members)),
            **self.checkpoints.agreed(step, share.saving, settled.ancestors),
        )
        wanted = proposal is not None and share.join == proposal.generation
        text = terms.to_text()
        if len(text) > REGISTERED_BYTES:  # each state was checked when it was registered, and may have grown
            check_size(terms.registered)
        return w.Agreed(text, proposal, wanted, share.waits)

    def check_values(self, *, thorough: bool) -> None:
        """Raise UsageError if the script has changed a parameter and not restored it.

        A single changed bit is damage: in that case this step compares replicas, whether or not that is due.
        """
        found = self.watch.changed(thorough=thorough)
        for changed in found:
            if changed.how is Change.SILENT and len(found) == 1 and self.damage.explains(changed):
                continue
            name = self.stack.spec.parameters[changed.held.index].name
            raise UsageError(describe(name, self.version, within=thorough, replaced=changed.how is Change.REPLACED))

    def patient(self) -> None:
        """Call this while waiting for others: reports progress. Raises Aborted when the generation ends."""
        self.progress.tick()
        self.comm.ready(())  # raises Aborted

    def _registered(self, step: int) -> dict[str, Any]:
        """The registered objects' states at the end of `step`; what no rank will ask for again is forgotten."""
        saved = self.checkpoints.newest
        oldest = min(self.large.oldest(), saved if saved >= 0 else step) - 1
        for records in (self.adjustments, self.calls, self.registered, self.turns):
            records.forget(oldest)
        return self.registered.record(step, again=self.user_loop.knows(step))

    def claim(self, name: str, item: Any) -> None:
        """Register an object; if other ranks had one of that name when this rank joined, it receives its state."""
        self.birth.setdefault("registered", {})[name] = self.registered.state_of(name, item)
        self.registered.claim(name, item)

    def drive(self, name: str, item: Any) -> None:
        """Register an object that the runtime itself steps, with the version."""
        self.registered.driven.add(name)
        self.claim(name, item)

    def turn_over(self) -> None:
        """In the user's own loop, the turn that ended the last step is over; functions for that step follow.

        What the turn changed behind optimizer.step() is not in the agreement of the step: the coordinator
        receives it, in case all ranks are lost at once.
        """
        registered, terms = self.registered, Terms.of(self.agreement)
        began = self.turns.begin()
        agreed = registered.of_users(terms.registered)
        if (began != agreed or self.adjustments.changed()) and self.rank == min(self.comm.members):
            others = {name: state for name, state in terms.registered.items() if name not in agreed}
            left = replace(terms, registered=others, after=self.turns.present(), shown=False)
            self.large.tell(left.after, self.version)
            self._tell_committed(left.to_text(), self.current()[0].generation, settled=True)

    def _counts(self, shard: int) -> bool:
        """Whether a shard's gradient is a true one: the change of a buffer is summed like one, and is none."""
        return not self.stack.is_buffer(self.stack.spec.shards[shard].parameter)

    def update(self, agreement: str) -> None:
        """Run the optimizer on the owned shards, as agreed."""
        terms = Terms.of(agreement)
        self.progress.mark(StepPhase.UPDATE, terms.step)
        began_ns = time.monotonic_ns()
        self.pipeline.forget_statistics()  # from here on those of the next version are written
        self.store.update(self.gradients, terms)
        self.backups.update(terms)
        self.telemetry.span(Spent.UPDATE, began_ns)

    def _publish(self, it: w.Publish) -> w.Event:
        began_ns = time.monotonic_ns()
        self.exchange.publish(it.version, it.layout)
        self.telemetry.span(Spent.PUBLISH, began_ns)
        return w.Published()

    def _commit(self, it: w.CommitStep) -> None:
        """Version step + 1 is held here: start protecting it."""
        layout, terms = it.layout, Terms.of(it.agreement)
        step = terms.step
        self.progress.mark(StepPhase.COMMIT, step, finished=0)
        began_ns = time.monotonic_ns()
        if it.free:
            self.stack.hold(layout.stage_of(self.rank).start, layout.stage_of(self.rank).stop)
        self.adjustments.adopt(step, terms.settings)
        for advance in self.on_commit:
            advance(step)
        self.reduction.loss_scale.advance(terms, self.data.order)
        self.stream_states.commit(terms.registered)
        self.adjustments.settle()
        self.prefetch.committed(terms)
        # Copies begin before the user's code runs again, which may put other weights into the model.
        self._save_or_protect(terms, layout)
        if not self.user_loop.knows(step):  # a step that is computed again was shown before
            self.user_loop.committed(Step(step, terms.loss, terms.norm))
            self.stop_request.committed(terms, first=self.rank == min(layout.ranks))
        self._tell_committed(it.agreement, layout.generation)
        self.telemetry.span(Spent.COMMIT, began_ns)
        self.telemetry.committed(terms.loss, self.data.order.size(step).samples)
        self._remarks.loss(terms.loss, step, speaks=self.rank == min(layout.ranks) and not terms.skip)

    def _save_or_protect(self, terms: Terms, layout: Layout) -> None:
        """Protect this version, and save a checkpoint of it if that was agreed."""
        if self.checkpoints.link is None:
            self.checkpoints.begin_alone(terms, layout, self._state_of)
            self.protect(anyway=self.ended())
        else:
            self.protect(anyway=self.ended(), then=self.checkpoints.begin(terms, layout, self.rank))

    def _tell_committed(self, agreement: str, generation: int, *, settled: bool = False) -> None:
        terms = Terms.of(agreement)
        told = {name: getattr(terms, name) for name in ("step", "loss", "digest", "protected", "every")}
        told |= {"agreement": agreement, "generation": generation, "settled": settled}
        self.membership.tell(e.WorkerCommitted(self.membership.worker, **told))

    def _tell_idled(self, generation: int) -> None:
        self.membership.tell(e.WorkerIdled(self.membership.worker, generation))

    def _begin_step(self, it: w.BeginStep) -> None:
        self.watch.remember()
        self.state = self._fresh_step(it.version, it.work)
        self.pipeline.begin_step()

    def follow(self, orders: Orders) -> None:
        """Enter the generation of a plan: other plans are out of date."""
        self.orders = {orders.plan.generation: orders}
        self.telemetry.enter(orders.plan.generation)
        self.telemetry.interrupted()

    def note_birth(self) -> None:
        """The job begins with the present hyper-parameters, and with states that no step has changed."""
        self.birth |= {**self.adjustments.terms(), "registered": self.registered.states()}

    def drop_gradients(self) -> None:
        """The reduced gradients are of a step that is computed again."""
        self.gradients = {}

    def start_over(self) -> None:
        """Drop all results of the current step."""
        layout, state = self.current()
        self.state = self._fresh_step(state.step, layout.work)

    def _fresh_step(self, step: int, work: Work) -> StepState:
        return StepState.begin(step, self.rank, work, self.data.order.size(step))

    def protect(self, *, anyway: bool = False, then: Callable[[], None] | None = None) -> None:
        """Have the keeper hold this version of every owned shard; the copy overlaps the computation of the next step.

        The interval decides whether the version is also protected from lost nodes; the first version of a generation
        always is. `then` is called when the keeper holds it.
        """
        self.snapshots.protect(
            (s.index, self.record_bytes[s.index], self.gradient_bytes(s))
            for s in (*self.store.owned, *self.backups.shards)
            if not self.snapshots.has(s.index)
        )
        protect = self.protection.begins(self.version, anyway=anyway)
        spread_s = PACE * self.protection.step_s
        shards = sorted(self.owned | self.backups.in_sync)
        self.snapshots.begin(self.version, self._state_of, shards, protect=protect, spread_s=spread_s, then=then)

    def _state_of(self, shard: int) -> ShardState:
        return (self.store if shard in self.owned else self.backups.store).state(shard)

    def gradient_bytes(self, shard: Shard) -> int:
        """The size of a shard's reduced gradient, in bytes."""
        return shard.elements * self.exchange.accumulation(shard).itemsize

    def settle(self) -> None:
        """The user's code has run for the last step: its state belongs to this version."""
        if self.leave_at is None:  # after the loop the script may change the model
            self.check_values(thorough=False)
            self.pipeline.forwards.check_constants(self.version, self.registered.objects.values())
        if self.checkpoints.unsettled:
            self.checkpoints.settle(*self.large.after())
            if self._stopping is not None and not self.ended():
                self._end_saved(self._stopping)
        elif self._stopping is not None:
            # The save that was in progress when the request came is of an older version.
            self.membership.ask_save()

    def stop(self, number: signal.Signals) -> None:
        """A signal to a script without the launcher: save after this step, and end. Safe in a signal handler."""
        self._stopping = number
        self.membership.ask_save()

    def _end_saved(self, number: signal.Signals) -> NoReturn:
        self.checkpoints.conclude(self.patient)
        saved = self.checkpoints.newest == self.version
        state = f"its state after {self.version} steps is saved" if saved else "no checkpoint could be saved"
        print(f"everstep: stopped by {number.name}; {state}", file=sys.stderr, flush=True)
        sys.exit(128 + number)

    def leave_loop(self) -> None:
        """The user's code has left the loop, perhaps before the last step: this rank trains no further."""
        if self.leave_at is not None:
            return
        self.after_leaving = self.turns.present()
        self.large.leave()
        if self.checkpoints.link is None:
            self.checkpoints.keep(self.version, self._state_of)
        self.worker.happened(w.LoopLeft())

    def _tell_left(self, it: w.ReportLeft) -> None:
        self.membership.tell(e.WorkerLeft(self.membership.worker, it.version, self.last_name()))
        proposal = self.offered(last=True)
        if proposal is not None:
            self._tell_idled(proposal.generation)

    def last_name(self) -> str:
        """A name for a checkpoint of this version."""
        return folder_name(self.version, time.time(), self.checkpoints.unique())

    def conclude(self) -> None:
        """Past the last step: return when its version is whole here, parity included."""
        self.worker.happened(w.EndDue())

    def pause(self) -> None:
        """Between two epochs: return when the version is whole here. No loop could compute steps again after a loss."""
        self.worker.happened(w.PauseDue())

    def _conclude(self, it: w.WaitUntilWhole) -> w.Event:
        if it.last:
            self.settle()
        if it.protect:
            self.protect(anyway=True)
        with self.progress.waiting(SNAPSHOT):
            self.snapshots.wait(self.patient)
        with self.progress.waiting(PARITY):
            self.protection.wait(self.version + 1, self.patient)
        if it.last:
            with self.progress.waiting(SAVES):
                self.checkpoints.conclude(self.patient)
        return w.Concluded()

    def save_last(self, version: int, name: str, on_wait: Callable[[], None]) -> str:
        """Save this rank's part of the last version, which is not whole yet. Returns why it could not, or ""."""
        if version != self.version:
            return f"rank {self.rank} is at version {self.version}"
        layout, _ = self.current()
        self.settle()
        self.snapshots.wait(on_wait)
        terms = replace(Terms.of(self.agreement), save=name)
        return self.checkpoints.save_last(terms, layout, self.rank, self.large.after(), self._state_of, on_wait)
