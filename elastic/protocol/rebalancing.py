"""Rebalancing: once a layout has lasted for a while, the members go to a faster one, at a step boundary.

A loss is answered at once, by the layout that moves least. Most losses are over in a second, when the replacement has
joined. Where none comes, or more ranks came than there were, or ranks differ in speed, `rebalance` finds what is best
for the ranks that are there, and the members switch as they do for a join: no step is aborted or computed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from everstep.resharding.forecast import Costs
from everstep.resharding.moves import ahead
from everstep.resharding.plan import plan_switch
from everstep.resharding.rebalance import rebalance
from everstep.resharding.stages import restage

from . import events as e
from .outcome import Outcome
from .protection import worker_memory
from .recovering import carry_out
from .state import NOT_SEARCHED, Phase, State, Status

SPEED_CHANGED = 0.1  # by which a speed has to change before another search
COSTS_CHANGED = 0.1  # of all layers' costs: by which they have to change, taken together
MOST_PATIENCE = 32
UNMEASURED_STEPS = 4  # of a layout, before costs are assumed: until then they are mostly measured


def differ(speeds: Mapping[int, float], known: Mapping[int, float]) -> bool:
    """Whether a rank's speed has changed by so much that it matters; it is 1 where none is given."""
    ranks = speeds.keys() | known.keys()
    return any(abs(speeds.get(rank, 1.0) / known.get(rank, 1.0) - 1) >= SPEED_CHANGED for rank in ranks)


def costs_differ(costs: Costs, known: Costs) -> bool:
    """Whether the layers cost something else by so much that it matters."""
    pairs = zip((*costs.forward, *costs.backward), (*known.forward, *known.backward), strict=True)
    return sum(abs(cost - before) for cost, before in pairs) >= COSTS_CHANGED * sum(known.total)


def costs_measured(state: State, event: e.CostsMeasured, now: float) -> Outcome:
    """Use these costs from now on, and search again if their proportions differ from those that were used before."""
    job, costs = state.job, event.costs
    if job is None or state.layout is None or len(costs.forward) != job.model.layers:
        return state, []
    known = state.costs or Costs.of(job.model)
    again = costs_differ(costs.scaled(1.0), known.scaled(1.0))
    balance = state.balance._replace(searched=state.balance.searched and not again)
    return replace(state, costs=costs, balance=balance), []


def speeds_measured(state: State, event: e.SpeedsMeasured, now: float) -> Outcome:
    """Search again if a rank has become slower or faster."""
    if state.layout is None:
        return state, []
    known = {rank: speed for rank, speed in event.speeds.items() if rank in state.layout}
    if not differ(known, state.speeds):
        return state, []
    return replace(state, speeds=known, balance=state.balance._replace(searched=False)), []


def rebalance_due(state: State, now: float) -> Outcome:
    """Offer a plan for a faster layout, if this one has lasted and there is one."""
    job, layout, after_s, balance = state.job, state.layout, state.config.rebalance_after_s, state.balance
    if not after_s or job is None or layout is None or not _quiet(state):
        return state, []
    if balance.generation != layout.generation:  # the layout has changed since: its time begins
        kept = balance if balance.offered == layout.generation else NOT_SEARCHED
        began = kept._replace(generation=layout.generation, since_s=now, since_step=state.committed, searched=False)
        return replace(state, balance=began), []
    steps = state.committed - balance.since_step
    lasts_s = after_s if balance.promised else after_s * balance.patience
    least = UNMEASURED_STEPS if state.costs is None and len(layout.stages) > 1 else 1
    if balance.searched or now - balance.since_s < lasts_s or steps < least:
        return state, []
    step_s = (now - balance.since_s) / steps
    if balance.promised:
        return _judged(state, step_s)
    state = replace(state, balance=balance._replace(searched=True))
    search = restage if state.plans_stages else rebalance
    memory, generation = worker_memory(state), state.generation + 1
    found = search(job.model, layout, generation, costs=state.costs, speeds=state.speeds, memory=memory)
    if found is None:
        return state, []
    plan = replace(plan_switch(job.model, layout, found.layout), lines=state.lines)
    if state.config.prefetch:
        plan = replace(plan, moves=ahead(plan.moves))
    balance = state.balance._replace(
        offered=plan.generation, promised=found.gain, step_s=step_s, forecast_s=found.after if state.costs else 0.0
    )
    fields = {"generation": plan.generation, "layout": plan.layout.describe(), "why": found.why(), "gain": found.gain}
    fields |= _measured(state, found.after)
    state, orders = carry_out(replace(state, generation=plan.generation, join=plan, balance=balance), plan)
    return state, [*orders, e.Record("rebalance_prepared", fields)]


def _measured(state: State, forecast_s: float) -> dict[str, Any]:
    """What a forecast was made of, if the costs were measured: only then it is in seconds."""
    costs = state.costs
    if costs is None:
        return {}
    speeds = {str(rank): round(speed, 3) for rank, speed in state.speeds.items()}
    forward_s, backward_s = ([round(cost, 7) for cost in each] for each in (costs.forward, costs.backward))
    return {"forecast_s": forecast_s, "forward_s": forward_s, "backward_s": backward_s, "speeds": speeds}


def _judged(state: State, step_s: float) -> Outcome:
    """A layout that was promised to be faster has lasted: say what it saves.

    One that saves less than half of what was promised is not searched further, until ranks or speeds change: the next
    promise would be as good as this one. Where speeds change all the time, as on machines that others use too, a layout
    has to last longer after each promise that was broken.
    """
    balance = state.balance
    saved = 1 - step_s / balance.step_s
    fields = {"generation": balance.generation, "promised": balance.promised, "saved": saved, "step_s": step_s}
    if balance.forecast_s:
        fields["forecast_s"] = balance.forecast_s
    broken = saved < balance.promised / 2
    patience = min(MOST_PATIENCE, balance.patience * 4) if broken else max(1, balance.patience // 2)
    balance = balance._replace(promised=0.0, searched=broken, patience=patience)
    return replace(state, balance=balance), [e.Record("rebalance_measured", fields)]


def _quiet(state: State) -> bool:
    """Whether the members train, and no member is about to join or leave."""
    assert state.job is not None
    busy = state.join is not None or state.recovery is not None or state.leaving or state.stopping is not None
    coming = any(w.status in (Status.STARTING, Status.READY) for w in state.workers.values())
    ending = state.committed + 2 >= state.job.steps or any(w.left >= 0 for w in state.members())
    return state.phase is Phase.RUNNING and not busy and not coming and not ending
