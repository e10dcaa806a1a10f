"""Which ranks wait for which: derived from the agents' reports and the coordinator's state. Pure.

A rank that waits for a waiting rank waits for the last of the chain. The rank at the end is reported with its place
in the step, once the wait is longer than this job's step times make likely.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from everstep.comms.control import telemetry_pb2 as pb
from everstep.elastic.protocol.events import WaitNoticed
from everstep.elastic.protocol.state import Phase, State, Status
from everstep.elastic.protocol.waiting import FIRST_S, SpokenOf

from .story import ranks_text

SHOWN_S = 5.0  # in status; shorter waits are nothing
LEAST_S = 1.0  # of a wait that counts
TYPICAL_STEPS = 3.0  # in long steps waits are long
NAMED = 3  # ranks that are waited for, described one by one
OLD_S = 10.0  # older reports do not show what a worker does now


class Told(NamedTuple):
    """What a worker does, from its agent's report; `at_s` by the coordinator's clock."""

    at_s: float
    state: pb.RankState


@dataclass(frozen=True)
class Holdup:
    """A wait: `key` is constant while it lasts, `text` names the waiting ranks, the cause and the awaited ranks."""

    key: Hashable
    seconds: float
    text: str
    ranks: tuple[int, ...] = ()
    step: int = -1


@dataclass
class Holdups:
    """All waits of a job. `take` receives the agents' reports; `poll` returns the next wait to report."""

    _told: dict[int, Told] = field(default_factory=dict)
    _since: dict[Hashable, float] = field(default_factory=dict)  # when each wait of the coordinator's state began
    _spoken: SpokenOf = field(default_factory=SpokenOf)

    def take(self, ranks: Iterable[pb.RankState], now: float) -> None:
        for state in ranks:
            self._told[state.rank] = Told(now, state)

    def find(self, state: State, now: float) -> list[Holdup]:
        """All of them, the longest first."""
        self._told = {rank: told for rank, told in self._told.items() if _current(state, told, now)}
        of_job = list(_of_job(state))
        self._since = {key: self._since.get(key, now) for key, _, _ in of_job}
        found = [Holdup(key, now - self._since[key], text, ranks) for key, text, ranks in of_job]
        return sorted([*found, *_of_ranks(state, self._told, now)], key=lambda holdup: -holdup.seconds)

    def poll(self, state: State, now: float, typical_s: float) -> WaitNoticed | None:
        """The next wait to report."""
        first_s = max(FIRST_S, TYPICAL_STEPS * typical_s)
        found = self.find(state, now)
        self._spoken.keep({holdup.key for holdup in found})
        for holdup in found:
            if self._spoken.due(holdup.key, holdup.seconds, first_s):
                return WaitNoticed(f"{holdup.text} (for {holdup.seconds:.0f} s)", holdup.ranks, holdup.step)
        return None

    def shown(self, state: State, now: float) -> list[str]:
        """For the status: waits, and ranks without progress."""
        waits = [f"{h.text} (for {h.seconds:.0f} s)" for h in self.find(state, now) if h.seconds >= SHOWN_S]
        still = [
            f"rank {rank}: {_stands(told)}"
            for rank, told in sorted(self._told.items())
            if told.state.still_s >= SHOWN_S
        ]
        return [*waits, *still]


def _current(state: State, told: Told, now: float) -> bool:
    worker = state.workers.get(told.state.rank)
    return worker is not None and worker.id.incarnation == told.state.incarnation and now - told.at_s < OLD_S


def _stands(told: Told) -> str:
    """How long and where a rank makes no progress; the same words everywhere."""
    signs = {"works": "it works", "storage": "it waits for storage", "stopped": "it is stopped"}
    one = told.state
    return (
        f"no progress for {one.still_s:.0f} s in {one.place} ({signs.get(one.sign, 'no sign of life')}); considered "
        f"hung after {one.limit_s:.0f} s"
    )


# ---------------------------------------------------------------- of ranks


