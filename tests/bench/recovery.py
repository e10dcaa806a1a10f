"""How long a killed worker stops a training job, what it costs, and whether the numbers stay the same.

    python tests/bench/recovery.py --json [--kills N] [--only everstep,torchft,torchft-tuned,...] [--quick]

Everstep and its peers train the same model on the same global batches with the same number of single-threaded workers.
A worker chosen at random is killed with SIGKILL at a random point of a step; the next kill waits until all workers
commit steps again. The time of a kill is from the signal to the moment by which as many workers as survived (all but
one) have committed a step later than any committed before it. Every system sees kills drawn by the same rule.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from processes import alive
from stamps import Commit, Stamps, median, percentile
from systems import Everstep, System, Torchft, Torchrun, versions
from workload import Job

SETTLED_STEPS = 3  # commits of every worker after a recovery before the next kill
SETTLE_TIMEOUT_S = 120.0
START_TIMEOUT_S = 180.0
POLL_S = 0.01  # how often to look; the times themselves are the workers' stamps

# torchft's settings. The first are those of its documentation: the README's lighthouse line and the timeouts of its
# example train_ddp.py (its library defaults are longer still: a process group timeout of 60 s). The second are tuned to
# a scale of one second. The third, of twice this job's step time, are tighter than a job whose steps vary can bear;
# they are measured to show where the floor is and have no target.
DOCUMENTED: dict[str, Any] = {
    "lighthouse": {"join_timeout_ms": 10000, "quorum_tick_ms": 100},
    "process_group_timeout_s": 5.0,
    "manager": {"timeout": 10.0},
}
TUNED: dict[str, Any] = {
    "lighthouse": {"join_timeout_ms": 1000, "quorum_tick_ms": 10, "heartbeat_timeout_ms": 1000},
    "process_group_timeout_s": 1.0,
    "manager": {"timeout": 5.0, "quorum_timeout": 10.0, "connect_timeout": 5.0, "heartbeat_interval": 0.1},
}
TIGHT: dict[str, Any] = {
    "lighthouse": {**TUNED["lighthouse"], "join_timeout_ms": 500},
    "process_group_timeout_s": 0.5,
    "manager": TUNED["manager"],
}
SYSTEMS: dict[str, tuple[type[System], dict[str, Any]]] = {
    "everstep": (Everstep, {}),
    "torchft": (Torchft, DOCUMENTED),
    "torchft-tuned": (Torchft, TUNED),
    "torchft-tight": (Torchft, TIGHT),
    "torchrun": (Torchrun, {"checkpoint_every_steps": 1}),
}


@dataclass
class Kill:
    """One kill and what followed."""

    t: float
    pid: int
    rank: int
    last_step: int  # newest step committed by anyone before the kill
    into_step_s: float  # since the newest commit
    recovery_s: float | None = None  # to the commit of a later step by as many workers as survived
    delay_s: float | None = None  # the same, less what an undisturbed step would still have taken
    first_commit_s: float | None = None  # to the first such commit by any worker
    all_back_s: float | None = None  # to the first step committed by the full number of workers
    steps_redone: int = 0  # committed before, computed again
    steps_discarded: int = 0  # begun by survivors, their work thrown away
    on_schedule: bool = False  # the next commit came as if nothing had happened: killed after the step's reduction


@dataclass
class Outcome:
    """What one system did under fire."""

    kills: list[Kill] = field(default_factory=list)
    step_s: float = 0.0
    last_step: int = -1
    samples_lost: int | None = None
    digests: dict[int, set[str]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def drive(system: System, stamps: Stamps, until: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Poll stamps and supervise until the condition holds."""
    deadline = time.monotonic() + timeout_s
    while True:
        if stamps.poll() and until():
            return
        system.tick()
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:.0f} s; log ends: {system.tail()}")
        time.sleep(POLL_S)


def settled(stamps: Stamps, workers: int, since: float) -> bool:
    """Whether the full number of workers has committed several of the same steps since then."""
    by_step: dict[int, set[int]] = {}
    for commit in stamps.commits():
        if commit.t > since:
            by_step.setdefault(commit.step, set()).add(commit.pid)
    return sum(len(pids) >= workers for pids in by_step.values()) >= SETTLED_STEPS


