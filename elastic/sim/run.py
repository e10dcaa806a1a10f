"""One simulated job from one seed: `simulate(seed, ...)`; many: `python -m everstep.elastic.sim.run 0 99 [shapes]`."""

from __future__ import annotations

import functools
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.causes import Ending
from everstep.elastic.protocol.state import Config
from everstep.elastic.protocol.terms import Terms
from everstep.resharding.units import ModelSpec, ParameterSpec

from .cluster import Cluster, Saving, Timing
from .faults import (
    Fault,
    Injector,
    draw,
    draw_costs,
    draw_disk_faults,
    draw_drains,
    draw_flips,
    draw_joiners,
    draw_moves,
    draw_nodes,
    draw_racks,
    draw_relayouts,
    draw_speeds,
    draw_store_faults,
)
from .values import Reference, reference
from .world import World

BOUND_S = 60.0  # of virtual time after the last fault, within which a job has to end


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The job to simulate."""

    stages: int = 1  # 0: as many as the planner finds best
    workers: int = 4
    nodes: int = 1
    layers: int = 4
    micro_batches: int = 4
    steps: int = 6
    tied: bool = False
    late_slots: int = 0  # of a node that joins while the job runs
    spares: int = 0  # nodes that wait for a place
    losses: int = 1  # how many nodes may be lost at once
    interval: int = 1  # of protected versions, in steps; 0: it changes all the time
    loses_nodes: bool = False
    drains: bool = False  # nodes are asked to leave
    leaves_at: int = 0  # the version at which the user's code leaves the loop; 0: with the last step
    alone: int = -1  # the only rank that does so; -1: all do
    saves: bool = False  # the job saves checkpoints, so the last one has to be concluded
    saves_every: int = 0  # interval of checkpoints, in versions
    resumes_at: int = 0  # the version of the checkpoint that the job resumes from
    damaged: float = 0.0  # probability that a checkpoint is damaged
    reckless: bool = False  # more nodes are lost than the guarantee covers
    slowest: float = 1.0  # factor by which the first node computes more slowly
    protection: str = "parity"
    on_loss: str = "checkpoint"
    flips: tuple[str, ...] = ()  # bits flip in values of these kinds: owned, read, backup; all replicas are compared
    store_fails: bool = False  # the coordinator's store fails now and then
    disk_fills: bool = False  # the storage of checkpoints is full now and then
    joiners_die: bool = False  # joiners die while reports of joins are late
    rebalance_s: float = 0.0  # how long a layout lasts before a faster one is looked for; 0: none is
    racks: int = 0  # of the nodes that the job begins with; they are lost as a whole
    relayouts: bool = False  # operators ask for other numbers of stages
    speeds_change: bool = False  # ranks become slower and faster, as measured
    costs_change: bool = False  # layers are measured to cost something else than the model says
    memory_bytes: int = 0  # of a worker, for values and gradients; 0: no limit


SHAPES = {
    "1x4": Shape(),
    "2x2": Shape(stages=2, tied=True),
    "4x1": Shape(stages=4, micro_batches=6),
    "uneven": Shape(stages=2, workers=3, layers=5, micro_batches=7, tied=True),
    "growing": Shape(stages=2, workers=2, late_slots=2),
    "two nodes": Shape(workers=4, nodes=2, micro_batches=8),
    "alone": Shape(workers=1, layers=2, steps=4),
    "3 nodes": Shape(workers=3, nodes=3, steps=9, loses_nodes=True),
    "3 nodes, seldom": Shape(stages=3, workers=6, nodes=3, steps=12, interval=3, loses_nodes=True),
    "4 nodes": Shape(stages=2, workers=4, nodes=4, steps=9, losses=2, tied=True, loses_nodes=True),
    "4 nodes, seldom": Shape(workers=5, nodes=4, steps=12, losses=2, interval=3, loses_nodes=True),
    "5 nodes": Shape(stages=2, workers=5, nodes=5, steps=10, interval=0, late_slots=1, loses_nodes=True),
    "3 nodes, leaving": Shape(workers=3, nodes=3, steps=12, late_slots=1, drains=True),
    "4 nodes, leaving": Shape(stages=2, workers=6, nodes=4, steps=12, interval=3, drains=True, loses_nodes=True),
    "5 nodes, leaving": Shape(workers=5, nodes=5, steps=14, losses=2, tied=True, drains=True, loses_nodes=True),
    "leaving early": Shape(stages=2, workers=4, leaves_at=4, saves=True),
    "leaving early, growing": Shape(workers=3, late_slots=2, leaves_at=3),
    "leaving early, 3 nodes": Shape(workers=3, nodes=3, steps=9, leaves_at=6, interval=2, loses_nodes=True),
    "leaving alone": Shape(workers=4, steps=8, leaves_at=3, alone=1, saves=True),
    "resuming": Shape(stages=2, workers=4, steps=8, resumes_at=3, saves=True, saves_every=2),
    "saving": Shape(
        workers=3, nodes=3, steps=14, interval=3, loses_nodes=True, reckless=True, saves=True, saves_every=3
    ),
    "saving, damaged": Shape(
        stages=2,
        workers=4,
        nodes=4,
        steps=12,
        interval=4,
        loses_nodes=True,
        reckless=True,
        saves=True,
        saves_every=2,
        resumes_at=2,
        damaged=0.3,
    ),
    "slow node": Shape(stages=2, workers=6, nodes=3, micro_batches=8, late_slots=2, loses_nodes=True, slowest=10.0),
    "6 nodes": Shape(stages=3, workers=6, nodes=6, steps=10, losses=2, loses_nodes=True),
    "slow node, leaving": Shape(workers=6, nodes=3, micro_batches=8, steps=10, drains=True, slowest=10.0),
    "3 nodes, replay": Shape(workers=6, nodes=3, steps=12, late_slots=2, protection="replay", loses_nodes=True),
    "4 nodes, replay": Shape(
        stages=2, workers=4, nodes=4, steps=12, losses=2, tied=True, protection="replay", loses_nodes=True
    ),
    "4 nodes, replay, leaving": Shape(workers=4, nodes=4, steps=12, protection="replay", drains=True, loses_nodes=True),
    "differing": Shape(workers=4, steps=10, late_slots=1, flips=("owned", "read")),
    "differing, replay": Shape(workers=4, nodes=4, steps=10, protection="replay", flips=("owned", "read", "backup")),
    "made up": Shape(
        stages=3, workers=6, nodes=6, layers=6, steps=10, loses_nodes=True, reckless=True, on_loss="neighbors"
    ),
    "made up, seldom": Shape(
        workers=5, nodes=5, layers=6, steps=12, interval=4, loses_nodes=True, reckless=True, on_loss="neighbors"
    ),
    "joining": Shape(workers=1, late_slots=4, steps=40, joiners_die=True),
    "rebalancing": Shape(
        stages=2, workers=5, nodes=5, layers=8, micro_batches=10, steps=24, tied=True, loses_nodes=True, rebalance_s=0.1
    ),
    "rebalancing, growing": Shape(
        stages=3, workers=3, late_slots=3, layers=9, micro_batches=10, steps=20, rebalance_s=0.05, speeds_change=True
    ),
    "rebalancing, replay": Shape(
        stages=3,
        workers=6,
        nodes=6,
        layers=8,
        micro_batches=9,
        steps=20,
        losses=2,
        protection="replay",
        drains=True,
        loses_nodes=True,
        rebalance_s=0.1,
        speeds_change=True,
    ),
    "rebalancing, saving": Shape(
        stages=2,
        workers=6,
        nodes=3,
        layers=7,
        micro_batches=8,
        steps=20,
        interval=3,
        loses_nodes=True,
        reckless=True,
        saves=True,
        saves_every=3,
        rebalance_s=0.1,
        speeds_change=True,
        late_slots=2,
    ),
    "rebalancing, costs": Shape(
        stages=3,
        workers=6,
        nodes=6,
        layers=9,
        micro_batches=10,
        steps=24,
        tied=True,
        loses_nodes=True,
        rebalance_s=0.1,
        costs_change=True,
        late_slots=1,
    ),
    "relayouts": Shape(stages=2, workers=4, layers=6, steps=24, tied=True, relayouts=True),
    "relayouts, 5 nodes": Shape(
        workers=5, nodes=5, layers=6, micro_batches=8, steps=24, drains=True, loses_nodes=True, relayouts=True
    ),
    "relayouts, replay": Shape(
        stages=3,
        workers=6,
        nodes=6,
        layers=8,
        micro_batches=9,
        steps=24,
        losses=2,
        protection="replay",
        loses_nodes=True,
        relayouts=True,
        rebalance_s=0.1,
        speeds_change=True,
        late_slots=1,
    ),
    "automatic stages": Shape(
        stages=0,
        layers=6,
        micro_batches=5,
        steps=24,
        late_slots=2,
        memory_bytes=2_000_000,  # of 2.8 MB: two stages at least
        rebalance_s=0.05,
        speeds_change=True,
    ),
    "automatic stages, 5 nodes": Shape(
        stages=0,
        workers=5,
        nodes=5,
        layers=6,
        micro_batches=7,
        steps=24,
        tied=True,
        drains=True,
        loses_nodes=True,
        memory_bytes=3_000_000,  # one stage does not fit
        rebalance_s=0.1,
        costs_change=True,
        relayouts=True,
    ),
    "spares": Shape(workers=3, nodes=3, steps=20, spares=2, loses_nodes=True),
    "spares, leaving": Shape(
        stages=2, workers=6, nodes=3, micro_batches=6, steps=20, spares=1, drains=True, loses_nodes=True
    ),
    "full disk": Shape(stages=2, workers=4, late_slots=1, steps=8, store_fails=True),
    "full checkpoint storage": Shape(
        stages=2, workers=4, late_slots=1, steps=12, saves=True, saves_every=2, disk_fills=True
    ),
    "full checkpoint storage, 3 nodes": Shape(
        workers=3,
        nodes=3,
        steps=14,
        interval=3,
        loses_nodes=True,
        reckless=True,
        saves=True,
        saves_every=3,
        resumes_at=2,
        disk_fills=True,
    ),
    "2 racks": Shape(stages=2, workers=4, nodes=4, steps=10, racks=2),
    "3 racks": Shape(workers=7, nodes=7, steps=10, losses=2, interval=3, tied=True, racks=3),
    "2 racks, replay": Shape(workers=4, nodes=4, steps=10, racks=2, protection="replay"),
    "full disk, 4 nodes": Shape(workers=4, nodes=4, steps=9, losses=2, drains=True, loses_nodes=True, store_fails=True),
}


@dataclass(frozen=True)
class Outcome:
    """The result of a simulated job."""

    seed: int
    why: str  # why it ended early; empty if training was completed
    broken: bool  # more was lost than the job must survive
    workers_died: int
    restarts: int  # number of coordinators that took over
    nodes_lost: int
    nodes_asked: int  # to leave
    nodes_left: int
    happenings: Counter[str]  # other faults, by kind
    virtual_s: float
    generations: int
    lost: tuple[str, ...]  # what a job that succeeded has not completed
    events: tuple[tuple[float, e.Event], ...]
    log: tuple[str, ...]


class SimulationFailed(AssertionError):
    """A seed under which a check failed; its message ends with the transcript."""


@functools.cache
def model(layers: int, tied: bool) -> ModelSpec:
    """A small model whose layers have several shards each."""
    row = 1 << 14
    parameters = [ParameterSpec(f"{i}.weight", (3 + i % 2, row), "float32", 4, (i,)) for i in range(layers)]
    parameters += [ParameterSpec(f"{i}.bias", (7,), "float32", 4, (i,)) for i in range(layers)]
    if tied:
        parameters.append(ParameterSpec("tied", (5, row), "float32", 4, (0, layers - 1)))
    return ModelSpec(tuple(1.0 + (i % 3) for i in range(layers)), tuple(parameters))


@functools.cache
def _expected(shape: Shape, steps: int) -> Reference:
    return reference(model(shape.layers, shape.tied), shape.micro_batches, steps)


@dataclass(frozen=True)
class Circumstances:
    """The meaning of a seed: the speeds, the faults, and the time of the last fault (virtual seconds)."""

    timing: Timing
    faults: tuple[Fault, ...]
    horizon_s: float
    late_s: float = 0.0  # when the late node of the shape joins


def circumstances(seed: int, shape: Shape) -> Circumstances:
    """The circumstances of a seed."""
    rng = random.Random(seed + 1)
    timing = Timing(
        slow=rng.choice((0.0, 0.05, 0.3)),
        duplicates=rng.choice((0.0, 0.1, 0.5)),
        startup_s=rng.choice(((0.001, 0.01), (0.02, 0.3), (0.3, 1.0))),
        forward_s=rng.choice((0.0005, 0.002, 0.01)),
        epilogue_s=rng.choice((0.0, 0.2, 2.0)),
    )
    horizon_s = rng.choice((0.5, 1.5, 4.0))
    faults = _faults(rng, shape, horizon_s)
    timing = replace(timing, slowest=shape.slowest)
    if shape.joiners_die:  # all of the late node join at once, early
        timing, horizon_s = replace(timing, slow=0.5, startup_s=(0.001, 0.01), forward_s=0.002), 1.0
    if shape.loses_nodes:
        timing = replace(timing, keeper_s=rng.choice(((0.0002, 0.002), (0.0005, 0.01), (0.005, 0.05))))
    return Circumstances(timing, tuple(faults), horizon_s, rng.uniform(0.2, horizon_s) if shape.late_slots else 0.0)


def simulate(seed: int, shape: Shape, *, faults: list[Fault] | None = None, timing: Timing | None = None) -> Outcome:
    """Run a job to its end, with the faults of the seed, or with these.

    Raises SimulationFailed if a check fails. Of a seed's own faults, the message names the smallest set under which the
    job still fails, with the transcript of that run.
    """
    drawn = circumstances(seed, shape)
    if faults is None and timing is None:
        try:
            return run(seed, shape, drawn)
        except SimulationFailed as error:
            fewest, failure = shrunk(seed, shape, drawn, error)
            raise SimulationFailed(f"{failure}\nthe fewest circumstances under which it fails: {fewest}") from error
    chosen = replace(drawn, timing=timing or drawn.timing)
    return run(seed, shape, chosen if faults is None else replace(chosen, faults=tuple(faults)))


def shrunk(
    seed: int, shape: Shape, found: Circumstances, failure: SimulationFailed
) -> tuple[Circumstances, SimulationFailed]:
    """Leave out one fault after another, and then the delays, as long as the job still fails."""
    simpler = [replace(found, faults=found.faults[:i] + found.faults[i + 1 :]) for i in range(len(found.faults))]
    if found.timing.slow or found.timing.duplicates:
        simpler.insert(0, replace(found, timing=replace(found.timing, slow=0.0, duplicates=0.0)))
    for candidate in simpler:
        try:
            run(seed, shape, candidate)
        except SimulationFailed as error:
            return shrunk(seed, shape, candidate, error)
    return found, failure


def run(seed: int, shape: Shape, around: Circumstances) -> Outcome:
    """Run a job to its end. Raises SimulationFailed, which names the seed, if a check fails."""
    world = World(seed)
    faults, horizon_s = list(around.faults), around.horizon_s
    spec = model(shape.layers, shape.tied)
    job = e.Job(
        steps=shape.steps,
        stages=shape.stages,
        micro_batches=shape.micro_batches,
        global_batch_size=shape.micro_batches,
        model=spec,
        node_losses=shape.losses,
        checkpoints=shape.saves,
        on_damage="older" if shape.damaged else "stop",
        protection=shape.protection,
        on_loss=shape.on_loss,
    )
    config = Config(
        min_nodes=1 if shape.drains else shape.nodes,
        max_nodes=shape.nodes + bool(shape.late_slots),
        spares=shape.spares,
        crash_limit=10**6,
        max_restarts=10**6,
        last_call_s=0.05,
        rebalance_after_s=shape.rebalance_s,
    )
    begun = None
    if shape.resumes_at:
        past = _expected(shape, shape.resumes_at)
        agreed = replace(Terms.of(past.agreements[-1]), protected=-1, every=max(1, shape.interval))
        begun = e.Saved(shape.resumes_at, "begun", agreed.to_text())
    saving = Saving(shape.saves_every, shape.damaged, begun)
    expected = _expected(shape, shape.steps)
    verify_every = 1 if shape.flips else 0
    cluster = Cluster(
        world,
        config,
        job,
        around.timing,
        expected,
        shape.interval,
        saving,
        verify_every,
        shape.racks,
        shape.memory_bytes,
    )
    if begun is not None:
        cluster.storage.begin_with(begun, dict(enumerate(past.states[-1])))
    if shape.leaves_at:
        cluster.leaves_alone = shape.alone >= 0
        cluster.leaves_at = lambda rank: shape.leaves_at if shape.alone in (-1, rank) else shape.steps
        cluster.ledger.ends_at(shape.leaves_at)
    cluster.restarts_until_s = horizon_s
    cluster.promise.deaths = any(type(fault) is Fault for fault in faults)
    injector = Injector(cluster, faults)
    slots = [shape.workers * (i + 1) // shape.nodes - shape.workers * i // shape.nodes for i in range(shape.nodes)]
    for number, count in enumerate(slots):
        cluster.join(f"node{number}", count)
    for number in range(shape.spares):
        world.after(0.3, functools.partial(cluster.join, f"spare{number}", slots[0]))
    if shape.late_slots:
        world.after(around.late_s, lambda: cluster.join("late", shape.late_slots))
    try:
        _run(world, cluster, injector, horizon_s)
    except Exception as error:
        tail = "\n".join(cluster.log[-60:])
        raise SimulationFailed(f"seed {seed}, {shape}: {type(error).__name__}: {error}\n{tail}") from error
    assert cluster.outcome is not None
    return Outcome(
        seed=seed,
        why="" if cluster.outcome.ending is Ending.AFTER_TRAINING else cluster.outcome.why,
        broken=cluster.promise.broken,
        workers_died=sum(isinstance(event, e.WorkerDied) for _, event in cluster.events),
        restarts=sum(isinstance(event, e.CoordinatorReturned) for _, event in cluster.events),
        nodes_lost=injector.struck,
        nodes_asked=injector.asked,
        nodes_left=cluster.released,
        happenings=_happenings(cluster),
        virtual_s=world.now,
        generations=cluster.state.generation,
        lost=cluster.outcome.lost,
        events=tuple(cluster.events),
        log=tuple(cluster.log),
    )


def _happenings(cluster: Cluster) -> Counter[str]:
    events = Counter(type(event) for _, event in cluster.events)
    counted = {
        "differing replicas found": events[e.CorruptionFound],
        "versions that were not whole": events[e.WorkerLacking],
        "damaged checkpoints": events[e.CheckpointUnreadable],
        "checkpoints saved": events[e.CheckpointSaved],
        "saves that failed": cluster.storage.refused,
        "shards made up": cluster.ledger.substituted,
        "relayouts": sum("relayout_prepared" in line for line in cluster.log),
        "rebalances": sum("rebalanced" in line for line in cluster.log),
    }
    return cluster.happenings + Counter(counted)


def _faults(rng: random.Random, shape: Shape, horizon_s: float) -> list[Fault]:
    drains = draw_drains(rng, horizon_s) if shape.drains else []
    if shape.joiners_die:
        return [*draw_joiners(rng), *draw(rng, shape.workers, horizon_s)[:1]]
    drains += draw_store_faults(rng, horizon_s) if shape.store_fails else []
    drains += draw_disk_faults(rng, horizon_s) if shape.disk_fills else []
    drains += draw_speeds(rng, horizon_s) if shape.speeds_change else []
    drains += draw_costs(rng, horizon_s) if shape.costs_change else []
    drains += draw_relayouts(rng, min(shape.workers, shape.layers), horizon_s) if shape.relayouts else []
    moves = shape.rebalance_s or shape.relayouts
    drains += draw_moves(rng, shape.losses if shape.loses_nodes else 0) if moves else []
    if shape.flips:  # a few deaths at a time, so that correct replicas are in the majority
        deaths = [replace(fault, victims=1) for fault in draw(rng, shape.workers, horizon_s)[:2]]
        return [*draw_flips(rng, horizon_s, shape.flips), *deaths]
    if shape.racks:
        return [*draw_racks(rng, horizon_s), *draw(rng, shape.workers, horizon_s)[: rng.randrange(3)]]
    if not shape.loses_nodes:
        return [*drains, *draw(rng, shape.workers, horizon_s)]
    deaths = draw(rng, shape.workers, horizon_s) if rng.random() < 0.5 else []
    losses = shape.losses + 1 if shape.reckless else shape.losses
    return [*drains, *draw_nodes(rng, losses, horizon_s, reckless=shape.reckless), *deaths]


def _run(world: World, cluster: Cluster, injector: Injector, horizon_s: float) -> None:
    while world.advance(max(horizon_s, injector.last_s) + BOUND_S):
        if cluster.outcome is not None and not cluster.outcome.succeeded:
            ending = cluster.outcome.ending
            if cluster.promise.broken and ending is Ending.TOO_MUCH_LOST and not cluster.state.saved:
                return
            if cluster.promise.broken and not cluster.state.nodes:
                return  # no node is left that could read a checkpoint
            if ending is Ending.AFTER_TRAINING or (cluster.leaves_alone and ending is Ending.LEFT_ALONE):
                return  # a script was lost between training and its end, or left the loop alone
            if not cluster.stays and ending is Ending.NO_NODE_STAYS:
                return  # the nodes that were to continue are lost, or leave, too
            raise AssertionError(f"the job failed: {cluster.outcome.why}")
        if cluster.outcome is not None and cluster.done():
            break
    if cluster.outcome is None:
        where = {
            str(w): (r.worker.version, r.worker.links.generation) for w, r in cluster.running.items() if not r.dead
        }
        raise AssertionError(f"no end within {BOUND_S:g} s after the last fault; {cluster.state.phase}, {where}")
    cluster.check_lost()
    layout = cluster.state.layout
    assert layout is not None
    members = [cluster.running[cluster.state.workers[rank].id] for rank in layout.ranks]
    cluster.ledger.ended([running.worker for running in members], went_back=cluster.state.rolled_back > 0)


def main(seeds: range, names: Sequence[str]) -> None:
    """Simulate the seeds of these shapes, or of all."""
    for name in names:
        if name not in SHAPES:
            sys.exit(f"there is no shape {name!r}; there are {', '.join(map(repr, SHAPES))}")
    total: Counter[str] = Counter()
    for name in names or SHAPES:
        found: Counter[str] = Counter()
        for seed in seeds:
            found["seeds"] += 1
            try:
                outcome = simulate(seed, SHAPES[name])
            except SimulationFailed as error:
                found["failed"] += 1
                sys.stdout.write(f"{name}: {error}\n")
                continue
            found["ended since too much was lost"] += bool(outcome.why)
            found["workers died"] += outcome.workers_died
            found["nodes lost or silent"] += outcome.nodes_lost
            found["nodes asked to leave"] += outcome.nodes_asked
            found["coordinators restarted"] += outcome.restarts
            found.update(outcome.happenings)
            found["recoveries and switches"] += outcome.generations
            found["virtual seconds"] += round(outcome.virtual_s)
        total += found
        sys.stdout.write(f"{name}: {_counts(found)}\n")
        sys.stdout.flush()
    sys.stdout.write(f"all: {_counts(total)}\n")


def _counts(found: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in found.items() if count)


if __name__ == "__main__":
    main(range(int(sys.argv[1]), int(sys.argv[2])), sys.argv[3:])
