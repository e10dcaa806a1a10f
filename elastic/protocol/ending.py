"""The end of training. All ranks leave the loop at the same step; if only some leave, the job fails.

    left the loop -> finished -> the last checkpoint, if incomplete, is attempted once more -> after training

No rank trains beyond the step at which the first one left.
"""

from __future__ import annotations

from dataclasses import replace

from . import events as e
from .after import training_over
from .causes import Ending
from .outcome import (
    Effects,
    Outcome,
    current,
    end_with_loss,
    last_version,
    ranks_text,
    with_workers,
)
from .state import (
    Concluding,
    Phase,
    State,
    Status,
    Worker,
)

ALONE_S = 1.0  # until a rank that left its loop alone is an error: it may be about to report an exception
ALL_LEAVE = (
    "all ranks have to leave the loop at the same step: base the decision on values that are equal on all of them, "
    "such as the step's loss, or call run.stop('why') in place of break, which ends all after the same step"
)


# ---------------------------------------------------------------- leaving the loop


def left(state: State, event: e.WorkerLeft, now: float) -> Outcome:
    """The user's code has left the loop on one rank. The other ranks are notified, so that none waits for it."""
    worker = current(state, event.worker)
    if worker is None or worker.left >= 0 or worker.status not in (Status.READY, Status.MEMBER):
        return state, []
    return _note_left(state, worker, event.version, event.name, now)


def _note_left(state: State, worker: Worker, version: int, name: str, now: float) -> Outcome:
    assert state.job is not None
    version = state.job.steps if version < 0 else version
    news = version < state.job.steps and worker.left < 0
    state = with_workers(state, replace(worker, left=version, left_s=now, last_name=name or worker.last_name))
    told: Effects = [e.TellLeft(w.id, version) for w in state.members() if w.id != worker.id] if news else []
    state, effects = went_on_alone(state, now)
    return state, [*told, *effects]


def finished(state: State, event: e.WorkerFinished, now: float) -> Outcome:
    """The user's function has returned: this rank serves the others until all have finished."""
    worker = current(state, event.worker)
    assert worker is not None
    returned = replace(worker, status=Status.FINISHED, owes_end=False)
    return _note_left(state, returned, event.version, event.name, now)


def went_on(state: State, event: e.WorkerWentOn, now: float) -> Outcome:
    """A rank waits in a step for one that left the loop before that step."""
    worker = current(state, event.worker)
    if worker is None or worker.status is not Status.MEMBER:
        return state, []
    return went_on_alone(with_workers(state, replace(worker, begun=max(worker.begun, event.step))), now)


def went_on_alone(state: State, now: float) -> Outcome:
    """Whether some ranks left the loop and others did not: then training ends at their common step, with an error."""
    if state.phase is not Phase.RUNNING or state.concluding is not None or recovering(state):
        return state, []
    members = state.members()
    gone = [w for w in members if w.left >= 0]
    version = min((w.left for w in gone), default=-1)
    others = [w for w in members if w.left != version and max(w.begun, w.left) >= version]
    if not gone or not others or any(w.status is Status.MEMBER and now - w.left_s < ALONE_S for w in gone):
        return state, []
    assert state.job is not None
    leavers, stayers = ([w.id.rank for w in some] for some in ([w for w in gone if w.left == version], others))
    where = f"after step {version - 1}" if version else "before the first step"
    alone = f"{ranks_text(leavers)} left the training loop {where} of {state.job.steps}"
    alone = f"{alone}, and {ranks_text(stayers)} continued: {ALL_LEAVE}"
    state = replace(state, concluding=Concluding(version, "", 0.0, alone))
    record = e.Record("left_alone", {"ranks": leavers, "others": stayers, "step": version - 1})
    state, effects = _conclude(state, version, now)
    return state, [record, *effects]


# ---------------------------------------------------------------- the last checkpoint


