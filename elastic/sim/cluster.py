"""A simulated cluster: the real coordinator, nodes with agents, keepers and workers, and the links between them."""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from everstep.elastic.protocol import agent_events as a
from everstep.elastic.protocol import codec, coordinator, invariants
from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.protection import state_slots
from everstep.elastic.protocol.state import Config, Phase, State
from everstep.resharding.plan import Plan

from .agent import SimAgent
from .keeper import Board
from .ledger import Ledger, Promise
from .links import Key
from .state_store import Decision, StateStore
from .storage import Full, Storage
from .surroundings import Surroundings
from .transcript import brief
from .values import Reference, ShardState
from .worker import SimWorker
from .world import (
    Pipe,
    Process,
    Steps,
    World,
)

TICK_S = 0.1
HEARTBEAT_S = 0.5
SLEEPS = 0.02  # probability that the coordinator's clock jumps ahead, at each tick
RESTARTS = 0.1  # probability that another coordinator takes over, at each tick
LATE_S = 1.0  # longer than any message is in transit
SLEPT_S = 1.0  # after a longer pause, a coordinator first waits for heartbeats


@dataclass
class Node:
    """A machine under one name of its agent: its agent, its keeper and its workers."""

    name: str
    slots: int
    agent: SimAgent
    stream: Pipe  # from its agent to the coordinator
    orders: Pipe  # from the coordinator to its agent
    up: bool = True
    silent_s: float = 0.0  # no message passes between it and the coordinator before this time
    heard_s: float = 0.0  # when the last message passed before that
    alone_s: float = 0.0  # no message passes between it and other nodes before this time


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
    died: e.WorkerDied | None = None  # its agent's report of its end


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Speeds of the cluster: probabilities and seconds."""

    slow: float = 0.05  # of a long delay on a link
    duplicates: float = 0.05  # of a control message that is delivered twice
    startup_s: tuple[float, float] = (0.02, 0.3)
    forward_s: float = 0.002
    epilogue_s: float = 0.2
    slowest: float = 1.0  # factor by which the first node computes more slowly
    keeper_s: tuple[float, float] = (0.0005, 0.005)  # to fetch a shard from another node's keeper


@dataclass(frozen=True)
class Saving:
    """Checkpoints: their interval in versions (0: only the last), the probability of damage, and an existing one."""

    every: int = 0
    damaged: float = 0.0
    begun: e.Saved | None = None


_COUNTED = {"flip": "bits flipped", "prefetch": "records asked for ahead", "switch": "switches of who has copies"}


class Cluster:
    """The cluster without the faults, which strike through `on_mark` and `kill`."""

    def __init__(
        self,
        world: World,
        config: Config,
        job: e.Job,
        timing: Timing,
        expected: Reference,
        interval: int = 1,
        saving: Saving | None = None,
        verify_every: int = 0,
        racks: int = 0,
        memory_bytes: int = 0,
    ) -> None:
        self.world = world
        self.job = job
        self.timing = timing
        self.interval = interval
        self.saving = saving or Saving()
        self.verify_every = verify_every
        self.store = StateStore()
        self.storage = Storage(len(job.model.shards), self.saving.damaged, world.seed + 3)
        self._saved = {begun.name: begun.version} if (begun := self.saving.begun) else {}  # as far as is known
        self.ahead_s = 0.0  # offset of the coordinator's clock, after it was stopped or its machine slept
        self.ledger = Ledger(job, expected, verified=bool(verify_every))
        self.racks = racks
        self.memory_bytes = memory_bytes
        self.promise = Promise(job.node_losses, replay=job.protection == "replay", rack_of=self.rack_of)
        self.state: State = coordinator.initial_state(config, 0.0)
        self.events: list[tuple[float, e.Event]] = []
        self.log: list[str] = []
        self.happenings: Counter[str] = Counter()  # faults that are no events, by kind
        self.running: dict[e.WorkerId, Running] = {}
        self.nodes: dict[str, Node] = {}
        self.board = Board(world, timing.keeper_s)
        self.outcome: e.EndJob | None = None
        self.released = 0  # number of nodes that handed over
        self.stays = True  # whether nodes remain, apart from those that were asked to leave
        self.on_mark: Callable[[e.WorkerId, str, int], None] = lambda worker, phase, step: None
        self.leaves_at: Callable[[int], int] = lambda rank: job.steps  # the version at which a rank leaves the loop
        self.leaves_alone = False
        self.restarts_until_s = 0.0  # until when coordinators are replaced now and then
        self._restarts = random.Random(world.seed + 2)  # separate, so that older seeds keep their meaning
        self._sleeps = random.Random(world.seed + 4)
        world.after(TICK_S, self._tick)

    def _tick(self) -> None:
        if self.outcome is None and self.store.away:
            self.world.after(TICK_S, self._tick)  # the coordinator waits for its store, and does nothing else
        elif self.outcome is None:
            if self.world.now < self.restarts_until_s and self._restarts.random() < RESTARTS:
                self._restart_coordinator()
            if self.world.now < self.restarts_until_s and self._sleeps.random() < SLEEPS:
                self.ahead_s += self._sleeps.uniform(1.0, 60.0)
                self.happened(e.CoordinatorReturned(LATE_S))
            self.happened(e.Ticked())
            self.world.after(TICK_S, self._tick)

    def _restart_coordinator(self) -> None:
        """Another coordinator takes over, with the part of the state that a store holds."""
        self.state = codec.state_of(self.state.config, codec.changed_rows(None, self.state))  # type: ignore[arg-type]
        self.happened(e.CoordinatorReturned(LATE_S))

    def store_fails(self, away_s: float, *, replaced: bool, written: bool) -> None:
        """The coordinator's store fails for a while. When it works again, another coordinator may have taken over.

        `written`: the last decision was written, although the coordinator that made it received no confirmation.
        """
        if self._over() or self.store.away:
            return
        self.store.away = True
        self.happenings["times the store was away"] += 1
        self.log.append(f"{self.world.now:.4f} the store is away for {away_s:.2f} s")
        self.world.after(away_s, lambda: self._store_is_back(away_s, replaced=replaced, written=written))

    def _store_is_back(self, away_s: float, *, replaced: bool, written: bool) -> None:
        decision, inbox = self.store.taken_over(written=written) if replaced else self.store.back()
        self.log.append(f"{self.world.now:.4f} the store is back, {len(inbox)} events have waited")
        if decision is not None:
            self._act(*decision)
        if replaced:
            self.happenings["takeovers while the store was away"] += 1
            self._restart_coordinator()
        elif away_s > SLEPT_S:
            self.happened(e.CoordinatorReturned(LATE_S))
        for event in inbox:
            self.happened(event)

    def disk_fills(self, full_s: float, where: Full) -> None:
        """The storage of checkpoints is full for a while."""
        if not self._over() and self.storage.full is None:
            self.storage.full = where
            self.happenings["times the checkpoint storage was full"] += 1
            self.log.append(f"{self.world.now:.4f} the storage is full ({where.value}) for {full_s:.2f} s")
            self.world.after(full_s, self._disk_has_room)

    def _disk_has_room(self) -> None:
        self.storage.full = None
        self.log.append(f"{self.world.now:.4f} the storage has room again")

    # ------------------------------------------------------------ nodes

    def join(self, node: str, slots: int) -> None:
        """A node's agent registers, unless the job is over."""
        if self.outcome is None:
            self._connect(SimAgent(self.world, node, slots, self))

    def _connect(self, one: SimAgent) -> None:
        """A node becomes known to the coordinator under a new name."""
        world, slow, node, slots = self.world, self.timing.slow, one.state.node, one.state.config.slots
        stream = Pipe(world, self._from_node, slow, lambda: self.nodes[node].silent_s)
        orders = Pipe(world, lambda effect: self._to_node(node, effect), slow, lambda: self.nodes[node].silent_s)
        self.nodes[node] = Node(node, slots, one, stream, orders)
        self.board.add(node)
        one.happened(a.Welcomed())

    def announce(self, one: SimAgent) -> None:
        node = one.state.node
        rack = self.rack_of(node)
        domains = (f"rack={rack}",) if rack else ()
        self.happened(e.NodeJoined(node, f"host-{node}", one.state.config.slots, node, domains=domains))
        self._beat(node)

    def connect_again(self, one: SimAgent, former: str) -> None:
        """Close the node's old stream when the new one opens."""
        delay_s = max(0.0, self.nodes[former].silent_s - self.world.now) + one.random.uniform(0.01, 0.3)

        def connect() -> None:
            if self.outcome is None and not one.ended:
                self._from_node(e.NodeLost(former, "its stream broke"))
                self._connect(one)

        self.world.after(delay_s, connect)

    def rack_of(self, node: str) -> str:
        """The rack of a node with which the job begins; empty for others, and where there are no racks."""
        number = node.removeprefix("node")
        return f"r{int(number) % self.racks}" if self.racks and number.isdigit() else ""

    def _beat(self, node: str) -> None:
        if self.outcome is None and self.nodes[node].up:
            self.nodes[node].stream.send(e.HeartbeatsReceived((node,)))
            self.world.after(HEARTBEAT_S, lambda: self._beat(node))

    def _from_node(self, event: Any) -> None:
        if self.outcome is None:
            self.happened(event)

    def _to_node(self, node: str, effect: object) -> None:
        """An order of the coordinator arrives."""
        one = self.nodes[node].agent
        if one.state.node != node:
            return  # addressed to a former name of the node
        if isinstance(effect, e.FenceNode):
            one.happened(a.FenceOrdered(effect.why))
        elif isinstance(effect, e.RefuseNode):
            one.happened(a.JoinRefused(effect.why))
        elif isinstance(effect, e.ReleaseNode):
            one.happened(a.EndOrdered(a.NodeOutcome(True, effect.why)))
        elif isinstance(effect, e.EndJob):
            one.happened(a.EndOrdered(a.NodeOutcome(effect.succeeded, effect.why)))
        elif isinstance(effect, e.StartWorkers):
            one.happened(a.StartOrdered(effect.workers))
        elif isinstance(effect, e.KillWorkers):
            one.happened(a.KillOrdered(effect.workers))

    def drain(self, node: str) -> None:
        """Ask a node to leave, once."""
        machine = self.nodes[node]
        if not self._over() and machine.up and not machine.agent.state.stop_why:
            machine.agent.happened(a.LeaveAsked("asked to leave"))

    def asks_drain(self, node: str, why: str) -> None:
        self.nodes[node].stream.send(e.DrainRequested(node, why))

    def sees(self, node: str) -> a.TimePassed:
        machine, now = self.nodes.get(node), self.world.now
        if machine is None:
            return a.TimePassed()
        running = [(worker, it.worker) for worker, it in self.running.items() if it.node == node and not it.dead]
        steps = tuple((worker, it.version) for worker, it in running)
        unheard_s = now - machine.heard_s if machine.silent_s > now else 0.0
        return a.TimePassed(unheard_s, steps, any(it.finished for _, it in running))

    def _over(self) -> bool:
        """Whether training is over: later faults have other rules, which end the job."""
        return self.outcome is not None or self.state.phase is Phase.AFTER

    def doubtful(self) -> set[str]:
        """The nodes that are gone, or silent, or were silent so recently that they may still be declared lost."""
        late_s = self.world.now - LATE_S
        return {name for name, node in self.nodes.items() if not node.up or (node.silent_s and node.silent_s > late_s)}

    def look(self) -> None:
        """Check whether the job is whole again."""
        self.promise.look(self.state, self.board.keepers, self.doubtful())

    def lose(self, node: str, detected_s: float | None) -> None:
        """A machine is lost. Its stream breaks after `detected_s`, or (None) it only becomes silent."""
        if self._over() or not self.nodes[node].up:
            return
        self.look()
        self.promise.struck(node)
        self.nodes[node].agent.dead = True
        self.lose_keeper(node, "its node is lost")
        for worker, running in self.running.items():
            if running.node == node:
                self.end(worker, "its node is lost")
        if detected_s is not None:
            self.world.after(detected_s, lambda: self._from_node(e.NodeLost(node, "its stream broke")))

    def silence(self, node: str, duration_s: float, *, alone: bool) -> None:
        """Cut a node off from the coordinator, and with `alone` from the other nodes: messages are delivered late."""
        machine, until_s = self.nodes[node], self.world.now + duration_s
        if self._over() or node in self.doubtful():
            return
        self.look()
        self.promise.struck(node)
        machine.silent_s, machine.heard_s = until_s, self.world.now
        machine.alone_s = until_s if alone else 0.0
        self.board.keepers[node].cut_off = alone
        self.log.append(f"{self.world.now:.4f} {node} is silent for {duration_s:.2f} s{', and alone' if alone else ''}")
        self.world.after(duration_s, lambda: self._heard_again(node))

    def _heard_again(self, node: str) -> None:
        self.world.after(LATE_S, lambda: self._is_back(node))
        self.board.keepers[node].cut_off = False
        self.board.changed()
        self.log.append(f"{self.world.now:.4f} {node} is heard again")

    def _is_back(self, node: str) -> None:
        if node in self.state.nodes and self.nodes[node].up:
            self.promise.came_back(node)

    def lose_keeper(self, node: str, why: str) -> None:
        """A node leaves the job: its keeper ends, and only a part of its messages in transit arrives."""
        machine = self.nodes[node]
        if not machine.up:
            return
        machine.up = False
        self.log.append(f"{self.world.now:.4f} {node} goes down: {why}")
        self.board.keepers[node].go_down()
        machine.stream.cut()
        for running in self.running.values():
            if running.node == node:
                running.uplink.cut()

    # ------------------------------------------------------------ the coordinator

    def happened(self, event: e.Event) -> None:
        """An event reaches the coordinator."""
        self.events.append((self.world.now, event))
        if self.store.unwritten is not None:
            self.store.inbox.append(event)
            return
        after, effects = coordinator.step(self.state, event, self.world.now + self.ahead_s)
        if not self.store.holds(Decision(event, after, effects)):
            self._act(event, after, effects)

    def _act(self, event: e.Event, after: State, effects: Sequence[e.Effect]) -> None:
        """A decision is written: adopt it, and carry it out."""
        before, self.state = self.state, after
        invariants.check_step(before, after, effects)
        if effects:
            self.log.append(f"{self.world.now:.4f} {brief(event)} -> {', '.join(map(brief, effects))}")
        self._check_fence(before, event, effects)
        self._check_drain(before, event)
        self._check_saved(event, effects)
        self.ledger.told(self.state, effects, broken=self.promise.broken)
        self.board.made_up |= any(isinstance(x, e.CarryOut) and bool(x.plan.stand_ins) for x in effects)
        for effect in effects:
            self._carry_out(effect)
        self._check_versions()
        self.look()

    def _check_fence(self, before: State, event: e.Event, effects: Sequence[e.Effect]) -> None:
        """Check that messages of a node that was declared lost change nothing."""
        running = self.running.get(getattr(event, "worker", None) or e.WorkerId(-1, -1))
        if running is None or running.node in before.nodes or before.phase is Phase.DONE:
            return
        if self.state is not before or effects:
            raise AssertionError(f"{brief(event)} of the lost node {running.node} was acted on")

    def _check_saved(self, event: e.Event, effects: Sequence[e.Effect]) -> None:
        """Check that what is called saved is whole, and that the newest of it is what training resumes from."""
        if isinstance(event, e.CheckpointSaved):
            if not self.storage.is_whole(event.saved.name):
                raise AssertionError(f"{event.saved.name} is called saved, and is not whole")
            if event.saved in self.state.saved:
                self._saved[event.saved.name] = event.saved.version
        elif isinstance(event, e.CheckpointUnreadable) and event.name not in {item.name for item in self.state.saved}:
            self._saved.pop(event.name, None)
        plans = {x.plan.generation: x.plan for x in effects if isinstance(x, e.CarryOut) and x.plan.checkpoint}
        for plan in plans.values():
            self.happenings["resumes from a checkpoint"] += 1
            if plan.version != max(self._saved.values()):
                raise AssertionError(f"training resumes from version {plan.version}, and there are {self._saved}")

    def check_lost(self) -> None:
        """Check what is said of the last checkpoint at the end of a job that succeeded."""
        assert self.outcome is not None
        unsaved = self.job.checkpoints and not self.storage.has(self.state.committed + 1)
        if self.outcome.lost and not (unsaved and self.storage.refused):
            raise AssertionError(f"the job lost {self.outcome.lost}")
        if unsaved and not self.outcome.lost:
            raise AssertionError(f"version {self.state.committed + 1} is not saved, and the job does not say so")

    def _check_drain(self, before: State, event: e.Event) -> None:
        """Check that a departure neither aborts nor ends anything, as long as another node can take over."""
        leaves = {event.node} if isinstance(event, e.DrainRequested) else set()
        self.stays = bool(self.state.nodes.keys() - self.state.leaving.keys() - leaves)
        if leaves and self.stays:
            waits = before.phase is Phase.LAUNCHED and not before.elastic  # whether it can hand over is unknown
            if self.state.phase is Phase.DONE and before.phase is not Phase.DONE and not waits:
                raise AssertionError(f"{brief(event)} ended the job")
            if self.state.phase is Phase.RECOVERING and before.phase is not Phase.RECOVERING:
                raise AssertionError(f"{brief(event)} aborted the generation")

    def agreed(self, worker: e.WorkerId, step: int, agreement: str) -> None:
        """A worker passed the agreement of a step; if its node is lost, no other member may share its generation."""
        self.ledger.agreed(step, agreement)
        running, state = self.running[worker], self.state
        self.promise.agreed_in = max(self.promise.agreed_in, running.worker.links.generation)
        if running.node not in state.nodes and running.worker.links.generation >= state.generation:
            raise AssertionError(f"{worker} of the lost node {running.node} agrees in generation {state.generation}")

    def entered(self, worker: e.WorkerId, plan: Plan, version: int) -> None:
        self.ledger.entered(worker, plan, version)

    def owned(self, worker: e.WorkerId, generation: int, version: int, states: dict[int, ShardState]) -> None:
        self.ledger.owned(worker, generation, version, states)

    def went_back(self, worker: e.WorkerId, plan: Plan, since: int) -> None:
        self.ledger.went_back(worker, plan, since)

    def _check_versions(self) -> None:
        """Check that members that have carried out one plan are at most one version apart."""
        versions: dict[int, set[int]] = {}
        for running in self.running.values():
            layout = running.worker.layout
            if not running.dead and layout is not None and layout.generation == running.worker.links.generation:
                versions.setdefault(layout.generation, set()).add(running.worker.version)
        for generation, found in versions.items():
            if max(found) - min(found) > 1:
                raise AssertionError(f"versions {sorted(found)} live in generation {generation}")

    def _carry_out(self, effect: e.Effect) -> None:
        if isinstance(effect, e.StartWorkers | e.KillWorkers):
            late_s = max(0.0, self.nodes[effect.node].silent_s - self.world.now)
            deliver = functools.partial(self._to_node, effect.node, effect)
            if late_s:
                self.world.after(late_s, deliver)
            else:
                deliver()
        elif isinstance(effect, e.AbortGeneration | e.CarryOut | e.TellLeft | e.Conclude | e.EndTraining):
            running = self.running.get(effect.worker)
            if running is not None:
                running.downlink.send(effect)
        elif isinstance(effect, e.FenceNode | e.ReleaseNode | e.RefuseNode):
            self.nodes[effect.node].orders.send(effect)
            if isinstance(effect, e.ReleaseNode):
                self.released += 1
                self.promise.released(effect.node, len({w.node for w in self.state.members()}))
        elif isinstance(effect, e.EndJob):
            self.outcome = effect
            for node in self.nodes.values():
                node.orders.send(effect)

    # ------------------------------------------------------------ workers

    def fork(self, worker: e.WorkerId, node: str) -> None:
        """A worker's process begins."""
        world, timing = self.world, self.timing
        machine = self.nodes[node]
        uplink = Pipe(world, self._from_node, timing.slow, lambda: machine.silent_s)
        around = Surroundings(
            world=world,
            job=self.job,
            board=self.board,
            node=node,
            state_slots=state_slots(
                self.job.protection, self.state.config.max_nodes, checkpoints=bool(self.saving.every)
            ),
            interval=self.interval,
            storage=self.storage,
            saves_every=self.saving.every,
            saved=(self.saving.begun,) if self.saving.begun and worker == (0, 0) else (),
            send=lambda source, to, generation, key, data: self._send(worker, to, (source, generation, key, data)),
            tell=lambda event: self._tell(uplink, event),
            mark=self._marked,
            facts=self,
            startup_s=world.between(*timing.startup_s),
            forward_s=timing.forward_s * world.between(0.5, 1.5) * (timing.slowest if node == "node0" else 1.0),
            epilogue_s=world.between(0.0, timing.epilogue_s),
            leaves_at=self.leaves_at(worker.rank),
            verify_every=self.verify_every,
            memory_bytes=self.memory_bytes,
        )
        simulated = SimWorker(worker, around, lambda: process.poke())
        process = Process(world, self._life(worker, simulated))
        downlink = Pipe(world, lambda effect: self._to_worker(worker, effect), timing.slow, lambda: machine.silent_s)
        self.running[worker] = Running(simulated, process, uplink, downlink, node)
        process.start()

    def _marked(self, worker: e.WorkerId, phase: str, step: int) -> None:
        if phase in _COUNTED:
            self.happenings[_COUNTED[phase]] += 1
        self.on_mark(worker, phase, step)

    def _life(self, worker: e.WorkerId, simulated: SimWorker) -> Steps[None]:
        """Run a worker until its process ends by itself."""
        yield from simulated.life()
        running = self.running[worker]
        running.died = e.WorkerDied(worker, "exit status 0", clean=True, step=simulated.version)
        self.world.after(0.0, lambda: self.nodes[running.node].agent.gone(worker))

    def report_death(self, worker: e.WorkerId) -> None:
        running = self.running[worker]
        assert running.died is not None
        running.uplink.send(running.died)

    def ends_job(self, worker: e.WorkerId) -> None:
        running = self.running.get(worker)
        if running is not None and not running.dead:
            running.worker.control.heard(e.EndJob(True))
            running.process.poke()

    def _tell(self, uplink: Pipe, event: e.Event) -> None:
        """A worker sends a message. A duplicate may arrive at any later time."""
        uplink.send(event)
        if self.world.random.random() < self.timing.duplicates and not isinstance(event, e.WorkerDied):
            self.world.after(self.world.between(0.0, 1.0), lambda: uplink.send(event))

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
            links[to] = Pipe(
                self.world,
                lambda item: self._arrived(to, item),
                self.timing.slow,
                lambda: self._apart_until(source, to),
            )
        links[to].send(message)

    def _apart_until(self, source: e.WorkerId, to: e.WorkerId) -> float:
        ends = {self.running[worker].node for worker in (source, to)}
        return max(self.nodes[node].alone_s for node in ends) if len(ends) > 1 else 0.0

    def _arrived(self, to: e.WorkerId, item: Any) -> None:
        running = self.running.get(to)
        if running is not None and not running.dead:
            running.worker.links.arrived(*item)
            running.process.poke()

    # ------------------------------------------------------------ faults

    def kill(self, worker: e.WorkerId, cause: str, detected_s: float) -> None:
        """A worker dies; its agent reports it `detected_s` later."""
        if self._over() or not self.end(worker, cause):
            return
        running, seen_s = self.running[worker], self.world.now + self.ahead_s + detected_s
        running.died = e.WorkerDied(worker, cause, step=running.worker.version, detected_at_s=seen_s)
        self.world.after(detected_s, lambda: self.nodes[running.node].agent.died(worker))

    def flip(self, worker: e.WorkerId, kind: str) -> None:
        """Flip a bit in a worker's memory, as soon as it holds a value of that kind."""
        if not self._over():
            self.running[worker].worker.flips.append(kind)

    def end(self, worker: e.WorkerId, why: str) -> bool:
        """End a process; only a part of its messages in transit arrives. False if it had ended already."""
        running = self.running[worker]
        if running.dead or running.process.ended:
            return False
        running.dead = True
        running.process.kill()
        running.worker.snapshots.kill()
        running.worker.prefetch.end()
        for pipe in running.data.values():
            pipe.cut()
        running.died = running.died or e.WorkerDied(worker, why, step=running.worker.version)
        self.log.append(f"{self.world.now:.4f} {worker} is killed: {why}")
        return True

    def alive(self) -> list[e.WorkerId]:
        """The workers whose processes run."""
        return [worker for worker, running in self.running.items() if not running.dead]

    def done(self) -> bool:
        """Whether the job ended and every node has been notified."""
        there = [self.nodes[node].agent for node in self.state.nodes]
        return self.state.phase is Phase.DONE and all(one.ended for one in there)
