"""A simulated cluster: the real coordinator, node agents, keepers and workers, and the links between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ...resharding.plan import Plan
from ..protocol import coordinator, invariants
from ..protocol import events as e
from ..protocol.state import Config, Phase, State
from .links import Key
from .snapshots import Keeper
from .transcript import brief
from .values import Reference, ShardState
from .worker import SimWorker, Surroundings
from .world import Pipe, Process, World

TICK_S = 0.1
HEARTBEAT_S = 0.5


class Ledger:
    """What happened, checked as it happens: the same agreements, plans and states as in the undisturbed run."""

    def __init__(self, job: e.Job, expected: Reference) -> None:
        self._job = job
        self._expected = expected
        self._plans: dict[int, str] = {}
        self._owners: dict[tuple[int, int], int] = {}  # generation, shard -> rank

    def agreed(self, step: int, agreement: str) -> None:
        """A worker passed the agreement of a step."""
        if agreement != self._expected.agreements[step]:
            raise AssertionError(f"step {step} was agreed with other bytes than in the undisturbed run")

    def entered(self, worker: e.WorkerId, plan: Plan, version: int) -> None:
        """A worker carried out a plan."""
        if self._plans.setdefault(plan.generation, plan.digest) != plan.digest:
            raise AssertionError(f"generation {plan.generation} has two plans")

    def owned(self, worker: e.WorkerId, generation: int, version: int, states: dict[int, ShardState]) -> None:
        """A worker owns shards in a generation, in these states."""
        for shard in states:
            if self._owners.setdefault((generation, shard), worker.rank) != worker.rank:
                raise AssertionError(f"shard {shard} has two owners in generation {generation}")

    def ended(self, workers: list[SimWorker]) -> None:
        """The job succeeded: every shard is there, with the bytes of the undisturbed run."""
        for worker in workers:
            if worker.version != self._job.steps or not worker.finished:
                raise AssertionError(f"{worker.id} ended at version {worker.version} of {self._job.steps}")
            for shard in worker.owned:
                state, expected = (
                    ShardState(worker.values[shard], worker.optimizer[shard]),
                    self._expected.states[shard],
                )
                if state != expected:
                    raise AssertionError(f"shard {shard} ends as {state} on {worker.id}, undisturbed as {expected}")
        generations = {worker.layout.generation for worker in workers if worker.layout is not None}
        owned = sorted(shard for worker in workers for shard in worker.owned)
        if len(generations) == 1 and owned != list(range(len(self._expected.states))):
            raise AssertionError(f"the shards owned at the end are {owned}")


@dataclass
class Running:
    """A worker process and its links."""

    worker: SimWorker
    process: Process
    uplink: Pipe
    downlink: Pipe
    node: str
    data: dict[e.WorkerId, Pipe] = field(default_factory=dict)
    dead: bool = False


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How slow things are; probabilities and seconds."""

    slow: float = 0.05  # of a long delay on a link
    duplicates: float = 0.05  # of a control message that comes twice
    startup_s: tuple[float, float] = (0.02, 0.3)
    forward_s: float = 0.002
    epilogue_s: float = 0.2


