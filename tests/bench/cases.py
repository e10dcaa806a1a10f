"""The faults of the recovery benchmark: how each is injected, what is measured, and to which systems it applies."""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import psutil
from stamps import Commit, Process, Stamps
from systems import Everstep, EverstepNodes, System, Torchft, Torchrun

COORDINATOR = "es-coordinator"  # the name of its process
BASE_STEPS = 10  # before a stall, whose median is the step that it is compared with


@dataclass
class Strike:
    """One fault and what followed. Times are CLOCK_MONOTONIC seconds; fields end in their unit."""

    t: float
    victims: list[int]  # process ids of workers
    last_step: int = -1  # newest step committed by anyone before
    into_step_s: float = 0.0  # since the newest commit
    recovery_s: float | None = None  # to the commit of a later step by as many workers as survived
    delay_s: float | None = None  # the same, less what an undisturbed step would still have taken
    beyond_recomputation_s: float | None = None  # see the case
    detect_s: float | None = None  # to the system's own word that something is lost
    first_commit_s: float | None = None  # to the first later commit by any worker
    all_back_s: float | None = None  # to the first step committed by the full number of workers
    join_stall_s: float | None = None  # what the return of the lost one cost the others
    undisturbed_stall_s: float | None = None  # the same, of as many steps before the fault
    steps_redone: int = 0  # committed before, computed again
    steps_discarded: int = 0  # begun by survivors, their work thrown away
    on_schedule: bool = False  # the next commit came as if nothing had happened: struck after the step's reduction
    phases: dict[str, float] = field(default_factory=dict)  # the system's own account, in seconds


@dataclass(frozen=True)
class Case:
    """A kind of fault. `strike` injects it into these workers and returns the time; `after` undoes its effects."""

    name: str
    what: str
    counts: str  # what beyond_recomputation_s is: "signal", "detection", or "stall"
    systems: dict[str, type[System]]
    strike: Callable[[System, Sequence[Process]], float]
    victims: int = 1
    gone: Callable[[System, Strike], bool] = lambda system, strike: (
        True
    )  # whether `after` may come, once the other ranks continue
    after: Callable[[System, Strike], None] = lambda system, strike: None
    lost: str = "worker_died"  # everstep's event that says that it is detected
    changes: dict[str, Any] = field(default_factory=dict)  # to the job
    flags: tuple[str, ...] = ()  # of everstep


# ---------------------------------------------------------------- strikes


def kill(system: System, victims: Sequence[Process]) -> float:
    t = time.monotonic()
    for victim in victims:
        os.kill(victim.pid, signal.SIGKILL)
    return t


def stop(system: System, victims: Sequence[Process]) -> float:
    """Stop the process; its sockets stay open."""
    t = time.monotonic()
    for victim in victims:
        os.kill(victim.pid, signal.SIGSTOP)
    return t


def kill_stopped(system: System, strike: Strike) -> None:
    """End a stopped worker, for systems that only leave it out."""
    for pid in strike.victims:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)


def kill_coordinator(system: System, victims: Sequence[Process]) -> float:
    processes = psutil.Process(system.children[0].pid).children()
    coordinator = next(process for process in processes if process.name() == COORDINATOR)
    t = time.monotonic()
    coordinator.kill()
    return t


def coordinator_is_back(system: System, strike: Strike) -> bool:
    return any(event["event"] == "coordinator_returned" and event["at_s"] > strike.t for event in system.events())


def _node(system: System, victim: int) -> tuple[EverstepNodes, int]:
    assert isinstance(system, EverstepNodes)
    return system, system.node_of(victim)


def kill_node(system: System, victims: Sequence[Process]) -> float:
    """Kill all processes of a node at one instant: they are stopped first, so that none sees another one die."""
    nodes, number = _node(system, victims[0].pid)
    nodes.signal(number, signal.SIGSTOP)
    t = time.monotonic()
    nodes.signal(number, signal.SIGKILL)
    return t


def stop_node(system: System, victims: Sequence[Process]) -> float:
    nodes, number = _node(system, victims[0].pid)
    t = time.monotonic()
    nodes.signal(number, signal.SIGSTOP)
    return t


def drain_node(system: System, victims: Sequence[Process]) -> float:
    nodes, number = _node(system, victims[0].pid)
    t = time.monotonic()
    nodes.nodes[number].terminate()
    return t


def has_left(system: System, strike: Strike) -> bool:
    assert isinstance(system, EverstepNodes)
    return any(launcher.poll() is not None for launcher in system.nodes.values())


def start_node_again(system: System, strike: Strike) -> None:
    assert isinstance(system, EverstepNodes)
    system.restart()


PEERS: dict[str, type[System]] = {"torchft": Torchft, "torchft-tuned": Torchft, "torchft-tight": Torchft}
KILLED: dict[str, type[System]] = {"everstep": Everstep, **PEERS, "torchrun": Torchrun}
NODES: dict[str, type[System]] = {"everstep": EverstepNodes}
CASES = {
    case.name: case
    for case in (
        Case("worker", "SIGKILL of a worker", "signal", KILLED, kill),
        Case(
            "worker-2gib",
            "the same; every worker has 2 GiB of memory more",
            "signal",
            KILLED,
            kill,
            changes={"ballast_mib": 2048},
        ),
        Case("two-workers", "SIGKILL of two workers at once", "signal", KILLED, kill, victims=2),
        Case(
            "hung",
            "SIGSTOP of a worker; everstep takes it for hung after a second, torchft when its time-outs have passed",
            "detection",
            {"everstep": Everstep, "torchft-tuned": Torchft},
            stop,
            after=kill_stopped,
            flags=("--es-hang-timeout=1",),
        ),
        Case(
            "node-lost",
            "SIGKILL of all processes of a node; its sockets close",
            "detection",
            NODES,
            kill_node,
            after=start_node_again,
            lost="node_lost",
        ),
        Case(
            "node-silent",
            "SIGSTOP of all processes of a node; its sockets stay open",
            "detection",
            NODES,
            stop_node,
            after=start_node_again,
            lost="node_lost",
        ),
        Case(
            "coordinator",
            "SIGKILL of the coordinator",
            "stall",
            {"everstep": Everstep},
            kill_coordinator,
            victims=0,
            gone=coordinator_is_back,
        ),
        Case(
            "drain",
            "SIGTERM to a node, which hands over and leaves; then another one joins",
            "stall",
            NODES,
            drain_node,
            gone=has_left,
            after=start_node_again,
            lost="draining",
        ),
    )
}