def step_time(stamps: Stamps, newest: int = 40) -> float:
    """Median seconds between successive steps of the job, over the newest ones."""
    first: dict[int, float] = {}
    for commit in stamps.commits():
        first.setdefault(commit.step, commit.t)
    times = [first[step] for step in sorted(first)][-newest:]
    return median([b - a for a, b in pairwise(times)])


def kill_one(stamps: Stamps, rng: random.Random, step_s: float) -> Kill:
    """SIGKILL a random worker at a random point of a step."""
    seen = stamps.last_step()
    while stamps.last_step() == seen:
        stamps.poll()
        time.sleep(POLL_S)
    time.sleep(rng.uniform(0.0, step_s))
    stamps.poll()
    newest = stamps.last_step()
    running = [p for p in stamps.processes.values() if p.commits and p.commits[-1].step >= newest - 1 and alive(p.pid)]
    victim = rng.choice(sorted(running, key=lambda p: p.rank))
    t = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL)
    return Kill(t, victim.pid, victim.rank, newest, 0.0)


def account(kill: Kill, stamps: Stamps, workers: int, step_s: float) -> None:
    """Fill in what followed a kill, once the job has settled."""
    before = [c for c in stamps.commits() if c.t <= kill.t]
    kill.last_step = max(c.step for c in before)
    newest = min(c.t for c in before if c.step == kill.last_step)
    kill.into_step_s = kill.t - newest
    after = [c for c in stamps.commits() if c.t > kill.t and c.pid != kill.pid]
    first_by_pid: dict[int, float] = {}
    by_step: dict[int, list[Commit]] = {}
    for commit in after:
        if commit.step > kill.last_step:
            first_by_pid.setdefault(commit.pid, commit.t)
            by_step.setdefault(commit.step, []).append(commit)
    moments = sorted(first_by_pid.values())
    kill.first_commit_s = moments[0] - kill.t
    kill.recovery_s = moments[workers - 2] - kill.t
    kill.delay_s = kill.recovery_s - max(0.0, step_s - kill.into_step_s)
    kill.all_back_s = min(max(c.t for c in group) for group in by_step.values() if len(group) >= workers) - kill.t
    kill.on_schedule = moments[workers - 2] - newest < 1.25 * step_s
    newcomers = {p.pid for p in stamps.processes.values() if p.started > kill.t}
    kill.steps_redone = len({c.step for c in after if c.pid in newcomers and c.step <= kill.last_step})
    restarted = not any(c.pid not in newcomers for c in after if c.step > kill.last_step)
    failed = [sum(t > kill.t for _, t in p.failures) for p in stamps.processes.values()]
    kill.steps_discarded = max([int(restarted), *failed])


