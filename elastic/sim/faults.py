"""Faults from a seed: which workers and nodes are lost when, how late that is noticed, and which nodes join."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.events import WorkerId
from everstep.elastic.protocol.relayout import busy
from everstep.elastic.protocol.state import Phase, Status
from everstep.resharding.forecast import Costs
from everstep.resharding.units import ModelSpec

from .cluster import Cluster
from .storage import Full

PHASES = ("compute", "reduce", "agree", "update", "commit", "recover", "restore", "join", "end")
DRAIN_PHASES = (*PHASES, "leave")
NODE_PHASES = (*PHASES, "protect")
AGAIN_S = 0.05  # interval at which a fault that would exceed the guarantee checks again whether it may strike
PATIENCE_S = 30.0  # how long it keeps checking


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`victims` workers die: at `at_s`, or when a worker enters `phase` for the `after`-th time, that one included."""

    victims: int
    at_s: float = 0.0
    phase: str = ""
    after: int = 0
    detected_s: float = 0.01
    spread_s: float = 0.0  # the victims die within this time of each other
    others: bool = False  # they are others than the worker that entered the phase


@dataclass(frozen=True, kw_only=True)
class NodeFault(Fault):
    """`victims` nodes are lost or become silent, among them that of the worker or keeper that entered `phase`."""

    streams_break: bool = True  # otherwise the loss shows by silence
    silent_s: float = 0.0  # not lost, but silent for this long
    alone: bool = False  # and unreachable for other nodes, too
    back_s: float = 0.0  # delay until another node joins in its place; 0: none does
    careful: bool = True  # strikes only where the guarantee covers it


@dataclass(frozen=True, kw_only=True)
class RackFault(NodeFault):
    """All nodes of a rack are lost, where the guarantee covers it: the rack of the worker that entered `phase`."""


@dataclass(frozen=True, kw_only=True)
class Drain(Fault):
    """`victims` nodes are asked to hand over and leave, among them that of the worker that entered `phase`."""


@dataclass(frozen=True, kw_only=True)
class Flip(Fault):
    """A bit flips in the memory of `victims` workers, in a value of this `kind`: owned, only read, or a backup's."""

    kind: str = "read"


@dataclass(frozen=True, kw_only=True)
class JoinersDie(Fault):
    """`victims` of those that join with the worker that has just joined die, one after another."""


@dataclass(frozen=True, kw_only=True)
class StoreFault(Fault):
    """The coordinator's store fails for `away_s`. `replaced`: another coordinator takes over meanwhile.

    `written`: the pending decision was written, although no confirmation arrived.
    """

    away_s: float = 0.1
    replaced: bool = False
    written: bool = False


@dataclass(frozen=True, kw_only=True)
class DiskFault(Fault):
    """The storage of checkpoints is full for `full_s`: saves fail `where`."""

    full_s: float
    where: Full


@dataclass(frozen=True, kw_only=True)
class SpeedChange(Fault):
    """Ranks are measured to be slower or faster than before."""

    speeds: tuple[float, ...] = ()  # one after another, for the ranks that there are


@dataclass(frozen=True, kw_only=True)
class CostChange(Fault):
    """Layers are measured to cost something else than before."""

    factors: tuple[float, ...] = ()  # of what each layer is assumed to cost, one after another


def costs_of(model: ModelSpec, factors: Sequence[float]) -> Costs:
    """The assumed costs of a model's layers, each times its factor."""
    assumed = Costs.of(model)
    forward, backward = (
        tuple(cost * factor for cost, factor in zip(each, itertools.cycle(factors), strict=False))
        for each in (assumed.forward, assumed.backward)
    )
    return Costs(forward, backward)


@dataclass(frozen=True, kw_only=True)
class RelayoutOrder(Fault):
    """An operator asks for another number of stages, again and again until nothing else is under way."""

    stages: int