# ---------------------------------------------------------------- what followed


def account(strike: Strike, case: Case, stamps: Stamps, workers: int, step_s: float) -> None:
    """Fill in what follows from the workers' stamps, once the job has settled."""
    before = [c for c in stamps.commits() if c.t <= strike.t]
    strike.last_step = max(c.step for c in before)
    newest = min(c.t for c in before if c.step == strike.last_step)
    strike.into_step_s = strike.t - newest
    after = [c for c in stamps.commits() if c.t > strike.t and c.pid not in strike.victims]
    first_by_pid: dict[int, float] = {}
    by_step: dict[int, list[Commit]] = {}
    for commit in after:
        if commit.step > strike.last_step:
            first_by_pid.setdefault(commit.pid, commit.t)
            by_step.setdefault(commit.step, []).append(commit)
    moments = sorted(first_by_pid.values())
    survived = workers - len(strike.victims)
    strike.first_commit_s = moments[0] - strike.t
    strike.recovery_s = moments[survived - 1] - strike.t
    strike.delay_s = strike.recovery_s - max(0.0, step_s - strike.into_step_s)
    strike.all_back_s = min(max(c.t for c in group) for group in by_step.values() if len(group) >= workers) - strike.t
    strike.on_schedule = moments[survived - 1] - newest < 1.25 * step_s
    newcomers = {p.pid for p in stamps.processes.values() if p.started > strike.t}
    strike.steps_redone = len({c.step for c in after if c.pid in newcomers and c.step <= strike.last_step})
    restarted = not any(c.pid not in newcomers for c in after if c.step > strike.last_step)
    failed = [sum(t > strike.t for _, t in p.failures) for p in stamps.processes.values()]
    strike.steps_discarded = max([int(restarted), *failed])
    if not restarted and newcomers and case.counts != "stall":
        joined = [c.t for c in after if c.pid in newcomers]
        if joined:
            strike.join_stall_s = stall(stamps, newcomers, max(strike.t, min(joined) - 2 * step_s), min(joined))


def own_account(strike: Strike, case: Case, stamps: Stamps, events: Sequence[dict[str, Any]], until: float) -> None:
    """Fill in what everstep's event log has about the time from this strike to the next one."""
    window = [e for e in events if strike.t < e.get("at_s", 0.0) < until]
    named = {name: [e for e in window if e["event"] == name] for name in {e["event"] for e in window}}
    lost = named.get(case.lost, [])
    strike.detect_s = lost[0]["at_s"] - strike.t if lost else None
    recovered = [e for e in named.get("recovered", []) if "total_s" in e]
    if recovered:
        found = recovered[0]
        strike.phases = {name: found[name] for name in found if name.endswith("_s") and name != "at_s"}
        recompute_s = found.get("recompute_s") or 0.0
        counted_s = found["at_s"] - strike.t if case.counts == "signal" else found["total_s"]
        strike.beyond_recomputation_s = counted_s - recompute_s
    elsewhere = set(strike.victims) | {p.pid for p in stamps.processes.values() if p.started > strike.t}
    if case.counts == "stall":
        ends = named.get("coordinator_returned", []) + named.get("node_left", [])
        if ends:
            strike.beyond_recomputation_s = stall(stamps, elsewhere, strike.t, ends[0]["at_s"])
            length_s = ends[0]["at_s"] - strike.t
            strike.undisturbed_stall_s = stall(stamps, elsewhere, strike.t - length_s, strike.t)
    prepared, joined = named.get("join_prepared", []), named.get("joined", [])
    if prepared and joined:
        strike.join_stall_s = stall(stamps, elsewhere, prepared[0]["at_s"], joined[-1]["at_s"])


def stall(stamps: Stamps, without: set[int], start: float, end: float) -> float | None:
    """How much longer the longest step from `start` to the one after `end` took than the median of those before.

    Over the workers that ran all the time, except those in `without`. None if no stamp allows it.
    """
    first: dict[int, float] = {}
    for commit in stamps.commits():
        if commit.pid not in without:
            first.setdefault(commit.step, commit.t)
    times = [first[step] for step in sorted(first)]
    before = [b - a for a, b in pairwise(times) if b <= start][-BASE_STEPS:]
    during = [b - a for a, b in pairwise(times) if b > start and a <= end]
    return max(during) - statistics.median(before) if before and during else None


def choose(stamps: Stamps, rng: random.Random, count: int, running: Callable[[int], bool]) -> list[Process]:
    """Choose among the workers that train now."""
    newest = stamps.last_step()
    able = [p for p in stamps.processes.values() if p.commits and p.commits[-1].step >= newest - 1 and running(p.pid)]
    return rng.sample(sorted(able, key=lambda p: (p.rank, p.pid)), count)
