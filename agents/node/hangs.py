"""Finds hung workers of a node: reads their progress pages, and /proc for workers whose progress has stopped.

`elastic/protocol/liveness.py` decides what is a hang, `elastic/protocol/agent.py` what is done about it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection

from everstep.comms.control import telemetry_pb2 as pb
from everstep.elastic.contract.notices import Notice
from everstep.elastic.contract.progress import Reading, StepPhase
from everstep.elastic.protocol.agent_events import WorkerHung, WorkerMoved
from everstep.elastic.protocol.liveness import (
    RULES,
    SLEPT_S,
    Hangs,
    Pace,
    Patience,
    Sign,
    Verdict,
    judge,
    stalled_together,
)

from . import vitals
from .workers import WorkerProcess

LOOK_S = 0.4  # time without progress before /proc is read; then the interval of reads, which grows
USUAL_RATIO = 1.2  # of the longest pause so far: a pause that is not longer needs no look
LOOK_RATIO, MOST_LOOK_S = 0.05, 5.0  # ... with the time without progress
WARNED_S = 10.0  # a limit that is shorter strikes without a warning
STACKS_KEPT = 8192  # letters, for the event log; standard error gets all that were read
STATES_S = 0.5  # interval of reports on what the workers do
STATES = 64  # of so many


class HangWatch:
    """Polls the workers of a node. `warn` informs the coordinator, `happened` the agent's machine."""

    def __init__(
        self,
        floor_s: float,
        user_s: float,
        warn: Callable[[WorkerProcess, Notice, str], None],
        happened: Callable[[WorkerHung | WorkerMoved], None],
    ) -> None:
        self._patience = Patience(floor_s, user_s)
        self._warn = warn
        self._happened = happened
        self._hangs: dict[int, Hangs] = {}  # of ranks
        self._first_s = 0.0  # the longest pause in first steps that workers of this node have done
        self._looked_s = 0.0
        self.states: tuple[pb.RankState, ...] = ()  # what the workers do; read from other threads
        self._states_s = 0.0

    def look(self, readings: Collection[tuple[WorkerProcess, Reading]], now: float) -> None:
        """Judge the workers once, by what their pages show now."""
        slept_s = now - self._looked_s if self._looked_s else 0.0
        self._looked_s = now
        trains = [(w, reading) for w, reading in readings if not w.fenced and reading.phase is not StepPhase.AFTER]
        for worker, reading in trains:
            if slept_s > SLEPT_S:
                worker.pulse = worker.pulse.slept(slept_s)
            worker.pulse = worker.pulse.read(reading.counter, now, reading.pace)
        begun = [(worker, reading) for worker, reading in trains if worker.pulse.counter > 0]
        shared = _stalled(begun, now)
        for worker, reading in begun:
            self._look_at(worker, reading, now, shared=shared)
        if now - self._states_s >= STATES_S:
            self._states_s = now
            self.states = tuple(_state(worker, reading, now) for worker, reading in begun[:STATES])

    def _look_at(self, worker: WorkerProcess, reading: Reading, now: float, *, shared: bool) -> None:
        rank, pulse = worker.id.rank, worker.pulse
        hangs = self._hangs[rank] = self._hangs.get(rank, Hangs()).read(reading.step, reading.pace)
        if now - pulse.changed_s < LOOK_S:
            if pulse.pace is Pace.STEADY:
                self._first_s = max(self._first_s, pulse.pauses[Pace.FIRST])
            if worker.verdict is not None and worker.verdict.hung:
                self._happened(WorkerMoved(worker.id))
            worker.moves()
            return
        patience = Patience(self._patience.floor_s, self._patience.user_s, self._first_s, shared, hangs.times)
        if now - pulse.changed_s >= patience.usual_s(pulse, USUAL_RATIO):
            self._look_for_life(worker, now)
        worker.verdict = verdict = judge(worker.pulse, now, patience)
        if verdict.hung:
            stopped = worker.pulse.sign is Sign.STOPPED
            self._happened(WorkerHung(worker.id, stopped=stopped, stacks=worker.has_stacks()))
        elif not worker.warned and verdict.limit_s >= WARNED_S and verdict.still_s > verdict.limit_s / 2:
            worker.warned = True
            self._warn(worker, Notice.NO_PROGRESS, f"rank {rank}: {no_progress(worker, reading, verdict)}")

    def _look_for_life(self, worker: WorkerProcess, now: float) -> None:
        pulse = worker.pulse
        often_s = min(MOST_LOOK_S, max(LOOK_S, LOOK_RATIO * (now - pulse.changed_s)))
        if now - worker.looked_s >= often_s:
            worker.looked_s = now
            worker.pulse = pulse.seen(worker.vitals.look(now), now)

    def kill(self, worker: WorkerProcess) -> None:
        """Kill a worker that hangs, and keep the stacks that it has written."""
        reading, verdict = worker.reading(), worker.verdict
        assert verdict is not None
        rank, place = worker.id.rank, place_of(reading)
        worker.hang = "alive" if verdict.lived else "silent"
        last = {Sign.WORKS: ", though it works", Sign.STORAGE: ", waiting for storage", Sign.STOPPED: ", stopped"}
        cause = f"hung: no progress for {verdict.still_s:.1f} s in {place}{last.get(worker.pulse.sign, '')}"
        waits = vitals.describe(worker.pid)
        stacks = worker.read_stacks() or "its Python stacks could not be read\n"
        worker.stacks = f"{stacks[:STACKS_KEPT]}{waits}"[: 2 * STACKS_KEPT]
        print(f"everstep: rank {rank} is killed: {cause}\n{stacks}{waits}", file=sys.stderr, flush=True)
        worker.kill(cause)
        self._hangs[rank] = hangs = self._hangs[rank].again(reading.step)
        if verdict.lived:
            text = (
                f"rank {rank} was killed after {verdict.still_s:.0f} s without progress in {place}, though it showed "
                f"signs of life; its replacement has {2**hangs.times} times as long. If its work takes that long, call "
                "run.heartbeat() in it, or raise --es-user-timeout (in the user's code) or --es-hang-timeout"
            )
            self._warn(worker, Notice.HUNG_ALIVE, text)


