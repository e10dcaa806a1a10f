"""The job's checkpoints as the coordinator knows them: the committed ones, and one more before a stop."""

from __future__ import annotations

from dataclasses import replace

from . import events as e
from .causes import Cause, Ending
from .outcome import (
    Effects,
    Outcome,
    current,
    end_with_loss,
    fail,
    last_version,
)
from .recovering import begin_recovery
from .spare_nodes import spare_leaves
from .state import Phase, State


def saved(state: State, event: e.CheckpointSaved, now: float) -> Outcome:
    """A checkpoint is committed and becomes the newest. A stop that waited for it takes effect now."""
    known = any(item.name == event.saved.name for item in state.saved)
    if current(state, event.worker) is None or known:
        return state, []
    newer = [item for item in state.saved if item.version >= event.saved.version]
    older = [item for item in state.saved if item.version < event.saved.version]
    state = replace(state, saved=(*newer, event.saved, *older)[: e.REMEMBERED_CHECKPOINTS])
    fields = {"version": event.saved.version, "name": event.saved.name, **event.fields}
    effects: Effects = [e.Record("checkpoint_saved", fields)]
    if state.stopping is not None and event.saved.version > state.stopping.committed:
        ends = end_with_loss if state.stopping.left else fail
        why = f"{state.stopping.why}; its state after {event.saved.version} steps is saved"
        state, ended = ends(state, state.stopping.ending, why)
        return state, [*effects, *ended]
    return state, effects


def unreadable(state: State, event: e.CheckpointUnreadable, now: float) -> Outcome:
    """The checkpoint to resume from is damaged: take the one before it, if the settings allow that."""
    job = state.job
    if current(state, event.worker) is None or not any(item.name == event.name for item in state.saved):
        return state, []
    assert job is not None
    record = e.Record("checkpoint_unreadable", {"name": event.name, "rank": event.worker.rank, "why": event.why})
    state = replace(state, saved=tuple(item for item in state.saved if item.name != event.name))
    if job.on_damage == "stop" or not state.saved:
        advice = (
            "there is no older one"
            if job.on_damage == "older"
            else "on_damage='older' would resume from the one before it"
        )
        state, effects = fail(state, Ending.CHECKPOINT_DAMAGED, f"{event.why} ({advice})")
        return state, [record, *effects]
    state, effects = begin_recovery(
        state, None, now, cause=Cause.CHECKPOINT_DAMAGED, why=f"checkpoint {event.name} is damaged"
    )
    assert state.recovery is not None
    state = replace(state, recovery=replace(state.recovery, ceiling=-1))  # no version is whole in any memory
    return state, [record, *effects]


def stop_requested(state: State, event: e.StopRequested, now: float) -> Outcome:
    """A stop is requested. It takes effect at once, or, where the job has checkpoints, after one more is saved."""
    if event.node in state.spares:
        return spare_leaves(state, event.node, event.why)
    job = state.job
    if job is None or not job.checkpoints or state.phase not in (Phase.RUNNING, Phase.RECOVERING):
        return fail(state, event.ending, event.why)
    if state.stopping is not None:
        return state, []
    if state.committed + 1 >= last_version(state):  # trained: a save in progress may be completed
        if any(item.version > state.committed for item in state.saved):
            return fail(state, event.ending, f"{event.why}; its state after {state.committed + 1} steps is saved")
        concluding = state.concluding
        if concluding is not None and concluding.name:
            deadline_s = min(concluding.deadline_s, now + state.config.stop_grace_s)
            state = replace(state, concluding=concluding._replace(deadline_s=deadline_s))
    deadline_s = now + state.config.stop_grace_s
    state = replace(state, stopping=e.Stopping(event.why, state.committed, deadline_s, event.ending))
    record = e.Record("stopping", {"why": event.why, "committed": state.committed})
    asked: Effects = [e.AskSave(worker.id) for worker in state.members()]
    told: Effects = [e.TellNode(node, f"{event.why}: saving a checkpoint before the job ends") for node in state.nodes]
    return state, [record, *asked, *told]


def give_up_saving(state: State, now: float) -> Outcome:
    """End the job when the grace of a stop is over."""
    stopping = state.stopping
    if stopping is None or now < stopping.deadline_s or state.phase is Phase.DONE:
        return state, []
    ends = end_with_loss if stopping.left else fail
    why = f"{stopping.why}; no checkpoint was saved in the {state.config.stop_grace_s:g} s there were"
    return ends(state, stopping.ending, why)
