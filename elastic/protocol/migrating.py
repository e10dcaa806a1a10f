"""The cost of a rebalance: how long members stood still when they entered it, and what was moved before and then."""

from __future__ import annotations

from dataclasses import replace

from everstep.resharding.layout import Layout

from . import events as e
from .outcome import Effects, Outcome
from .state import Phase, State, Switched


def entered(state: State, event: e.WorkerSwitched) -> Outcome:
    """A member has entered a faster layout: when all have, say what that cost."""
    layout, balance = state.layout, state.balance
    if layout is None or state.phase is not Phase.RUNNING:
        return state, []
    if not event.generation == layout.generation == balance.offered:
        return state, []
    found = Switched(event.worker.rank, event.switch_s, event.prefetched, event.moved)
    switched = (*(item for item in balance.switched if item.rank != found.rank), found)
    state = replace(state, balance=balance._replace(switched=switched))
    return rebalanced(state) if len(switched) == len(layout.ranks) else (state, [])


def still_asked(stages: int, layout: Layout) -> int:
    """The number of stages that an operator asked for, until the members are in such a layout; 0 from then on."""
    return 0 if stages == len(layout.stages) == len(layout.home) else stages


def rebalanced(state: State) -> tuple[State, Effects]:
    """Record a rebalance, if members have entered one that is not recorded yet: all of them, or until a loss."""
    layout, balance = state.layout, state.balance
    if layout is None or not balance.switched:
        return state, []
    fields = {
        "generation": layout.generation,
        "layout": layout.describe(),
        "stall_s": max(item.seconds for item in balance.switched),
        "prefetched_bytes": sum(item.prefetched for item in balance.switched),
        "moved_bytes": sum(item.moved for item in balance.switched),
    }
    return replace(state, balance=balance._replace(switched=())), [e.Record("rebalanced", fields)]
