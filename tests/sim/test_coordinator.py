"""The coordinator against golden transcripts, a simulated cluster with faults, and arbitrary orders of messages."""

from __future__ import annotations

import itertools
import random

import pytest

from everstep.elastic.protocol import coordinator, invariants
from everstep.elastic.protocol import events as e
from everstep.elastic.protocol import worker_events as w
from everstep.elastic.protocol.state import Config, Phase
from everstep.elastic.sim.cluster import Timing
from everstep.elastic.sim.faults import PHASES, Fault
from everstep.elastic.sim.run import (
    SHAPES,
    Shape,
    SimulationFailed,
    model,
    simulate,
)
from everstep.elastic.sim.values import reference
from everstep.elastic.sim.worker import SimWorker
from everstep.elastic.sim.world import Steps

from . import golden

SEEDS = range(30)
WORKERS_ONLY = [name for name, shape in SHAPES.items() if not (shape.loses_nodes or shape.drains or shape.rebalance_s)]


@pytest.mark.parametrize("script", golden.SCRIPTS, ids=lambda script: script.__name__)
def test_transcript(script) -> None:
    """`python -m tests.sim.golden` writes them."""
    expected = (golden.FOLDER / f"{script.__name__}.txt").read_text()
    assert script().text() == expected


@pytest.mark.parametrize("name", WORKERS_ONLY)
def test_seeds(name: str) -> None:
    """Random faults: the job ends, with the undisturbed run's bytes. A failing seed is named with its transcript."""
    for seed in SEEDS:
        simulate(seed, SHAPES[name])


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("1x4", 184),  # a rank that passed the agreement dies after others carried it out: they never go back behind it
        ("uneven", 33),  # the same
        ("1x4", 10),  # an abort between the arrival of a plan and the edit
        ("2x2", 79),  # the same
        ("2x2", 15),  # an abort between the last commit and the wait for the end
        ("uneven", 37),  # a joiner finishes before any member says that it switched
        ("growing", 1153),  # the same, with another worker ready
        ("growing", 19),  # a node joins while shards are fetched
        ("4x1", 911),  # the end during a recovery
    ],
)
def test_seeds_that_fail_when_a_guard_is_missing(name: str, seed: int) -> None:
    """Each fails, or once failed, without the guard that its comment names."""
    simulate(seed, SHAPES[name])


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", ["1x4", "2x2", "4x1", "uneven"])
def test_a_death_in_every_phase(name: str, phase: str) -> None:
    """One death starts a recovery; the next strikes in the phase, noticed at once or late."""
    for seed, detected_s in itertools.product(range(2), (0.003, 1.0)):
        first = Fault(victims=1, phase="reduce", after=5)
        second = Fault(victims=1, phase=phase, after=seed, detected_s=detected_s)
        simulate(seed, SHAPES[name], faults=[first, second])


@pytest.mark.parametrize("stages", [1, 2])
def test_ready_while_recovering(stages: int) -> None:
    """Replacements are ready before slow survivors have reported: the plan includes fresh members."""
    timing = Timing(startup_s=(0.0005, 0.004), forward_s=0.1, slow=0.3)
    shape = Shape(stages=stages, steps=4)
    fresh = 0
    for seed in range(15):
        faults = [Fault(victims=1 + seed % 3, phase="compute", after=4 + seed % 9, spread_s=0.02)]
        outcome = simulate(seed, shape, faults=faults, timing=timing)
        fresh += any("(planned)" in line and ".1 g" in line for line in outcome.log)
    assert fresh >= 10, "the case that this is about hardly came up"


@pytest.mark.parametrize("order", list(itertools.permutations(("report 0", "report 2", "ready 1", "ready 3"))))
def test_ready_in_every_order_relative_to_the_reports(order: tuple[str, ...]) -> None:
    s = golden.Script(workers=4)
    s.train()
    s.died(golden.w(1))
    s.died(golden.w(3))
    done = {"report": set(), "ready": set()}
    plan = None
    for item in order:
        kind, rank = item.split()
        if kind == "report":
            s.reported(golden.w(int(rank)), held=1)
        else:
            s.ready(golden.w(int(rank), 1))
        done[kind].add(int(rank))
        if plan is None and s.state.phase is Phase.RUNNING:
            plan, fresh = s.lines[-2], sorted(done["ready"])
            assert done["report"] == {0, 2}
            assert ("fresh " + ",".join(map(str, fresh)) in plan) if fresh else ("fresh" not in plan)
    assert plan is not None
    waiting = (
        {"ready 1", "ready 3"} - set(order[: order.index("report 0") + 1]) - set(order[: order.index("report 2") + 1])
    )
    assert (s.state.join is not None) == bool(waiting)


def test_arbitrary_orders_and_duplicates() -> None:
    """Messages of a whole simulated job, shuffled, repeated and dropped: no invariant breaks.

    What comes before there are workers or plans is illegal, and changes nothing.
    """
    for seed, name in itertools.product(range(6), ("1x4", "2x2", "growing")):
        history = [event for _, event in simulate(seed, SHAPES[name]).events]
        rng = random.Random(seed)
        for reach in (2, 10, 200, len(history)):
            order = sorted(range(len(history)), key=lambda i, reach=reach: i + rng.uniform(0, reach))
            events = [history[i] for i in order if rng.random() > 0.02 for _ in range(rng.choice((1, 1, 1, 2)))]
            _feed(events)


def _feed(events: list[e.Event]) -> None:
    config = Config(min_nodes=1, max_nodes=2, crash_limit=10**6, max_restarts=10**6, last_call_s=0.05)
    state = coordinator.initial_state(config, 0.0)
    for number, event in enumerate(events):
        before = state
        try:
            state, effects = coordinator.step(before, event, number * 0.001)
        except coordinator.IllegalJobEvent:
            assert before.phase in (Phase.FORMING, Phase.LAUNCHED), "once there was a plan, anything may come late"
            continue
        invariants.check_step(before, state, effects)


def test_a_seed_replays() -> None:
    first, second = (simulate(7, SHAPES["2x2"]) for _ in range(2))
    assert first.log == second.log
    assert first.virtual_s == second.virtual_s


def test_the_simulator_sees_wrong_bytes(monkeypatch) -> None:
    """A worker that adds an invented leaf is detected, and the failure names the seed."""
    run = SimWorker._run_optimizer

    def wrong(self: SimWorker, it: w.RunOptimizer) -> Steps[None]:
        if self.id == e.WorkerId(1, 0):
            self.gradients = {shard: gradient + "!" for shard, gradient in self.gradients.items()}
        yield from run(self, it)

    monkeypatch.setattr(SimWorker, "_run_optimizer", wrong)
    with pytest.raises(SimulationFailed, match=r"seed 3.*other bytes"):
        simulate(3, SHAPES["1x4"], faults=[])


def test_reference_depends_on_every_leaf() -> None:
    spec = SHAPES["1x4"]
    few, many = (reference(model(spec.layers, False), m, 2) for m in (3, 4))
    assert set(few.agreements).isdisjoint(many.agreements)
    assert set(few.states[-1]).isdisjoint(many.states[-1])
