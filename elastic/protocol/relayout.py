"""Another number of pipeline stages, as an operator asks for it, while training continues.

    asked -> a plan with so many stages is offered -> members copy ahead -> all enter it at a step boundary

A loss before any member has entered the plan is answered in the old layout, and then the plan is made and offered again
for the ranks that are there. If they can no longer form so many stages, the order is dropped, with an event.
"""

from __future__ import annotations

from dataclasses import replace

from everstep.resharding.layout import Layout, LayoutError
from everstep.resharding.moves import ahead
from everstep.resharding.plan import plan_switch
from everstep.resharding.relayout import relayout

from . import events as e
from .migrating import rebalanced
from .outcome import Outcome
from .protection import memory_needed, placement_for, too_small, worker_memory
from .recovering import carry_out
from .state import NOT_SEARCHED, Phase, State, Status


def why_not(state: State, stages: int) -> str:
    """Why an order for so many stages is refused, for the operator; empty if it is not. 0: the planner chooses."""
    return busy(state) or _impossible(state, stages)


def relayout_ordered(state: State, event: e.RelayoutOrdered, now: float) -> Outcome:
    """Offer the plan; the job may have changed since the order was taken."""
    why = why_not(state, event.stages)
    if why:
        return state, [e.Record("relayout_dropped", {"stages": event.stages, "why": why})]
    state = replace(state, plans_stages=not event.stages)
    if not event.stages:
        state, cost = rebalanced(state)  # of a switch that some members have yet to report
        return replace(state, balance=NOT_SEARCHED), cost
    if _has(state, event.stages):
        return state, []
    return relayout_due(replace(state, stages_asked=event.stages), now)


def relayout_due(state: State, now: float) -> Outcome:
    """Offer the plan that an operator has asked for, again after a loss, as soon as nothing else is under way."""
    stages, job, layout = state.stages_asked, state.job, state.layout
    if not stages or busy(replace(state, stages_asked=0)):
        return state, []
    assert job is not None
    assert layout is not None
    why = _impossible(state, stages)
    if why:
        return replace(state, stages_asked=0), [e.Record("relayout_dropped", {"stages": stages, "why": why})]
    plan = replace(plan_switch(job.model, layout, _target(state, stages)), lines=state.lines)
    if state.config.prefetch:
        plan = replace(plan, moves=ahead(plan.moves))
    state, cost = rebalanced(state)  # of a switch that some members have yet to report
    balance = NOT_SEARCHED._replace(offered=plan.generation)  # nothing was promised; what the switch costs is recorded
    fields = {"generation": plan.generation, "stages": stages, "layout": plan.layout.describe()}
    state, orders = carry_out(replace(state, generation=plan.generation, join=plan, balance=balance), plan)
    return state, [*cost, *orders, e.Record("relayout_prepared", fields)]


def busy(state: State) -> str:
    """What is under way, in which no relayout begins; empty if nothing is."""
    what = ""
    if state.stopping is not None or state.phase in (Phase.AFTER, Phase.DONE):
        return "the job is about to end"
    if state.layout is None or state.phase in (Phase.FORMING, Phase.LAUNCHED):
        what = "training has not begun"
    elif state.phase is Phase.RECOVERING or state.recovery is not None:
        what = "a recovery is under way"
    elif state.leaving:
        what = f"node {' and '.join(state.leaving)} hands over, to leave the job"
    elif state.stages_asked:
        what = f"a relayout to {state.stages_asked} stage(s) is under way"
    elif any(worker.status in (Status.STARTING, Status.READY) for worker in state.workers.values()):
        what = "workers join"
    elif state.join is not None:
        what = "a rebalance is under way"
    elif _ends_soon(state):
        return "the job is about to end"
    return f"{what}: try again when that is over" if what else ""


def _ends_soon(state: State) -> bool:
    assert state.job is not None
    return state.committed + 2 >= state.job.steps or any(worker.left >= 0 for worker in state.members())


def _impossible(state: State, stages: int) -> str:
    """Why this job, with the ranks that it has, cannot have so many stages; empty if it can."""
    job, layout = state.job, state.layout
    assert job is not None
    assert layout is not None
    if not stages:
        return f"the job has one stage only: {job.one_stage}" if job.one_stage else ""
    if _has(state, stages) and not state.plans_stages:
        return f"the job has {stages} stage(s) already"
    if stages > 1 and (why := job.one_stage):
        return f"the job has one stage only: {why}"
    try:
        target = _target(state, stages)
    except LayoutError as error:
        return str(error)
    lacks = worker_memory(state).lacking(target)
    return lacks or too_small(state, memory_needed(state, target, placement_for(state, target)))


def _has(state: State, stages: int) -> bool:
    """Whether the job is in so many stages, and returns to so many after a loss."""
    assert state.layout is not None
    return stages == len(state.layout.stages) == len(state.layout.home)


def _target(state: State, stages: int) -> Layout:
    assert state.job is not None
    assert state.layout is not None
    costs, speeds = state.costs, state.speeds
    return relayout(state.job.model, state.layout, stages, state.generation + 1, costs=costs, speeds=speeds)