def under_fire(system: System, kills: int, rng: random.Random, name: str) -> Outcome:
    """Run the job and kill `kills` workers, one after the other."""
    outcome = Outcome()
    job, stamps = system.job, Stamps(system.folder)
    try:
        system.start()
        drive(system, stamps, lambda: settled(stamps, job.workers, 0.0), START_TIMEOUT_S, "start")
        start = time.monotonic()
        drive(system, stamps, lambda: settled(stamps, job.workers, start), START_TIMEOUT_S, "warm-up")
        outcome.step_s = step_time(stamps)
        for number in range(kills):
            kill = kill_one(stamps, rng, outcome.step_s)
            outcome.kills.append(kill)
            since = kill.t
            drive(system, stamps, lambda: settled(stamps, job.workers, since), SETTLE_TIMEOUT_S, f"kill {number}")  # noqa: B023
            account(kill, stamps, job.workers, outcome.step_s)
            say(f"{name}: kill {number + 1}/{kills} of rank {kill.rank}: next commit after {kill.recovery_s:.3f} s")
        drive(system, stamps, lambda: settled(stamps, job.workers, time.monotonic() - 2), START_TIMEOUT_S, "end")
    except (RuntimeError, TimeoutError, OSError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
        say(f"{name}: {outcome.error}")
    finally:
        outcome.events = system.events()
        system.stop()
    stamps.poll()
    outcome.last_step = stamps.last_step()
    outcome.digests = stamps.digests()
    outcome.samples_lost = samples_lost(stamps, job)
    return outcome


def samples_lost(stamps: Stamps, job: Job) -> int | None:
    """Samples of committed steps that no update has seen; None where the system does not say."""
    seen: dict[int, int] = {}
    for commit in stamps.commits():
        if commit.samples is None:
            return None
        seen[commit.step] = max(seen.get(commit.step, 0), commit.samples)
    return sum(job.global_batch_size - samples for samples in seen.values())


def undisturbed(system: System, disturbed: dict[int, set[str]], name: str) -> tuple[bool | None, int | None]:
    """Run the same job with nothing killed; whether every step's digest agrees, and the first step that does not."""
    stamps = Stamps(system.folder)
    last = max(disturbed, default=-1)

    def differs() -> int | None:
        for step, found in sorted(stamps.digests().items()):
            if step in disturbed and found | disturbed[step] != found & disturbed[step]:
                return step
        return None

    say(f"{name}: undisturbed run up to step {last}")
    try:
        system.start()
        timeout_s = START_TIMEOUT_S + 5.0 * last
        drive(system, stamps, lambda: differs() is not None or stamps.last_step() >= last, timeout_s, "undisturbed run")
    except (RuntimeError, TimeoutError, OSError) as error:
        say(f"{name}: {type(error).__name__}: {error}")
        return None, None
    finally:
        system.stop()
    stamps.poll()
    first = differs()
    return first is None, first


def figures(outcome: Outcome) -> dict[str, Any]:
    """The summary of one system."""
    done = [k for k in outcome.kills if k.recovery_s is not None]
    times = [k.recovery_s for k in done if k.recovery_s is not None]
    interrupted = [k.recovery_s for k in done if k.recovery_s is not None and not k.on_schedule]
    delays = [k.delay_s for k in done if k.delay_s is not None]
    back = [k.all_back_s for k in done if k.all_back_s is not None]
    found = {
        "kills": len(done),
        "step_s": outcome.step_s,
        "kill_to_next_commit_s": spread(times),
        "kill_to_next_commit_s_where_the_step_was_interrupted": spread(interrupted),
        "delay_of_that_commit_s": spread(delays),
        "kill_to_full_strength_s": spread(back),
        "steps_redone": sum(k.steps_redone for k in done),
        "steps_discarded": sum(k.steps_discarded for k in done),
        "samples_lost": outcome.samples_lost,
        "steps": outcome.last_step + 1,
        "each": [asdict(k) for k in done],
    }
    return {**found, "error": outcome.error} if outcome.error else found


def spread(values: list[float]) -> dict[str, float | int | None]:
    if not values:
        return {"median": None, "p95": None, "min": None, "max": None, "count": 0}
    rounded = {"median": median(values), "p95": percentile(values, 95), "min": min(values), "max": max(values)}
    return {**{name: round(value, 4) for name, value in rounded.items()}, "count": len(values)}


def own_account(events: list[dict[str, Any]], kills: list[Kill]) -> dict[str, Any]:
    """Everstep's event log: each phase; and from our signal to its `recovered`, less the recomputation it reports."""
    recovered = [e for e in events if e.get("event") == "recovered" and "total_s" in e]
    phases = ("detect_s", "abort_s", "agree_s", "edit_s", "restore_s", "recompute_s", "total_s")
    by_phase = {p: spread([e[p] for e in recovered if e.get(p) is not None]) for p in phases}
    less = [e["total_s"] - (e.get("recompute_s") or 0.0) for e in recovered]
    noticed, from_signal = [], []
    for kill, following in zip(kills, [*(k.t for k in kills[1:]), float("inf")], strict=True):
        window = [e for e in events if kill.t < e.get("at_s", 0.0) < following]
        noticed += [e["at_s"] - kill.t for e in window if e["event"] == "worker_died"][:1]
        ends = [e for e in window if e["event"] == "recovered"][:1]
        from_signal += [e["at_s"] - kill.t - (e.get("recompute_s") or 0.0) for e in ends]
    return {
        "recoveries": len(recovered),
        "phases": by_phase,
        "total_less_recompute_s": spread(less),
        "kill_to_worker_died_s": spread(noticed),
        "kill_to_recovered_less_recompute_s": spread(from_signal),
    }


def measure(name: str, kind: type[System], job: Job, kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """One system: under fire, then undisturbed."""
    if reason := kind.unavailable():
        say(f"{name}: skipped, {reason}")
        return {"skipped": reason}
    try:
        outcome = under_fire(kind(job=job.moved(folder / name)), kills, random.Random(seed), name)
        found = figures(outcome)
        same, first = None, None
        if outcome.digests and outcome.kills:
            quiet = kind(job=job.moved(folder / f"{name}-undisturbed"))
            same, first = undisturbed(quiet, outcome.digests, name)
        found |= {"same_digests_as_undisturbed": same, "first_different_step": first, "settings": job.options}
        if kind is Everstep:
            found["own_account"] = own_account(outcome.events, outcome.kills)
            if same:
                found["samples_lost"] = 0  # the same bits come from the same samples only
        return found
    except Exception:
        return {"skipped": f"failed: {traceback.format_exc(limit=3)}"}


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Everstep's medians over each peer's: of the time to the next commit, and of how late that commit was."""
    shown: dict[str, dict[str, float]] = {}
    for measure_of in ("kill_to_next_commit_s", "delay_of_that_commit_s"):
        middles = {name: of.get(measure_of, {}).get("median") for name, of in found.items()}
        ours = middles.pop("everstep", None)
        if ours is not None:
            shown[measure_of] = {name: ours / theirs for name, theirs in middles.items() if theirs}
    return shown


def targets(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Everstep against its budget and its peers.

    The budget is the median from the kill to the next commit less what is computed in it (the lost micro-batches and
    the rest of the interrupted step); it is held against the peers' medians from the kill to the next commit, which is
    the question a user asks of them. The `ratios` beside it compare like with like, on both sides with the compute.
    """

    def value(name: str) -> float | None:
        spread_of: dict[str, Any] = found.get(name, {}).get("kill_to_next_commit_s", {})
        middle: float | None = spread_of.get("median")
        return middle

    account: dict[str, Any] = (
        found.get("everstep", {}).get("own_account", {}).get("kill_to_recovered_less_recompute_s", {})
    )
    ours: float | None = account.get("median")
    rows: list[tuple[str, float | None, float]] = [
        ("everstep: median recovery less its recomputation, seconds", ours, 0.3)
    ]
    for peer, bound in (("torchft-tuned", 1 / 5), ("torchft", 1 / 10), ("torchrun", 1 / 10)):
        theirs = value(peer)
        ratio = ours / theirs if ours is not None and theirs else None
        rows.append((f"everstep less its recomputation / {peer}: ratio of median recoveries", ratio, bound))
    same = found.get("everstep", {}).get("same_digests_as_undisturbed")
    shown = [{"name": n, "value": v, "bound": b, "met": None if v is None else v <= b} for n, v, b in rows]
    name = "everstep: steps differing from the undisturbed run's digests"
    return [*shown, {"name": name, "value": None if same is None else int(not same), "bound": 0, "met": same}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object (the only format)")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--only", help="a comma-separated choice of systems")
    parser.add_argument("--seed", type=int, default=0, help="of the victims and moments")
    parser.add_argument("--quick", action="store_true", help="one kill each, a smaller model, fewer peers")
    parser.add_argument("--keep", type=Path, help="keep logs and stamps in this folder")
    options = parser.parse_args()
    usual = ["everstep", "torchft-tuned", "torchrun"] if options.quick else list(SYSTEMS)
    chosen = options.only.split(",") if options.only else usual
    if unknown := set(chosen) - set(SYSTEMS):
        parser.error(f"no such system: {sorted(unknown)}; there are {list(SYSTEMS)}")
    kills = 1 if options.quick else options.kills
    job = Job(layers=2, width=64, context=32) if options.quick else Job()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="everstep-recovery-"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    found: dict[str, dict[str, Any]] = {}
    for name in chosen:
        kind, settings = SYSTEMS[name]
        found[name] = measure(name, kind, replace(job, options=settings), kills, options.seed, folder)
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    shown = {k: v for k, v in asdict(job).items() if k not in ("folder", "options", "steps")}
    result = {"benchmark": "recovery", "versions": versions(), "seed": options.seed, "job": shown}
    print(json.dumps({**result, "systems": found, "ratios": ratios(found), "targets": targets(found)}, indent=2))


if __name__ == "__main__":
    main()
