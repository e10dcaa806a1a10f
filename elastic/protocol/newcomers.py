"""Workers that become ready: their descriptions of the job are compared.

At the start a difference ends the job. Once training has begun it only keeps the newcomer out: its script or data was
changed while the job ran, which must not disturb the members.
"""

from __future__ import annotations

from dataclasses import replace

from . import events as e
from .causes import Ending
from .outcome import Outcome, fail
from .state import State, Worker

_SETTINGS = (
    *("steps", "epochs", "last_batch", "stages", "micro_batches", "global_batch_size", "seed", "shuffle"),
    "loss_reduction",
)


def difference(state: State, theirs: e.Job, rank: int) -> str:
    """How a ready worker's description differs from the others', and what to do about it; empty if it is compatible.

    Once a job has committed a step, the initial values of the newcomer's model do not matter: it receives the job's.
    """
    ours = state.job
    assert ours is not None
    if state.layout is not None and state.agreed >= 0:
        theirs = replace(theirs, values=ours.values)
    if ours == theirs:
        return ""
    for name in _SETTINGS:
        mine, other = getattr(ours, name), getattr(theirs, name)
        if mine != other:
            return f"rank {rank} has {name} = {other}, the others {mine}: give every rank the same settings"
    if ours.samples != theirs.samples:
        return (
            f"the dataset has {theirs.samples} samples on rank {rank}, and {ours.samples} on the others: give every "
            "rank the same data, which does not change while the job runs"
        )
    if ours.sample_digests != theirs.sample_digests:
        return (
            "the first, the middle or the last sample of the dataset, or the order of its sampler, is another one on "
            f"rank {rank} than on the others: give every rank the same data in the same order (the runtime deals it to "
            "ranks), which does not change while the job runs"
        )
    if ours.model != theirs.model:
        names = [p.name for p in ours.model.parameters]
        others = [p.name for p in theirs.model.parameters]
        odd = sorted(set(names) ^ set(others))[:3]
        shown = f" (for example {', '.join(odd)})" if odd else ""
        return f"rank {rank} built a different model than the others{shown}: build the same model on every rank"
    if (ours.optimizer, ours.settings) != (theirs.optimizer, theirs.settings):
        there, here = (f"{job.optimizer} {job.settings}" for job in (theirs, ours))
        return (
            f"rank {rank} built a different optimizer than the others ({there}, not {here}): build the same one on "
            "every rank"
        )
    if ours.constants != theirs.constants:
        return (
            f"rank {rank} has different values in frozen parameters or buffers: use the same seed (or load "
            "the same weights) on every rank"
        )
    if ours.values != theirs.values:
        return (
            f"rank {rank} initialised its model with different values than the others: use the same seed (or load the "
            "same weights) on every rank"
        )
    return f"rank {rank} has different settings of protection or checkpoints: give every rank the same"


def refused(state: State, worker: Worker, why: str) -> Outcome:
    """Training has begun, and this newcomer is incompatible: it is killed, and its rank stays vacant."""
    rank, incarnation = worker.id
    others = {r: other for r, other in state.workers.items() if r != rank}
    record = e.Record("newcomer_refused", {"rank": rank, "node": worker.node, "why": why})
    if not others:
        state, effects = fail(state, Ending.RANKS_DIFFER, why, rank=rank)
        return state, [record, *effects]
    state = replace(state, workers=others, vacant={**state.vacant, rank: incarnation})
    return state, [record, e.KillWorkers(worker.node, (worker.id,))]