def draw(rng: random.Random, workers: int, horizon_s: float) -> list[Fault]:
    """Some deaths: mostly one at a time, sometimes several or all at once, sometimes noticed late."""
    faults = []
    for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4, 6))):
        victims = rng.choice((1, 1, 1, 1, 2, workers))
        detected_s = rng.uniform(1.0, 2.5) if rng.random() < 0.15 else rng.uniform(0.001, 0.05)
        at_s, phase, after = _occasion(rng, PHASES, horizon_s)
        spread_s = rng.choice((0.0, 0.002, 0.05))
        faults.append(
            Fault(victims=victims, at_s=at_s, phase=phase, after=after, detected_s=detected_s, spread_s=spread_s)
        )
    return faults


def draw_nodes(rng: random.Random, losses: int, horizon_s: float, *, reckless: bool = False) -> list[Fault]:
    """Some lost or silent nodes; in most seeds never more than the guarantee covers, unless `reckless`."""
    faults: list[Fault] = []
    careful = rng.random() < 0.8 and not reckless
    for _ in range(rng.choice((1, 1, 2, 2, 3, 5))):
        at_s, phase, after = _occasion(rng, NODE_PHASES, horizon_s)
        silent = rng.random() < 0.25
        fault = NodeFault(
            victims=rng.choice((1, losses, losses)) + (not careful and rng.random() < 0.3),
            at_s=at_s,
            phase=phase,
            after=after,
            detected_s=rng.choice((0.001, 0.02, 0.3)),
            spread_s=rng.choice((0.0, 0.01, 0.2, 1.0)),
            streams_break=rng.random() < 0.7,
            silent_s=rng.choice((0.3, 0.8, 3.0, 8.0)) if silent else 0.0,
            alone=rng.random() < 0.5,
            back_s=rng.choice((0.0, 0.05, 0.5, 3.0)),
            careful=careful,
        )
        faults.append(fault)
    return faults


def draw_racks(rng: random.Random, horizon_s: float) -> list[Fault]:
    """One or two racks that are lost as a whole, their nodes at once or within seconds."""
    faults: list[Fault] = []
    for _ in range(rng.choice((1, 1, 2))):
        at_s, phase, after = _occasion(rng, NODE_PHASES, horizon_s)
        fault = RackFault(
            victims=0,
            at_s=at_s,
            phase=phase,
            after=after,
            detected_s=rng.choice((0.001, 0.02, 0.3)),
            spread_s=rng.choice((0.0, 0.01, 0.2, 1.0)),
            streams_break=rng.random() < 0.7,
            back_s=rng.choice((0.0, 0.0, 0.5, 3.0)),
        )
        faults.append(fault)
    return faults


def draw_drains(rng: random.Random, horizon_s: float) -> list[Fault]:
    """Some nodes that are asked to leave: one after another, or several at once."""
    drains: list[Fault] = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        at_s, phase, after = _occasion(rng, DRAIN_PHASES, horizon_s)
        spread_s = rng.choice((0.0, 0.01, 0.3))
        drains.append(Drain(victims=rng.choice((1, 1, 2)), at_s=at_s, phase=phase, after=after, spread_s=spread_s))
    return drains


def draw_flips(rng: random.Random, horizon_s: float, kinds: tuple[str, ...]) -> list[Fault]:
    """A few bits that flip one after another: two undetected ones at a time might outvote the right value."""
    flips: list[Fault] = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        at_s, phase, after = _occasion(rng, PHASES, horizon_s)
        flips.append(Flip(victims=1, at_s=at_s, phase=phase, after=after, kind=rng.choice(kinds)))
    return flips


def draw_joiners(rng: random.Random) -> list[Fault]:
    """Joiners that die after others have carried out their plan, while the coordinator has no report of that yet.

    The second death interrupts the recovery from the first one.
    """
    detected_s, spread_s = rng.choice((0.001, 0.01)), rng.choice((0.002, 0.02))
    after = rng.choice((0, 1, 1, 1, 2))  # the first joins alone, the others together
    return [JoinersDie(victims=2, phase="joined", after=after, detected_s=detected_s, spread_s=spread_s)]