def _stalled(begun: Collection[tuple[WorkerProcess, Reading]], now: float) -> bool:
    standing = [worker.pulse.pace for worker, _ in begun if now - worker.pulse.changed_s >= LOOK_S]
    rest = [reading for worker, reading in begun if now - worker.pulse.changed_s < LOOK_S]
    return stalled_together(standing, all(reading.waits is not None for reading in rest))


def place_of(reading: Reading) -> str:
    """Where a worker is."""
    if reading.pace in (Pace.FIRST, Pace.STEADY):
        return f"{StepPhase(reading.phase).name.lower()} of step {reading.step}"
    place = RULES[reading.pace].place
    return place if reading.pace is Pace.FREE else f"{place} in step {reading.step}"


def no_progress(worker: WorkerProcess, reading: Reading, verdict: Verdict) -> str:
    signs = {Sign.WORKS: "it works", Sign.STORAGE: "it waits for storage", Sign.STOPPED: "it is stopped"}
    sign = signs.get(worker.pulse.sign, "no sign of life")
    return (
        f"no progress for {verdict.still_s:.0f} s in {place_of(reading)} ({sign}); considered hung after "
        f"{verdict.limit_s:.0f} s"
    )


def _state(worker: WorkerProcess, reading: Reading, now: float) -> pb.RankState:
    """What a worker does, for the coordinator."""
    state = pb.RankState(
        rank=worker.id.rank, incarnation=worker.id.incarnation, step=reading.step, place=place_of(reading)
    )
    verdict, waits = worker.verdict, reading.waits
    if verdict is not None:
        state.still_s, state.limit_s, state.sign = verdict.still_s, verdict.limit_s, worker.pulse.sign.name.lower()
    if waits is not None:
        state.waits_s, state.waits_for = max(0.001, now - waits.since_s), waits.what
        state.waits_ranks.extend(waits.ranks)
    return state