class Cluster:
    """Everything but the faults, which strike through `on_mark` and `kill`."""

    def __init__(self, world: World, config: Config, job: e.Job, timing: Timing, expected: Reference) -> None:
        self.world = world
        self.job = job
        self.timing = timing
        self.ledger = Ledger(job, expected)
        self.state: State = coordinator.initial_state(config, 0.0)
        self.events: list[tuple[float, e.Event]] = []
        self.log: list[str] = []
        self.running: dict[e.WorkerId, Running] = {}
        self.keepers: dict[str, Keeper] = {}
        self.outcome: e.EndJob | None = None
        self.on_mark: Callable[[e.WorkerId, str, int], None] = lambda worker, phase, step: None
        world.after(TICK_S, self._tick)

    def _tick(self) -> None:
        if self.outcome is None:
            self.happened(e.Ticked())
            self.world.after(TICK_S, self._tick)

    # ------------------------------------------------------------ nodes

    def join(self, node: str, slots: int) -> None:
        """A node's agent registers, unless the job is over."""
        if self.outcome is not None:
            return
        self.keepers[node] = Keeper()
        self.happened(e.NodeJoined(node, f"host-{node}", slots, node))
        self._beat(node)

    def _beat(self, node: str) -> None:
        if self.outcome is None:
            self.happened(e.HeartbeatReceived(node))
            self.world.after(HEARTBEAT_S, lambda: self._beat(node))

    # ------------------------------------------------------------ the coordinator

    def happened(self, event: e.Event) -> None:
        """An event reaches the coordinator."""
        before = self.state
        self.events.append((self.world.now, event))
        self.state, effects = coordinator.step(before, event, self.world.now)
        invariants.check_step(before, self.state, effects)
        if effects:
            self.log.append(f"{self.world.now:.4f} {brief(event)} -> {', '.join(map(brief, effects))}")
        for effect in effects:
            self._carry_out(effect)
        self._check_versions()

    def _check_versions(self) -> None:
        """Those who have carried out one plan are at one version, or at it and the next."""
        versions: dict[int, set[int]] = {}
        for running in self.running.values():
            if not running.dead and running.worker.layout is not None:
                versions.setdefault(running.worker.layout.generation, set()).add(running.worker.version)
        for generation, found in versions.items():
            if max(found) - min(found) > 1:
                raise AssertionError(f"versions {sorted(found)} live in generation {generation}")

    def _carry_out(self, effect: e.Effect) -> None:
        if isinstance(effect, e.StartWorkers):
            for worker in effect.workers:
                self._fork(worker, effect.node)
        elif isinstance(effect, e.AbortGeneration | e.CarryOut):
            running = self.running.get(effect.worker)
            if running is not None:
                running.downlink.send(effect)
        elif isinstance(effect, e.KillWorkers):
            for worker in effect.workers:
                self._end(worker, "the job restarts")
        elif isinstance(effect, e.EndJob):
            self.outcome = effect
            for running in list(self.running.values()):
                running.downlink.send(effect)

    # ------------------------------------------------------------ workers

    def _fork(self, worker: e.WorkerId, node: str) -> None:
        world, timing = self.world, self.timing
        uplink = Pipe(world, self._from_worker, timing.slow)
        around = Surroundings(
            world=world,
            job=self.job,
            keepers=self.keepers,
            node=node,
            send=lambda source, to, generation, key, data: self._send(worker, to, (source, generation, key, data)),
            tell=lambda event: self._tell(uplink, event),
            mark=lambda who, phase, step: self.on_mark(who, phase, step),
            facts=self.ledger,
            startup_s=world.between(*timing.startup_s),
            forward_s=timing.forward_s * world.between(0.5, 1.5),
            epilogue_s=world.between(0.0, timing.epilogue_s),
        )
        simulated = SimWorker(worker, around, lambda: process.poke())
        process = Process(world, simulated.life())
        downlink = Pipe(world, lambda effect: self._to_worker(worker, effect), timing.slow)
        self.running[worker] = Running(simulated, process, uplink, downlink, node)
        process.start()

    def _tell(self, uplink: Pipe, event: e.Event) -> None:
        """A worker speaks. A duplicate may come at any later time."""
        uplink.send(event)
        if self.world.random.random() < self.timing.duplicates and not isinstance(event, e.WorkerDied):
            self.world.after(self.world.between(0.0, 1.0), lambda: uplink.send(event))

    def _from_worker(self, event: Any) -> None:
        if self.outcome is None:
            self.happened(event)

    def _to_worker(self, worker: e.WorkerId, effect: Any) -> None:
        running = self.running[worker]
        if running.dead:
            return
        running.worker.control.heard(effect)
        if self.world.random.random() < self.timing.duplicates:
            running.worker.control.heard(effect)
        running.process.poke()

    def _send(self, source: e.WorkerId, to: e.WorkerId, message: tuple[int, int, Key, Any]) -> None:
        links = self.running[source].data
        if to not in links:
            links[to] = Pipe(self.world, lambda item: self._arrived(to, item), self.timing.slow)
        links[to].send(message)

    def _arrived(self, to: e.WorkerId, item: Any) -> None:
        running = self.running.get(to)
        if running is not None and not running.dead:
            running.worker.links.arrived(*item)
            running.process.poke()

    # ------------------------------------------------------------ faults

    def kill(self, worker: e.WorkerId, cause: str, detected_s: float) -> None:
        """A worker dies at once; its agent says so `detected_s` later."""
        if self.outcome is not None or not self._end(worker, cause):
            return
        running = self.running[worker]
        died = e.WorkerDied(worker, cause, step=running.worker.version, detected_at_s=self.world.now + detected_s)
        self.world.after(detected_s, lambda: running.uplink.send(died))

    def _end(self, worker: e.WorkerId, why: str) -> bool:
        """A process is no more; what it sent may still arrive, up to some point. False if it was gone already."""
        running = self.running[worker]
        if running.dead:
            return False
        running.dead = True
        running.process.kill()
        running.worker.snapshots.kill()
        for pipe in running.data.values():
            pipe.cut()
        self.log.append(f"{self.world.now:.4f} {worker} is killed: {why}")
        return True

    def alive(self) -> list[e.WorkerId]:
        """The workers whose processes run."""
        return [worker for worker, running in self.running.items() if not running.dead]

    def done(self) -> bool:
        """Whether the job ended and all have heard of it."""
        return self.state.phase is Phase.DONE and all(r.process.ended or r.dead for r in self.running.values())