def recovering(state: State) -> bool:
    """Whether some member has not carried out the recovery's plan yet."""
    recovery = state.recovery
    return recovery is not None and any(w.id not in recovery.resumed for w in state.members())


def end_if_finished(state: State, effects: Effects, now: float) -> Outcome:
    """End training once all ranks have finished and every recovery is complete."""
    waits = state.phase is not Phase.RUNNING or state.job is None or recovering(state) or state.concluding is not None
    if waits or not all_finished(state):
        return state, effects
    version = last_version(state)
    if state.rolled_back and state.committed + 1 < version:
        return state, effects  # the members compute the last steps again
    state, more = _conclude(state, version, now)
    return state, [*effects, *more]


def all_finished(state: State) -> bool:
    """Whether the user's function has returned on every rank, even if its replacement has yet to reach that point."""
    return not any(
        w.status is Status.MEMBER
        or w.owes_end
        or (w.status in (Status.STARTING, Status.READY) and w.id.incarnation and w.node not in state.leaving)
        for w in state.workers.values()
    )


def _saved(state: State, version: int) -> bool:
    return version == 0 or any(saved.version >= version for saved in state.saved)


def _conclude(state: State, version: int, now: float) -> Outcome:
    """Have the last checkpoint saved if it is incomplete; otherwise continue to the phase after training."""
    assert state.job is not None
    members = state.members()
    names = [w.last_name for w in members if w.left == version and w.last_name]
    if not state.job.checkpoints or _saved(state, version) or not names:
        return _concluded(state, version)
    alone = state.concluding.alone if state.concluding is not None else ""
    name = f"{names[0]}{state.generation:x}"  # each attempt has its own name, so that their files do not mix
    concluding = Concluding(version, name, now + state.config.last_save_s, alone)
    record = e.Record("last_save", {"version": version, "name": name})
    return replace(state, concluding=concluding), [record, *(e.Conclude(w.id, version, name) for w in members)]


def concluded(state: State, event: e.WorkerConcluded, now: float) -> Outcome:
    """A rank has completed its part of the last checkpoint, or could not."""
    concluding = state.concluding
    if concluding is None or event.name != concluding.name or current(state, event.worker) is None:
        return state, []
    told = (*concluding.told, event.worker)
    concluding = concluding._replace(told=told, why=concluding.why or event.why)
    state = replace(state, concluding=concluding)
    if any(w.id not in told for w in state.members()):
        return state, []
    return _concluded(state, concluding.version)


def give_up_concluding(state: State, now: float) -> Outcome:
    """Stop waiting for the last checkpoint."""
    concluding = state.concluding
    if concluding is None or not concluding.name or now < concluding.deadline_s or state.phase is Phase.DONE:
        return state, []
    waited = [w.id.rank for w in state.members() if w.id not in concluding.told]
    why = concluding.why or f"{ranks_text(waited)} did not get it done in {state.config.last_save_s:g} s"
    return _concluded(replace(state, concluding=concluding._replace(why=why)), concluding.version)


def _concluded(state: State, version: int) -> Outcome:
    """The last checkpoint is as complete as it can be: end training, and report what is not saved."""
    assert state.job is not None
    concluding = state.concluding
    unsaved = ""
    if state.job.checkpoints and not _saved(state, version):
        newest = f"the newest checkpoint is of {state.saved[0].version} steps" if state.saved else "there is none"
        why = concluding.why if concluding is not None and concluding.why else "it did not get whole"
        unsaved = f"the state after {version} steps is not saved ({why}); {newest}"
    if concluding is not None and concluding.alone:
        is_saved = f"; the state after {version} steps is saved" if state.job.checkpoints and version else ""
        why = concluding.alone + (f"; {unsaved}" if unsaved else is_saved)
        return end_with_loss(state, Ending.LEFT_ALONE, why)
    return training_over(replace(state, lost=(*state.lost, unsaved) if unsaved else state.lost), version)