def draw_moves(rng: random.Random, losses: int) -> list[Fault]:
    """Faults while shards are copied ahead of a rebalance, or when it is entered.

    They strike who copies, or others (those it copies from among them), the node, or the coordinator.
    """
    faults: list[Fault] = []
    for _ in range(rng.choice((0, 1, 1, 2))):
        phase, after = rng.choice(("prefetch", "prefetch", "switch")), rng.randrange(16)
        kind = rng.choice((Fault, Fault, StoreFault, NodeFault) if losses else (Fault, Fault, StoreFault))
        if kind is NodeFault:
            faults.append(NodeFault(victims=1, phase=phase, after=after, back_s=rng.choice((0.0, 0.5))))
        elif kind is StoreFault:
            away_s = rng.choice((0.1, 0.5))
            faults.append(StoreFault(victims=0, phase=phase, after=after, away_s=away_s, replaced=True))
        else:
            faults.append(Fault(victims=1, phase=phase, after=after, others=rng.random() < 0.5))
    return faults


def draw_store_faults(rng: random.Random, horizon_s: float) -> list[Fault]:
    """Times at which the coordinator's store fails."""
    faults: list[Fault] = []
    for _ in range(rng.choice((1, 1, 2, 4))):
        at_s, phase, after = _occasion(rng, PHASES, horizon_s)
        fault = StoreFault(
            victims=0,
            at_s=at_s,
            phase=phase,
            after=after,
            away_s=rng.choice((0.01, 0.1, 0.5, 3.0)),
            replaced=rng.random() < 0.5,
            written=rng.random() < 0.5,
        )
        faults.append(fault)
    return faults


def draw_disk_faults(rng: random.Random, horizon_s: float) -> list[Fault]:
    """Times at which the storage of checkpoints is full, some of them longer than the job."""
    faults: list[Fault] = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        at_s, phase, after = _occasion(rng, PHASES, horizon_s)
        full_s, where = rng.choice((0.05, 0.3, 1.0, 60.0)), rng.choice(list(Full))
        faults.append(DiskFault(victims=0, at_s=at_s, phase=phase, after=after, full_s=full_s, where=where))
    return faults


def draw_speeds(rng: random.Random, horizon_s: float) -> list[Fault]:
    """Some changes of measured speeds, most of them of one rank or of a few."""
    changes: list[Fault] = []
    for _ in range(rng.choice((1, 2, 4))):
        at_s, phase, after = _occasion(rng, PHASES, horizon_s)
        speeds = tuple(rng.choice((1.0, 1.0, 1.0, 0.5, 0.8, 2.0)) for _ in range(8))
        changes.append(SpeedChange(victims=0, at_s=at_s, phase=phase, after=after, speeds=speeds))
    return changes


def draw_costs(rng: random.Random, horizon_s: float) -> list[Fault]:
    """Some measurements of what layers cost, each unlike the one before."""
    changes: list[Fault] = []
    for _ in range(rng.choice((1, 2, 4))):
        at_s, phase, after = _occasion(rng, PHASES, horizon_s)
        factors = tuple(rng.choice((0.1, 1.0, 1.0, 4.0)) for _ in range(10))
        changes.append(CostChange(victims=0, at_s=at_s, phase=phase, after=after, factors=factors))
    return changes


def draw_relayouts(rng: random.Random, most: int, horizon_s: float) -> list[Fault]:
    """Some orders to go to another number of stages, of at most `most`."""
    orders: list[Fault] = []
    for _ in range(rng.choice((1, 2, 3, 4))):
        at_s, phase, after = _occasion(rng, (*PHASES, "prefetch", "switch"), horizon_s)
        orders.append(RelayoutOrder(victims=0, at_s=at_s, phase=phase, after=after, stages=rng.randint(1, most)))
    return orders


def _occasion(rng: random.Random, phases: tuple[str, ...], horizon_s: float) -> tuple[float, str, int]:
    if rng.random() < 0.5:
        return rng.uniform(0.0, horizon_s), "", 0
    phase = rng.choice(phases)
    return 0.0, phase, rng.randrange(60 if phase == "compute" else 20 if phase in PHASES[:5] else 4)


