"""The worker's state machine by itself, and the page that describes all of them."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from everstep.elastic.protocol import agent, coordinator, events
from everstep.elastic.protocol import worker_events as w
from everstep.elastic.protocol.state import Config, Phase
from everstep.elastic.protocol.worker import HANDLED, LATE, IllegalEvent, step
from everstep.elastic.protocol.worker_state import TORN, WorkerPhase, WorkerState, new_worker, report, violations
from everstep.elastic.sim.run import model
from everstep.resharding.plan import plan_start
from everstep.resharding.planners import initial_layout

ROOT = Path(__file__).parents[2]
SPEC = model(4, False)
PLAN = plan_start(initial_layout(SPEC, [0, 1], 2, 4))


@pytest.fixture(scope="module")
def machines() -> ModuleType:
    """docs/machines.py, a script outside any package."""
    spec = importlib.util.spec_from_file_location("machines", ROOT / "docs" / "machines.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(machines) -> None:
    assert machines.PAGE.read_text() == machines.page(), "run python docs/machines.py"


def test_everything_on_the_page_is_described(machines) -> None:
    text = machines.page()
    for union in (events.Event, events.Effect, w.Event, w.Instruction, agent.Event, agent.Instruction):
        for kind in union.__args__:
            assert f"`{kind.__name__}`" in text
            line = machines._first_line(kind)
            assert line, kind
            assert not line.startswith(f"{kind.__name__}("), kind
    assert "|  |" not in text


def test_the_coordinators_table_is_sound() -> None:
    """Every event acts in some phase, no event acts after the end, and none is both handled and illegal."""
    handled, illegal = coordinator.HANDLED.keys(), coordinator.ILLEGAL
    assert {kind for _, kind in handled} == set(events.Event.__args__)
    assert not handled & illegal
    assert not any(phase is Phase.DONE for phase, _ in handled | illegal)
    assert all((Phase.FORMING, kind) in illegal for phase, kind in illegal), "what cannot be while forming comes later"


def test_what_cannot_happen_to_a_coordinator_is_named() -> None:
    state = coordinator.initial_state(Config(), 0.0)
    with pytest.raises(
        coordinator.IllegalJobEvent, match=r"forming in generation 0, .* WorkerSwitched cannot happen.*"
    ):
        coordinator.step(state, events.WorkerSwitched(events.WorkerId(0, 0), 1), 1.0)
    late = coordinator.step(replace(state, phase=Phase.DONE), events.WorkerSwitched(events.WorkerId(0, 0), 1), 1.0)
    assert late == (replace(state, phase=Phase.DONE), [])


def drive(state: WorkerState, *happened: w.Event) -> tuple[WorkerState, list[w.Instruction]]:
    instructions: list[w.Instruction] = []
    for event in happened:
        state, instructions = step(state, event)
        assert not violations(state)
    return state, instructions


def started() -> WorkerState:
    """Rank 0 of two stages, with step 0 to compute."""
    worker = new_worker(0, SPEC, 10)
    state, _ = drive(worker, w.Started(), w.Assigned(PLAN), w.Linked(), w.Restored(), w.Published())
    return state


def names(instructions: list[w.Instruction]) -> list[str]:
    return [type(instruction).__name__ for instruction in instructions]


def test_a_worker_starts() -> None:
    state, instructions = drive(new_worker(0, SPEC, 10), w.Started(), w.Assigned(PLAN), w.Linked())
    assert names(instructions) == ["TakeUnseen", "EnterProtection", "TakePlaces", "Restore"]
    assert instructions[-1].moves == (), "everything is there, made from the seed"
    state, _ = drive(state, w.Restored(), w.Published())
    assert state.phase is WorkerPhase.READY
    assert state.holding.layers == (0, 2)
    assert not state.fresh


def test_a_step() -> None:
    state, (compute,) = drive(started(), w.StepDue())
    assert compute == w.Compute(0, 3)
    state, instructions = drive(state, w.Computed(), w.Reduced(), w.Agreed('{"step": 0}'))
    assert names(instructions) == ["AdoptAgreement", "ForgetSnapshots", "RunOptimizer", "Publish"]
    assert (state.agreed, state.version, state.holding.owned_version, state.holding.values_version) == (0, 0, 1, TORN)
    state, instructions = drive(state, w.Published())
    assert names(instructions) == ["CommitStep", "BeginStep"]
    assert (state.version, state.holding.values_version) == (1, 1)


def test_a_pause_between_epochs() -> None:
    """It waits for the version and its parity, not for checkpoints. An abort in it is like another."""
    state, (wait,) = drive(started(), w.PauseDue())
    assert wait == w.WaitUntilWhole(protect=True, last=False)
    aborted, instructions = drive(state, w.Interrupted())
    assert names(instructions) == ["SendReport", "AwaitPlan"]
    assert aborted.phase is WorkerPhase.WAITING
    state, _ = drive(state, w.Concluded(), w.StepDue())
    assert state.phase is WorkerPhase.COMPUTING
    with pytest.raises(IllegalEvent, match="PauseDue"):
        step(state, w.PauseDue())


def test_what_was_not_completed_is_not_believed() -> None:
    """An abort while values are in transit: the agreement is passed, the version is not committed."""
    state, _ = drive(started(), w.StepDue(), w.Computed(), w.Reduced(), w.Agreed('{"step": 0}'))
    state, instructions = drive(state, w.Interrupted())
    assert names(instructions) == ["SendReport", "AwaitPlan"]
    told = report(state, None, protected=(0, -1), protected_before=(0, -1), outlives=-1)
    assert told.fresh, "without a step there is nothing to report"
    assert (state.agreed, state.version, state.holding.values_version) == (0, 0, TORN)


def test_an_answer_that_an_abort_overtook_is_late() -> None:
    state, _ = drive(started(), w.StepDue(), w.Interrupted())
    after, instructions = drive(state, w.Computed())
    assert (after, instructions) == (replace(state, late=1), [])


def test_what_cannot_happen_is_named_with_its_story() -> None:
    with pytest.raises(IllegalEvent, match=r"rank 0 is ready at version 0, where Reduced cannot happen.*Published"):
        step(started(), w.Reduced())
    with pytest.raises(IllegalEvent, match="SwitchDue"):
        step(started(), w.SwitchDue())


def test_the_table_is_sound() -> None:
    """Every event is handled somewhere, every phase but the first can be aborted, and none is both."""
    assert {kind for _, kind in HANDLED} == set(w.Event.__args__)
    assert not LATE & HANDLED.keys()
    for phase in WorkerPhase:
        assert ((phase, w.Interrupted) in HANDLED) == (phase is not WorkerPhase.NEW)
        assert any(at is phase for at, _ in HANDLED)


def test_values_that_the_script_has_changed_are_not_reported() -> None:
    state, _ = drive(started(), w.Spoiled())
    assert (state.holding.owned, state.holding.values_version) == (frozenset(), TORN)


def test_broken_invariants_are_named() -> None:
    state = started()
    broken = replace(state, holding=replace(state.holding, owned_version=3))
    assert violations(broken) == [
        "the owned shards are of version 3 at version 0",
        "the owned shards are of version 3 at version 0",
    ]
    assert violations(replace(state, agreed=5)) == ["the last agreed step is 5 at version 0"]
