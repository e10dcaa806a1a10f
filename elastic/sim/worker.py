"""A simulated worker: the engine's step and the recovery, statement for statement, with hashes for tensors.

It follows `elastic.engine` and the loop of `elastic.run`, and `recovery` follows `elastic.recovery`; what they may
assume of their surroundings is what those may assume. `mark` is called where the real worker marks its progress, which
is where faults strike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

from everstep.elastic.protocol import events as e
from everstep.resharding.layout import Layout
from everstep.resharding.plan import Plan
from everstep.resharding.units import Shard

from .control import Control, JobEnded
from .keeper import Board
from .links import Aborted, Key, Links
from .pipeline import Pipeline, StepState
from .protection import Protection
from .recovery import Recovery
from .snapshots import Snapshots
from .values import (
    ShardState,
    agreement_of,
    initial,
    summed,
    updated,
)
from .world import Steps, World


class Facts(Protocol):
    """Who is told what happens, to check it. See `cluster.Ledger`."""

    def agreed(self, worker: e.WorkerId, step: int, agreement: str) -> None: ...
    def entered(self, worker: e.WorkerId, plan: Plan, version: int) -> None: ...
    def owned(self, worker: e.WorkerId, generation: int, version: int, states: dict[int, ShardState]) -> None: ...


@dataclass(frozen=True)
class Surroundings:
    """What a worker is given."""

    world: World
    job: e.Job
    board: Board
    node: str
    state_slots: int
    interval: int
    send: Callable[[int, e.WorkerId, int, Key, Any], None]  # from rank, to, generation, key, payload
    tell: Callable[[e.Event], None]
    mark: Callable[[e.WorkerId, str, int], None]  # worker, phase, step
    facts: Facts
    startup_s: float
    forward_s: float
    epilogue_s: float
    leaves_at: int  # the version at which the user's code leaves the loop; the job's steps: not before its end


class SimWorker:
    """One incarnation of one rank."""

    def __init__(self, worker: e.WorkerId, around: Surroundings, poke: Callable[[], None]) -> None:
        self.id = worker
        self.rank = worker.rank
        self.around = around
        self.job = around.job
        self.spec = around.job.model
        self.links = Links(worker.rank, lambda to, g, key, data: around.send(worker.rank, to, g, key, data))
        self.control = Control(worker, around.tell, self.links.abort)
        self.snapshots = Snapshots(around.world, worker, around.board.keepers[around.node], around.state_slots, poke)
        self.protection = Protection(around.world, self.snapshots, around.interval)
        self.pipeline = Pipeline(self.links, self.spec.layers, self._layer_values, around.forward_s)
        self.pipeline.mark = lambda phase: self.mark(phase)
        self.recovery = Recovery(self)
        self.values = {s.index: initial(s.index).value for s in self.spec.shards}
        self.optimizer: dict[int, str] = {}
        self.mine: set[int] = set()  # shards the optimizer runs on; `owned` are those of them in good order
        self.owned: set[int] = set()
        self.owned_version = 0
        self.pristine = True  # every value is still as it was made from the seed
        self.values_version = 0
        self.version = 0
        self.agreed, self.agreement = -1, ""
        self.held = range(self.spec.layers)
        self.layout: Layout | None = None
        self.state: StepState | None = None
        self.switch: e.CarryOut | None = None
        self.gradients: dict[int, str] = {}
        self.leave_at: int | None = None
        self.finished = False

    def ended(self) -> bool:
        """Whether every step is committed that there is to be."""
        return self.version >= (self.job.steps if self.leave_at is None else self.leave_at)

    def mark(self, phase: str) -> None:
        self.around.mark(self.id, phase, self.version)

    def _layer_values(self, layer: int) -> list[str]:
        return [self.values[shard.index] for shard in self.spec.shards_of_layer[layer]]

    def shard_state(self, shard: int) -> ShardState:
        return ShardState(self.values[shard], self.optimizer.get(shard, ""))

    # ------------------------------------------------------------ life

    def life(self) -> Steps[None]:
        """From the fork to the end of the job."""
        try:
            yield self.around.startup_s
            self.around.tell(e.WorkerDeclaredElastic(self.id))
            yield self.around.startup_s / 2
            self.around.tell(e.WorkerReady(self.id, {"incarnation": self.id.incarnation}, self.job))
            yield from self.recovery.enter()
            while not (yield from self._trained()):
                pass
            self.mark("end")
            yield self.around.epilogue_s
            self.finished = True
            self.around.tell(e.WorkerFinished(self.id, self.version, f"v{self.version}"))
            while not (yield from self.control.wait_for_end()):
                yield from self._due()
                while not self.ended():
                    yield from self._guarded(self._one_step())
            yield self.around.epilogue_s / 2
        except JobEnded:
            return

    def _trained(self) -> Steps[bool]:
        """Do the next thing in the training loop; True if nothing is left to be done."""
        if self.switch is not None:
            orders, self.switch = self.switch, None
            leaves = self.rank in orders.plan.leaving
            yield from self._guarded(self._leave(orders) if leaves else self.recovery.carry_out(orders))
        elif self.leave_at is None and self.around.leaves_at <= self.version < self.job.steps:
            self._leave_loop()
        elif not self.ended():
            yield from self._guarded(self._one_step())
            yield self.around.world.between(0.0, self.around.forward_s)  # the user's code between steps
        else:
            yield from self._guarded(self._conclude())
            return self.ended() and self.switch is None
        return False

    def _leave_loop(self) -> None:
        """The user's code has left the loop before the last step."""
        self.leave_at = self.version
        self.around.tell(e.WorkerLeft(self.id, self.version, f"v{self.version}"))
        proposal = self.control.proposed(last=True)
        if proposal is not None and self.layout is not None and proposal.plan.generation > self.layout.generation:
            self.around.tell(e.WorkerIdled(self.id, proposal.plan.generation))

    def _due(self) -> Steps[None]:
        """After Aborted: the last checkpoint, or a recovery."""
        conclusion, self.control.conclusion = self.control.conclusion, None
        if conclusion is None:
            yield from self.recovery.recover()
            return
        if self.version != conclusion.version:
            raise AssertionError(f"{self.id} is at {self.version}, and is to save {conclusion.version}")
        yield from self.snapshots.wait()
        if self.layout is not None and self.rank == self.layout.ranks[0]:
            saved = e.Saved(self.version, conclusion.name, self.agreement)
            self.around.tell(e.CheckpointSaved(self.id, saved, {}))
        self.around.tell(e.WorkerConcluded(self.id, conclusion.name))

    def _guarded(self, action: Steps[None]) -> Steps[None]:
        """Do something that waits for others; if the generation ends, recover instead."""
        try:
            yield from action
        except Aborted:
            if self.control.conclusion is None:
                yield from self.recovery.recover()
                return
            yield from self._due()
            if (yield from self.control.wait_for_end()):
                raise AssertionError(f"{self.id} went on, and is told that training is over") from None
            yield from self._due()

    def _leave(self, orders: e.CarryOut) -> Steps[None]:
        """The others go on without this rank: be there for a recovery that still counts it in, until it is let go."""
        self.mark("leave")
        yield from self.snapshots.wait()
        self.around.tell(e.WorkerSwitched(self.id, orders.plan.generation))
        if (yield from self.control.wait_for_end()):
            raise JobEnded
        raise Aborted

    def _conclude(self) -> Steps[None]:
        """Past the last step: return when its version is whole here, parity included."""
        if self.version < self.job.steps:
            self.protect(anyway=True)
        yield from self.snapshots.wait()
        yield from self.protection.wait(self.version + 1, self.links.check)

    # ------------------------------------------------------------ one step

    def _one_step(self) -> Steps[None]:
        assert self.layout is not None
        assert self.state is not None
        layout, state = self.layout, self.state
        self.control.begun(state.step)
        depth = 1 + sum(stage.start >= layout.stage_of(self.rank).start for stage in layout.stages)
        yield from self.pipeline.run(state, depth)
        yield from self._reduce(layout, state)
        yield from self._agree(state)
        self.snapshots.forget(nodes=self.protection.nodes)
        self.update(self.agreement, self.gradients)
        self.values_version = -1
        yield from self.publish(state.step + 1, layout, layout.ranks)
        self.commit(self.agreement)

    def _owned_in(self, layout: Layout, layer: int, owner: int) -> list[Shard]:
        return [s for s in self.spec.shards_of_layer[layer] if layout.owners[s.index] == owner]

    def _shared(self, contributors: dict[int, set[int]], layout: Layout, source: int, owner: int) -> list[int]:
        return [n for n in sorted(contributors) if source in contributors[n] and self._owned_in(layout, n, owner)]

    def _reduce(self, layout: Layout, state: StepState) -> Steps[None]:
        self.mark("reduce")
        for shard in sorted(self.mine):
            self.snapshots.open_gradient(shard, state.step)
        contributors = state.contributors()
        others = [rank for rank in layout.ranks if rank != self.rank]
        key: Key = ("partial", state.step)
        for owner in others:
            layers = self._shared(contributors, layout, self.rank, owner)
            if layers:
                self.links.send(owner, key, {layer: dict(state.sums[layer]) for layer in layers})
        parts: dict[int, dict[int, str]] = {}
        for layer in self._shared(contributors, layout, self.rank, self.rank):
            _merge(parts, layer, state.sums[layer])
        waiting = {(source, key) for source in others if self._shared(contributors, layout, source, self.rank)}
        while waiting:
            source, name, data = yield from self.links.receive_any(waiting)
            waiting.discard((source, name))
            for layer in self._shared(contributors, layout, source, self.rank):
                _merge(parts, layer, data[layer])
        yield 0.0005
        self.gradients = {shard: self._combine(self.spec.shards[shard], parts) for shard in sorted(self.mine)}
        for shard, gradient in self.gradients.items():
            self.snapshots.seal_gradient(shard, state.step, gradient)

    def _combine(self, shard: Shard, parts: dict[int, dict[int, str]]) -> str:
        layers = self.spec.parameters[shard.parameter].layers
        for layer in layers:
            if sorted(parts[layer]) != list(range(self.job.micro_batches)):
                raise AssertionError(f"the sum of layer {layer} has the leaves {sorted(parts[layer])}")
        return summed(shard, [[parts[layer][m] for m in sorted(parts[layer])] for layer in layers])

    def _agree(self, state: StepState) -> Steps[None]:
        self.mark("agree")
        yield from self.snapshots.wait()
        yield from self.protection.wait(state.step, self.links.check)
        last = state.step + 1 == self.job.steps
        proposal = self.control.proposed(last)
        if proposal is not None and self.layout is not None and proposal.plan.generation <= self.layout.generation:
            proposal = None  # entered already
        mine = {
            "norms": self.gradients,
            "join": proposal.plan.generation if proposal else 0,
            "protection": self.protection.share(state.step),
        }
        table = yield from self.links.all_gather((state.step,), mine)
        gradients = {shard: gradient for share in table.values() for shard, gradient in share["norms"].items()}
        wanted = proposal is not None and all(s["join"] == proposal.plan.generation for s in table.values())
        if proposal is not None and wanted and not (last and proposal.plan.leaving):  # the end lets go of who leaves
            self.switch = proposal
        elif proposal is not None and last:
            self.around.tell(e.WorkerIdled(self.id, proposal.plan.generation))
        terms = self.protection.agreed([table[rank]["protection"] for rank in sorted(table)])
        self.agreement, self.agreed = agreement_of(state.step, gradients, **terms), state.step
        self.protection.adopt(self.agreement)
        self.around.facts.agreed(self.id, state.step, self.agreement)

    def update(self, agreement: str, gradients: dict[int, str]) -> None:
        self.mark("update")
        for shard in sorted(self.mine):
            if shard in gradients:
                self.load(shard, updated(self.shard_state(shard), gradients[shard]))
        self.owned_version = step_of(agreement) + 1
        self.pristine = False

    def load(self, shard: int, state: ShardState) -> None:
        self.values[shard], self.optimizer[shard] = state

    def publish(self, version: int, layout: Layout, readers: Collection[int]) -> Steps[None]:
        key: Key = ("values", version)
        others = [rank for rank in layout.ranks if rank != self.rank]
        for reader in others:
            shards = self._read_from(layout, self.rank, reader) if reader in readers else []
            if shards:
                self.links.send(reader, key, {shard: self.values[shard] for shard in shards})
        if self.rank not in readers:
            return
        waiting = {(owner, key) for owner in others if self._read_from(layout, owner, self.rank)}
        while waiting:
            owner, name, data = yield from self.links.receive_any(waiting)
            waiting.discard((owner, name))
            self.values.update(data)

    def _read_from(self, layout: Layout, owner: int, reader: int) -> list[int]:
        stage = layout.stage_of(reader)
        return [
            s.index
            for s in self.spec.shards
            if layout.owners[s.index] == owner and any(n in stage for n in self.spec.parameters[s.parameter].layers)
        ]

    def commit(self, agreement: str) -> None:
        """Version step + 1 is held here: start protecting it, and go on to the next step."""
        assert self.layout is not None
        step = step_of(agreement)
        self.values_version = self.version = step + 1
        self.mark("commit")
        if step == 0:
            stage = self.layout.stage_of(self.rank)
            self.hold(stage.start, stage.stop, free=True)
        self.protect(anyway=self.ended())
        self.tell_committed(agreement)
        self.state = StepState.begin(self.version, self.rank, self.layout.segments())

    def tell_committed(self, agreement: str) -> None:
        """Tell the coordinator that a step is committed."""
        terms = json.loads(agreement)
        generation = self.layout.generation if self.layout is not None else 0
        told = e.WorkerCommitted(
            self.id,
            terms["step"],
            agreement,
            digest=terms["digest"],
            generation=generation,
            protected=terms["protected"],
        )
        self.around.tell(told)

    def hold(self, start: int, stop: int, *, free: bool) -> None:
        """Hold these layers; what is freed is gone, and what is new has no values yet."""
        self.held = range(start, stop)
        if free:
            kept = {s.index for layer in self.held for s in self.spec.shards_of_layer[layer]}
            self.values = {shard: value if shard in kept else "freed" for shard, value in self.values.items()}

    def protect(self, *, anyway: bool = False) -> None:
        """Have the keeper hold this version of every owned shard; copied while the next step computes."""
        self.snapshots.protect(sorted(self.mine))
        protect = self.protection.begins(self.version, anyway=anyway)
        self.snapshots.begin(self.version, self.shard_state, sorted(self.owned), protect=protect)


def step_of(agreement: str) -> int:
    """The step that was agreed on."""
    return int(json.loads(agreement)["step"])


def _merge(parts: dict[int, dict[int, str]], layer: int, leaves: dict[int, str]) -> None:
    known = parts.setdefault(layer, {})
    twice = known.keys() & leaves.keys()
    if twice:
        raise AssertionError(f"micro-batches {sorted(twice)} enter the sum of layer {layer} twice")
    known.update(leaves)
