"""A simulated worker: the engine's step and the recovery, statement for statement, with hashes for tensors.

It follows `elastic.engine`, `elastic.recovery` and the loop of `elastic.run`; what it may assume of its surroundings is
what they may assume. `mark` is called where the real worker marks its progress, which is where faults strike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

from ...resharding.layout import Layout
from ...resharding.plan import Plan, Report
from ...resharding.units import Shard
from ..protocol import events as e
from .control import Control, JobEnded
from .links import Aborted, Key, Links
from .pipeline import Pipeline, StepState
from .snapshots import Keeper, Snapshots
from .values import ShardState, agreement_of, initial, summed, updated
from .world import Steps, World


class Facts(Protocol):
    """Who is told what happens, to check it. See `cluster.Ledger`."""

    def agreed(self, step: int, agreement: str) -> None: ...
    def entered(self, worker: e.WorkerId, plan: Plan, version: int) -> None: ...
    def owned(self, worker: e.WorkerId, generation: int, version: int, states: dict[int, ShardState]) -> None: ...


@dataclass(frozen=True)
class Surroundings:
    """What a worker is given."""

    world: World
    job: e.Job
    keepers: dict[str, Keeper]
    node: str
    send: Callable[[int, e.WorkerId, int, Key, Any], None]  # from rank, to, generation, key, payload
    tell: Callable[[e.Event], None]
    mark: Callable[[e.WorkerId, str, int], None]  # worker, phase, step
    facts: Facts
    startup_s: float
    forward_s: float
    epilogue_s: float


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
        self.snapshots = Snapshots(around.world, worker, around.keepers[around.node], poke)
        self.pipeline = Pipeline(self.links, self.spec.layers, self._layer_values, around.forward_s)
        self.pipeline.mark = lambda phase: self.mark(phase)
        self.fresh = True
        self.values = {s.index: initial(s.index).value for s in self.spec.shards}
        self.optimizer: dict[int, str] = {}
        self.mine: set[int] = set()  # shards the optimizer runs on; `owned` are those of them in good order
        self.owned: set[int] = set()
        self.owned_version = 0
        self.values_version = 0
        self.version = 0
        self.agreed, self.agreement = -1, ""
        self.held = range(self.spec.layers)
        self.layout: Layout | None = None
        self.state: StepState | None = None
        self.switch: e.CarryOut | None = None
        self.gradients: dict[int, str] = {}
        self.finished = False

    def mark(self, phase: str) -> None:
        self.around.mark(self.id, phase, self.version)

    def _layer_values(self, layer: int) -> list[str]:
        return [self.values[shard.index] for shard in self.spec.shards_of_layer[layer]]

    def _shard_state(self, shard: int) -> ShardState:
        return ShardState(self.values[shard], self.optimizer.get(shard, ""))

    # ------------------------------------------------------------ life

    def life(self) -> Steps[None]:
        """From the fork to the end of the job."""
        try:
            yield self.around.startup_s
            self.around.tell(e.WorkerDeclaredElastic(self.id))
            yield self.around.startup_s / 2
            self.around.tell(e.WorkerReady(self.id, {"incarnation": self.id.incarnation}, self.job))
            yield from self._enter()
            while self.switch is not None or self.version < self.job.steps:
                try:
                    if self.switch is not None:
                        orders, self.switch = self.switch, None
                        yield from self.carry_out(orders)
                    else:
                        yield from self._one_step()
                        yield self.around.world.between(0.0, self.around.forward_s)  # the user's code between steps
                except Aborted:
                    yield from self._recover()
            self.mark("end")
            yield self.around.epilogue_s
            self.finished = True
            self.around.tell(e.WorkerFinished(self.id))
            while not (yield from self.control.wait_for_end()):
                yield from self._recover()
        except JobEnded:
            return

    def _enter(self) -> Steps[None]:
        try:
            orders = yield from self.control.orders()
            yield from self.carry_out(orders)
        except Aborted:
            yield from self._recover()

    def _recover(self) -> Steps[None]:
        self.mark("recover")
        self.switch = None
        while True:
            self.control.report(self._make_report)
            try:
                orders = yield from self.control.orders()
                yield from self.carry_out(orders)
            except Aborted:
                continue
            return

    def _make_report(self) -> Report:
        if self.fresh or self.layout is None or self.state is None:
            return Report(rank=self.rank, generation=0, fresh=True)
        state = self.state
        valid = self.values_version == state.step
        return Report(
            rank=self.rank,
            generation=self.layout.generation,
            owned_version=self.owned_version,
            owned=tuple(sorted(self.owned)),
            values_version=self.values_version,
            layers=(self.held.start, self.held.stop),
            agreed=self.agreed,
            agreement=self.agreement,
            held=tuple(sorted(state.held)) if valid else (),
            started=tuple(sorted(state.started)) if valid else (),
            todo=tuple(state.todo) if valid else (),
        )

    # ------------------------------------------------------------ one step

    def _one_step(self) -> Steps[None]:
        assert self.layout is not None
        assert self.state is not None
        layout, state = self.layout, self.state
        depth = 1 + sum(stage.start >= layout.stage_of(self.rank).start for stage in layout.stages)
        yield from self.pipeline.run(state, depth)
        yield from self._reduce(layout, state)
        yield from self._agree(state)
        self.snapshots.forget()
        self._update(self.agreement, self.gradients)
        self.values_version = -1
        yield from self._publish(state.step + 1, layout, layout.ranks)
        self._commit(self.agreement)

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
        last = state.step + 1 == self.job.steps
        proposal = self.control.proposed(last)
        mine = {"norms": self.gradients, "join": proposal.plan.generation if proposal else 0}
        table = yield from self.links.all_gather((state.step,), mine)
        gradients = {shard: gradient for share in table.values() for shard, gradient in share["norms"].items()}
        if proposal is not None and all(share["join"] == proposal.plan.generation for share in table.values()):
            self.switch = proposal
        elif proposal is not None and last:
            self.around.tell(e.WorkerIdled(self.id, proposal.plan.generation))
        self.agreement, self.agreed = agreement_of(state.step, gradients), state.step
        self.around.facts.agreed(state.step, self.agreement)

    def _update(self, agreement: str, gradients: dict[int, str]) -> None:
        self.mark("update")
        for shard in sorted(self.mine):
            if shard in gradients:
                self._load(shard, updated(self._shard_state(shard), gradients[shard]))
        self.owned_version = step_of(agreement) + 1

    def _load(self, shard: int, state: ShardState) -> None:
        self.values[shard], self.optimizer[shard] = state

    def _publish(self, version: int, layout: Layout, readers: Collection[int]) -> Steps[None]:
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

    def _commit(self, agreement: str) -> None:
        assert self.layout is not None
        step = step_of(agreement)
        self.values_version = self.version = step + 1
        self.mark("commit")
        if step == 0:
            stage = self.layout.stage_of(self.rank)
            self._hold(stage.start, stage.stop, free=True)
        self._protect()
        self.around.tell(e.WorkerCommitted(self.id, step, agreement))
        self.state = StepState.begin(self.version, self.rank, self.layout.segments())

    def _hold(self, start: int, stop: int, *, free: bool) -> None:
        """Hold these layers; what is freed is gone, and what is new has no values yet."""
        self.held = range(start, stop)
        if free:
            kept = {s.index for layer in self.held for s in self.spec.shards_of_layer[layer]}
            self.values = {shard: value if shard in kept else "freed" for shard, value in self.values.items()}

    def _protect(self) -> None:
        self.snapshots.protect(sorted(self.mine))
        self.snapshots.begin(self.version, self._shard_state, sorted(self.owned))

    # ------------------------------------------------------------ carrying out a plan

    def carry_out(self, orders: e.CarryOut) -> Steps[None]:
        """Enter the plan's generation with everything it asks for in place."""
        plan = orders.plan
        peers = {rank: e.WorkerId(rank, peer["incarnation"]) for rank, peer in orders.peers.items()}
        yield self.around.world.between(0.0, 0.003)
        self.links.edit(plan.generation, peers)
        if self.control.superseded(plan.generation):
            raise Aborted
        yield 0.001
        yield from self.snapshots.wait()
        fresh = self.fresh
        version, agreement = yield from self._find_place(plan)
        self.mark("join" if fresh else "restore")
        if not fresh and self.owned_version == version - 1:
            self._update(agreement, self.gradients)
        was_current = not fresh and self.values_version == version
        self._take_places(plan, version)
        yield from self._restore(version, orders.keepers)
        if self.rank in plan.refresh:
            self.values_version = -1
        yield from self._publish(version, plan.layout, plan.refresh)
        self._settle(plan, version, agreement, was_current)
        self.fresh = False
        if plan.generation > 1:
            if plan.version is None and not fresh:
                self.around.tell(e.WorkerSwitched(self.id, plan.generation))
            else:
                self.around.tell(e.WorkerResumed(self.id, plan.generation, 0.0, 0.0))

    def _find_place(self, plan: Plan) -> Steps[tuple[int, str]]:
        if self.fresh and plan.guide is not None:
            message: tuple[int, str] = yield from self.links.receive(plan.guide, ("guide",))
            return message
        version = self.version if plan.version is None else plan.version
        agreement = plan.agreement or self.agreement
        if self.rank == plan.guide:
            for rank in plan.fresh:
                self.links.send(rank, ("guide",), (version, agreement))
        return version, agreement

    def _take_places(self, plan: Plan, version: int) -> None:
        stage = plan.layout.stage_of(self.rank)
        if (self.held.start, self.held.stop) != (stage.start, stage.stop):
            self.values_version = self.values_version if version == 0 else -1
            self._hold(stage.start, stage.stop, free=version > 0)
        shards = {s.index for s in self.spec.shards if plan.layout.owners[s.index] == self.rank}
        gained = {gain.shard for gain in plan.gains if gain.rank == self.rank}
        kept = shards - gained if not self.fresh else set()
        self.snapshots.leave(self.mine - shards)
        for shard in self.mine - shards:
            self.optimizer.pop(shard, None)
        self.mine = shards
        self.owned = kept if version > 0 else set(shards)
        self.owned_version = version

    def _restore(self, version: int, keepers: Collection[str]) -> Steps[None]:
        missing = self.mine - self.owned
        if not missing:
            return
        for address in keepers:
            yield self.around.world.between(0.001, 0.02)
            keeper = self.around.keepers[address]
            for shard, state in keeper.fetch(sorted(self.mine - self.owned), version).items():
                self._load(shard, state)
                self.owned.add(shard)
        if self.mine - self.owned:
            raise AssertionError(f"{self.id}: no keeper has version {version} of shards {self.mine - self.owned}")

    def _settle(self, plan: Plan, version: int, agreement: str, was_current: bool) -> None:
        fresh = self.fresh
        self.layout = plan.layout
        self.values_version = version
        self.around.facts.entered(self.id, plan, version)
        self.around.facts.owned(self.id, plan.generation, version, {s: self._shard_state(s) for s in self.owned})
        if fresh:
            self.version = version
            self.agreed, self.agreement = version - 1, agreement
        if was_current and self.state is not None and plan.version is not None:
            self._protect()
            self.state.resume(plan.work, plan.kept, plan.started)
            self.pipeline.resend(self.state, plan.started)
            return
        if not fresh and self.version == version - 1:
            self.agreed, self.agreement = version - 1, agreement
            self._commit(agreement)
        else:
            self._protect()
        self.state = StepState.begin(version, self.rank, plan.work)
        self.state.kept = plan.kept


def step_of(agreement: str) -> int:
    """The step that was agreed on."""
    return int(agreement.split('"step": ')[1].split(",")[0].rstrip("}"))


def _merge(parts: dict[int, dict[int, str]], layer: int, leaves: dict[int, str]) -> None:
    known = parts.setdefault(layer, {})
    twice = known.keys() & leaves.keys()
    if twice:
        raise AssertionError(f"micro-batches {sorted(twice)} enter the sum of layer {layer} twice")
    known.update(leaves)