def _of_ranks(state: State, told: Mapping[int, Told], now: float) -> list[Holdup]:
    """Ranks by what holds them up in the end."""
    waiting = {rank: one for rank, one in told.items() if one.state.waits_s >= LEAST_S}
    groups: dict[Hashable, list[int]] = {}
    for rank, one in sorted(waiting.items()):
        key: Hashable = _roots(rank, waiting) if one.state.waits_ranks else one.state.waits_for
        groups.setdefault(key, []).append(rank)
    found = []
    for key, ranks in groups.items():
        longest = max(ranks, key=lambda rank: waiting[rank].state.waits_s)
        one = waiting[longest]
        seconds = one.state.waits_s + now - one.at_s
        who = f"{_named(ranks)} {'waits' if len(ranks) == 1 else 'wait'} for"
        if isinstance(key, str):
            text = f"{who} {key}"
        elif not key:
            text = f"{who} one another in {one.state.place}"
        else:
            roots = sorted(key)  # type: ignore[call-overload]
            rest = [_where(state, rank, told.get(rank)) for rank in roots[:NAMED]]
            text = f"{who} {_named(roots)} in {one.state.place}; {'; '.join(rest)}"
        found.append(Holdup((key, one.state.step), seconds, text, tuple(ranks), one.state.step))
    return found


def _roots(rank: int, waiting: Mapping[int, Told]) -> frozenset[int]:
    """The ranks that this one waits for and that wait for no other; none where they wait for one another."""
    found, seen, ahead = set(), {rank}, list(waiting[rank].state.waits_ranks)
    while ahead:
        one = ahead.pop()
        if one in seen:
            continue
        seen.add(one)
        further = waiting[one].state.waits_ranks if one in waiting else ()
        if further:
            ahead += further
        else:
            found.add(one)
    return frozenset(found)


def _where(state: State, rank: int, told: Told | None) -> str:
    """Where a rank is that others wait for."""
    worker = state.workers.get(rank)
    if worker is None:
        return f"rank {rank} is gone"
    if worker.status is Status.STARTING:
        return f"rank {rank} is starting on node {worker.node}"
    if worker.status is Status.AFTER:
        return f"training is over at rank {rank}, whose script still runs"
    if told is None:
        return f"what rank {rank} (node {worker.node}) does is not known"
    if told.state.waits_s >= LEAST_S:
        return f"rank {rank} waits for {told.state.waits_for}"
    return f"rank {rank}: {_stands(told)}" if told.state.still_s >= LEAST_S else f"rank {rank} is in {told.state.place}"


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks_text(ranks)}"


# ---------------------------------------------------------------- of the job


def _of_job(state: State) -> Iterable[tuple[Hashable, str, tuple[int, ...]]]:
    """The waits of the coordinator itself."""
    starting = [w for w in state.workers.values() if w.status is Status.STARTING]
    ranks = tuple(sorted(w.id.rank for w in starting))
    nodes = ", ".join(sorted({w.node for w in starting}))
    if state.phase is Phase.FORMING and state.nodes:
        least = state.config.min_nodes
        if len(state.nodes) < least:
            yield (
                ("forming", len(state.nodes)),
                f"the job waits for nodes: {len(state.nodes)} of at least {least} (--nnodes) have joined "
                f"({', '.join(state.nodes)}); it gives up after {state.config.join_timeout_s:g} s",
                (),
            )
    elif state.phase is Phase.LAUNCHED and state.elastic and starting:
        where = "call run.prepare(...) or run.steps(...)"
        yield ("starting", ranks), f"training waits for {_named(ranks)} (node {nodes}) to {where}", ranks
    elif state.phase is Phase.RECOVERING and state.recovery is not None:
        live = {w.id for w in state.workers.values()}
        missing = (state.recovery.awaited & live) - state.recovery.reports.keys()
        awaited = tuple(sorted(worker.rank for worker in missing))
        if awaited:
            yield (
                ("reports", state.recovery.generation, awaited),
                f"the recovery waits for {_named(awaited)} to stop what they do and report",
                awaited,
            )
        elif starting:
            yield ("heirs", ranks), f"the recovery waits for {_named(ranks)} to start (node {nodes})", ranks
    elif state.phase is Phase.RUNNING and starting:
        text = f"{_named(ranks)} (node {nodes}) {'is' if len(ranks) == 1 else 'are'} starting; training continues"
        yield ("joining", ranks), text, ranks
    if state.stopping is not None and state.phase is not Phase.DONE:
        yield "stopping", f"the job saves a checkpoint before it stops: {state.stopping.why}", ()
