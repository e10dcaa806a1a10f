"""One simulated job from one seed: `simulate(seed, ...)`; `python -m everstep.elastic.sim.run 1000` runs many."""

from __future__ import annotations

import functools
import random
import sys
from dataclasses import dataclass

from ...resharding.units import ModelSpec, ParameterSpec
from ..protocol import events as e
from ..protocol.state import Config
from .cluster import Cluster, Timing
from .faults import Fault, Injector, draw
from .values import Reference, reference
from .world import World

BOUND_S = 60.0  # of virtual time, after the last fault: by then a job has reached its end


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The job that is simulated."""

    stages: int = 1
    workers: int = 4
    nodes: int = 1
    layers: int = 4
    micro_batches: int = 4
    steps: int = 6
    tied: bool = False
    late_slots: int = 0  # of a second node that comes while the job runs


SHAPES = {
    "1x4": Shape(),
    "2x2": Shape(stages=2, tied=True),
    "4x1": Shape(stages=4, micro_batches=6),
    "uneven": Shape(stages=2, workers=3, layers=5, micro_batches=7, tied=True),
    "growing": Shape(stages=2, workers=2, late_slots=2),
    "two nodes": Shape(workers=4, nodes=2, micro_batches=8),
    "alone": Shape(workers=1, layers=2, steps=4),
}


@dataclass(frozen=True)
class Outcome:
    """How a simulated job went."""

    seed: int
    succeeded: bool
    virtual_s: float
    generations: int
    events: tuple[tuple[float, e.Event], ...]
    log: tuple[str, ...]


class SimulationFailed(AssertionError):
    """A seed under which something went wrong; its message ends with the transcript."""


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
def _expected(shape: Shape) -> Reference:
    return reference(model(shape.layers, shape.tied), shape.micro_batches, shape.steps)


def simulate(seed: int, shape: Shape, *, faults: list[Fault] | None = None, timing: Timing | None = None) -> Outcome:
    """Run a job to its end. Raises SimulationFailed, which names the seed, if anything does not hold."""
    world = World(seed)
    rng = random.Random(seed + 1)
    spec = model(shape.layers, shape.tied)
    job = e.Job(
        steps=shape.steps,
        stages=shape.stages,
        micro_batches=shape.micro_batches,
        global_batch_size=shape.micro_batches,
        model=spec,
    )
    config = Config(
        min_nodes=shape.nodes,
        max_nodes=shape.nodes + bool(shape.late_slots),
        crash_limit=10**6,
        max_restarts=10**6,
        last_call_s=0.05,
    )
    timing = timing or Timing(
        slow=rng.choice((0.0, 0.05, 0.3)),
        duplicates=rng.choice((0.0, 0.1, 0.5)),
        startup_s=rng.choice(((0.001, 0.01), (0.02, 0.3), (0.3, 1.0))),
        forward_s=rng.choice((0.0005, 0.002, 0.01)),
        epilogue_s=rng.choice((0.0, 0.2, 2.0)),
    )
    cluster = Cluster(world, config, job, timing, _expected(shape))
    horizon_s = rng.choice((0.5, 1.5, 4.0))
    injector = Injector(cluster, draw(rng, shape.workers, horizon_s) if faults is None else faults)
    slots = [shape.workers * (i + 1) // shape.nodes - shape.workers * i // shape.nodes for i in range(shape.nodes)]
    for number, count in enumerate(slots):
        cluster.join(f"node{number}", count)
    if shape.late_slots:
        world.after(rng.uniform(0.2, horizon_s), lambda: cluster.join("late", shape.late_slots))
    try:
        _run(world, cluster, injector, horizon_s)
    except Exception as error:
        tail = "\n".join(cluster.log[-60:])
        raise SimulationFailed(f"seed {seed}, {shape}: {type(error).__name__}: {error}\n{tail}") from error
    log = tuple(cluster.log)
    return Outcome(seed, True, world.now, cluster.state.generation, tuple(cluster.events), log)


def _run(world: World, cluster: Cluster, injector: Injector, horizon_s: float) -> None:
    while world.advance(max(horizon_s, injector.last_s) + BOUND_S):
        if cluster.outcome is not None and not cluster.outcome.succeeded:
            raise AssertionError(f"the job failed: {cluster.outcome.why}")
        if cluster.outcome is not None and cluster.done():
            break
    if cluster.outcome is None:
        where = {
            str(w): (r.worker.version, r.worker.links.generation) for w, r in cluster.running.items() if not r.dead
        }
        raise AssertionError(f"no end within {BOUND_S:g} s after the last fault; {cluster.state.phase}, {where}")
    layout = cluster.state.layout
    assert layout is not None
    members = [cluster.running[cluster.state.workers[rank].id] for rank in layout.ranks]
    cluster.ledger.ended([running.worker for running in members])


def main(count: int) -> None:
    """Simulate `count` seeds of every shape."""
    failed = 0
    for name, shape in SHAPES.items():
        for seed in range(count):
            try:
                simulate(seed, shape)
            except SimulationFailed as error:
                failed += 1
                sys.stdout.write(f"{name}: {str(error).splitlines()[0]}\n")
    sys.stdout.write(f"{failed} of {count * len(SHAPES)} failed\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
