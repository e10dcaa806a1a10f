"""Members that leave while others continue: which ranks have left, and which of their reports still count."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from everstep.resharding.plan import Plan, Report

from .outcome import with_workers
from .state import State, Status, Worker


def left(state: State, ranks: Collection[int]) -> State:
    """These ranks are members no more: others have entered a generation without them."""
    leavers = [state.workers[rank] for rank in ranks if rank in state.workers]
    return with_workers(state, *(replace(worker, status=Status.LEFT, owes_end=False) for worker in leavers))


def concluded(state: State, ranks: Collection[int]) -> State:
    """These ranks, which have left, have no operation in progress any more, such as a part of a checkpoint."""
    leaving = dict(state.leaving)
    for worker in [state.workers[rank] for rank in ranks if rank in state.workers]:
        known = leaving.get(worker.node)
        if known is not None and worker.status is Status.LEFT and worker.id.rank not in known.concluded:
            leaving[worker.node] = known._replace(concluded=(*known.concluded, worker.id.rank))
    return replace(state, leaving=leaving)


def without_the_left(state: State, join: Plan | None, reports: list[Report]) -> tuple[State, list[Report]]:
    """The reports of members, after a switch that some may have entered and others not.

    Once one member has entered it, the ranks that its plan leaves out have left: the others may be many steps further.
    """
    if join is None or all(report.generation < join.generation for report in reports):
        return state, reports
    gone = {report.rank for report in reports if report.rank in join.leaving and report.generation < join.generation}
    return concluded(left(state, gone), gone), [report for report in reports if report.rank not in gone]


def still_needed(state: State, worker: Worker) -> bool:
    """Whether members may still wait for something from a rank that has left: until a step is committed without it."""
    return worker.status is Status.LEFT and worker.node in state.leaving and state.leaving[worker.node].since < 0


def nobody_left(state: State) -> str:
    """Why a job ends whose nodes all leave or are lost."""
    why = next((leaving.why for leaving in state.leaving.values()), "all members are lost")
    return f"{why}, and no node is left to continue"