class Injector:
    """Injects faults into a cluster."""

    def __init__(self, cluster: Cluster, faults: list[Fault]) -> None:
        self._cluster = cluster
        self._world = cluster.world
        self._waiting = [fault for fault in faults if fault.phase]
        self._seen: dict[str, int] = {}
        self._came = 0
        self.last_s = 0.0
        self.struck = 0  # number of nodes lost or silenced
        self.asked = 0  # number of nodes asked to leave
        cluster.on_mark = lambda worker, phase, step: self._marked(worker, cluster.running[worker].node, phase)
        cluster.board.on_protect = lambda node, version: self._marked(None, node, "protect")
        for fault in faults:
            if not fault.phase:
                self._world.after(fault.at_s, functools.partial(self._strike, fault, None, ""))

    def _marked(self, worker: WorkerId | None, node: str, phase: str) -> None:
        seen = self._seen.get(phase, 0)
        self._seen[phase] = seen + 1
        for fault in [f for f in self._waiting if f.phase == phase and f.after == seen]:
            self._waiting.remove(fault)
            self._world.after(0.0, functools.partial(self._strike, fault, worker, node))

    def _strike(self, fault: Fault, worker: WorkerId | None, node: str) -> None:
        if isinstance(fault, RackFault):
            self._strike_rack(fault, node, self._world.now + PATIENCE_S)
            return
        if isinstance(fault, NodeFault):
            self._strike_nodes(fault, node, self._world.now + PATIENCE_S)
            return
        if isinstance(fault, Drain):
            self._strike_drains(fault, node, self._world.now + PATIENCE_S)
            return
        if isinstance(fault, StoreFault):
            self.last_s = max(self.last_s, self._world.now + fault.away_s + 10.0)  # a lost node shows by its silence
            self._cluster.store_fails(fault.away_s, replaced=fault.replaced, written=fault.written)
            return
        if isinstance(fault, DiskFault):
            self._cluster.disk_fills(fault.full_s, fault.where)
            return
        if isinstance(fault, SpeedChange):
            self._cluster.happened(e.SpeedsMeasured(dict(enumerate(fault.speeds))))
            return
        if isinstance(fault, CostChange):
            self._cluster.happened(e.CostsMeasured(costs_of(self._cluster.job.model, fault.factors)))
            return
        if isinstance(fault, RelayoutOrder):
            self._strike_relayout(fault, self._world.now + PATIENCE_S)
            return
        alive = self._cluster.alive()
        self._world.random.shuffle(alive)
        if isinstance(fault, JoinersDie):
            workers = self._cluster.state.workers
            joining = [w.id for w in workers.values() if w.status is Status.READY]
            alive, worker = [one for one in alive if one in joining and one != worker], None
        if worker in alive:
            alive.remove(worker)
            alive.insert(len(alive) if fault.others else 0, worker)
        self.last_s = max(self.last_s, self._world.now + fault.spread_s + fault.detected_s)
        if isinstance(fault, Flip):
            for victim in alive[: fault.victims]:
                self._cluster.flip(victim, fault.kind)
            return
        cause = f"fault in {fault.phase or 'no phase in particular'}"
        for victim in alive[: fault.victims]:
            delay_s = 0.0 if victim == worker else self._world.between(0.0, fault.spread_s)
            self._world.after(delay_s, functools.partial(self._cluster.kill, victim, cause, fault.detected_s))

    def _strike_drains(self, fault: Drain, first: str, until_s: float) -> None:
        """Ask as many nodes to leave as possible while one stays; again later, if the job has yet to start."""
        cluster, world = self._cluster, self._world
        if cluster.outcome is not None or world.now > until_s:
            return
        staying = [n for n in cluster.state.nodes if n not in cluster.state.leaving and n not in cluster.doubtful()]
        if cluster.state.layout is None or len(staying) < 2:
            world.after(AGAIN_S, functools.partial(self._strike_drains, fault, first, until_s))
            return
        world.random.shuffle(staying)
        staying.sort(key=lambda node: node != first)
        self.last_s = max(self.last_s, world.now + fault.spread_s + 10.0)
        for node in staying[: min(fault.victims, len(staying) - 1)]:
            self.asked += 1
            world.after(world.between(0.0, fault.spread_s), functools.partial(cluster.drain, node))

    def _strike_relayout(self, fault: RelayoutOrder, until_s: float) -> None:
        cluster, world = self._cluster, self._world
        if cluster.outcome is not None or world.now > until_s:
            return
        if busy(cluster.state):
            world.after(AGAIN_S, functools.partial(self._strike_relayout, fault, until_s))
            return
        cluster.happened(e.RelayoutOrdered(fault.stages))

    # ------------------------------------------------------------ nodes

    def _strike_nodes(self, fault: NodeFault, first: str, until_s: float) -> None:
        cluster, world = self._cluster, self._world
        if cluster.outcome is not None or world.now > until_s:
            return
        cluster.look()
        doubtful = cluster.doubtful()
        nodes = [node for node in cluster.state.nodes if node not in doubtful]
        victims = min(fault.victims, cluster.promise.left, len(nodes) - 1) if fault.careful else fault.victims
        trains = cluster.state.layout is not None and cluster.state.phase in (Phase.RUNNING, Phase.RECOVERING)
        if not trains or victims < 1:
            world.after(AGAIN_S, functools.partial(self._strike_nodes, fault, first, until_s))
            return
        world.random.shuffle(nodes)
        nodes.sort(key=lambda node: node != first)
        self.last_s = max(self.last_s, world.now + fault.spread_s + 10.0 + fault.silent_s + fault.back_s)
        self._doom(fault, nodes[:victims], first)

    def _strike_rack(self, fault: RackFault, first: str, until_s: float) -> None:
        """Lose a rack, if the others are in several nodes that hold what it holds."""
        cluster, world = self._cluster, self._world
        if cluster.outcome is not None or world.now > until_s:
            return
        cluster.look()
        rack = cluster.rack_of(first or world.random.choice(sorted(cluster.state.nodes) or [""]))
        nodes = sorted(node for node in cluster.state.nodes if cluster.rack_of(node) == rack)
        doubtful = cluster.doubtful()
        covered = rack and cluster.promise.may_lose(set(nodes)) and not doubtful & cluster.state.nodes.keys()
        trains = cluster.state.layout is not None and cluster.state.phase in (Phase.RUNNING, Phase.RECOVERING)
        if not trains or not covered or len(nodes) == len(cluster.state.nodes):
            world.after(AGAIN_S, functools.partial(self._strike_rack, fault, "", until_s))
            return
        self.last_s = max(self.last_s, world.now + fault.spread_s + 10.0 + fault.back_s)
        self._cluster.happenings["racks lost"] += 1
        self._doom(fault, nodes, first)

    def _doom(self, fault: NodeFault, nodes: list[str], first: str) -> None:
        cluster, world = self._cluster, self._world
        for node in nodes:
            delay_s = 0.0 if node == first else world.between(0.0, fault.spread_s)
            world.after(delay_s, functools.partial(self._lose, fault, node))
            cluster.promise.doom(node)

    def _lose(self, fault: NodeFault, node: str) -> None:
        cluster = self._cluster
        self.struck += 1
        if fault.silent_s:
            cluster.silence(node, fault.silent_s, alone=fault.alone)
        else:
            cluster.lose(node, fault.detected_s if fault.streams_break else None)
        if fault.back_s:
            self._came += 1
            name, slots = f"late{self._came}", cluster.nodes[node].slots
            self._world.after(fault.silent_s + fault.back_s, lambda: self._come(name, slots))

    def _come(self, name: str, slots: int) -> None:
        state = self._cluster.state
        if len(state.nodes) + len(state.spares) < state.config.max_nodes + state.config.spares:
            self._cluster.join(name, slots)
