"""How long a fault interrupts training, what it costs, and whether the results stay the same.

    python tests/bench/recovery.py --json [--kills N] [--only CASE,...] [--systems everstep,torchft-tuned,...] [--quick]

Everstep and its peers train the same model on the same global batches with as many single-threaded workers each.
In each case (`cases.py`) faults of one kind strike workers chosen at random, at a random point of a step; the next one
waits until all workers commit steps again. The time of a fault is from the signal to the moment by which as many
workers as survived have committed a step later than any committed before it. All systems see faults drawn by one rule.

`beyond_recomputation_s` is what is held against the targets: everstep's time to that commit less the computing in it.
It counts from the signal where a process dies; from the detection where a process has to fall silent first, with the
time to detect beside it; and where no process is lost, it is by how much the longest step exceeds the median step. Of a
peer, which computes the interrupted step again, it is the time to the commit less one step.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from cases import CASES, Case, Strike, account, choose, own_account
from processes import alive
from stamps import Stamps, median, percentile
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
SYSTEMS: dict[str, dict[str, Any]] = {
    "everstep": {},
    "torchft-tuned": TUNED,
    "torchrun": {"checkpoint_every_steps": 1},
    "torchft": DOCUMENTED,
    "torchft-tight": TIGHT,
}
COMPARED = ("everstep", "torchft-tuned", "torchrun")  # in all cases; the others in the first one only
MEDIAN_S, P95_S, GOAL_S = 0.030, 0.060, 0.020  # everstep's budget of a fault beyond recomputation


@dataclass
class Outcome:
    """The results of one system with faults."""

    strikes: list[Strike] = field(default_factory=list)
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


def strike_one(case: Case, system: System, stamps: Stamps, rng: random.Random, step_s: float) -> Strike:
    """Inject the case's fault into random workers at a random point of a step."""
    seen = stamps.last_step()
    while stamps.last_step() == seen:
        stamps.poll()
        time.sleep(POLL_S)
    time.sleep(rng.uniform(0.0, step_s))
    stamps.poll()
    victims = choose(stamps, rng, case.victims, alive)
    return Strike(case.strike(system, victims), [victim.pid for victim in victims])


def under_fire(case: Case, system: System, kills: int, rng: random.Random, name: str) -> Outcome:
    """Run the job and inject the fault `kills` times, one after the other."""
    outcome = Outcome()
    job, stamps = system.job, Stamps(system.folder)
    try:
        system.start()
        drive(system, stamps, lambda: settled(stamps, job.workers, 0.0), START_TIMEOUT_S, "start")
        start = time.monotonic()
        drive(system, stamps, lambda: settled(stamps, job.workers, start), START_TIMEOUT_S, "warm-up")
        outcome.step_s = step_time(stamps)
        for number in range(kills):
            strike = strike_one(case, system, stamps, rng, outcome.step_s)
            outcome.strikes.append(strike)
            survive(case, system, stamps, strike)
            since = time.monotonic()
            drive(system, stamps, lambda: settled(stamps, job.workers, since), SETTLE_TIMEOUT_S, f"fault {number}")  # noqa: B023
            account(strike, case, stamps, job.workers, outcome.step_s)
            say(f"{name}: fault {number + 1}/{kills}: next commit after {strike.recovery_s:.3f} s")
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
    if isinstance(system, Everstep):
        ends = [*(strike.t for strike in outcome.strikes[1:]), float("inf")]
        for strike, end in zip(outcome.strikes, ends, strict=True):
            own_account(strike, case, stamps, outcome.events, end)
    return outcome


def survive(case: Case, system: System, stamps: Stamps, strike: Strike) -> None:
    """Wait until the other ranks continue, and only then restore what the fault took away."""
    others = system.job.workers - len(strike.victims)

    def on() -> bool:
        """Wait for two more commits of each worker: one of the steps needed the affected workers."""
        later = Counter(c.pid for c in stamps.commits() if c.t > strike.t and c.pid not in strike.victims)
        return sum(count >= 2 for count in later.values()) >= others

    drive(system, stamps, on, SETTLE_TIMEOUT_S, "the survivors continue")
    drive(system, stamps, lambda: case.gone(system, strike), SETTLE_TIMEOUT_S, "what was struck has gone")
    case.after(system, strike)


def samples_lost(stamps: Stamps, job: Job) -> int | None:
    """Samples of committed steps that no update has used; None where the system does not report it."""
    seen: dict[int, int] = {}
    for commit in stamps.commits():
        if commit.samples is None:
            return None
        seen[commit.step] = max(seen.get(commit.step, 0), commit.samples)
    return sum(job.global_batch_size - samples for samples in seen.values())


def undisturbed(system: System, disturbed: dict[int, set[str]], name: str) -> dict[int, set[str]]:
    """The digests of the same job without faults, up to the last step, or to the first that differs."""
    stamps = Stamps(system.folder)
    last = max(disturbed, default=-1)

    def enough() -> bool:
        return different(stamps.digests(), disturbed) is not None or stamps.last_step() >= last

    say(f"{name}: undisturbed run up to step {last}")
    try:
        system.start()
        drive(system, stamps, enough, START_TIMEOUT_S + 5.0 * last, "undisturbed run")
    except (RuntimeError, TimeoutError, OSError) as error:
        say(f"{name}: {type(error).__name__}: {error}")
        return {}
    finally:
        system.stop()
    stamps.poll()
    return stamps.digests()


def figures(outcome: Outcome) -> dict[str, Any]:
    """The summary of one system in one case."""
    done = [strike for strike in outcome.strikes if strike.recovery_s is not None]
    phases = {name: spread([s.phases[name] for s in done if name in s.phases]) for s in done for name in s.phases}
    found = {
        "faults": len(done),
        "step_s": outcome.step_s,
        "detect_s": spread_of(done, "detect_s"),
        "beyond_recomputation_s": spread_of(done, "beyond_recomputation_s"),
        "next_commit_s": spread_of(done, "recovery_s"),
        "next_commit_s_where_the_step_was_interrupted": spread_of([s for s in done if not s.on_schedule], "recovery_s"),
        "delay_of_that_commit_s": spread_of(done, "delay_s"),
        "full_strength_s": spread_of(done, "all_back_s"),
        "join_stall_s": spread_of(done, "join_stall_s"),
        "undisturbed_stall_s": spread_of(done, "undisturbed_stall_s"),
        "phases": phases,
        "steps_redone": sum(s.steps_redone for s in done),
        "steps_discarded": sum(s.steps_discarded for s in done),
        "samples_lost": outcome.samples_lost,
        "steps": outcome.last_step + 1,
        "each": [asdict(s) for s in done],
    }
    return {**found, "error": outcome.error} if outcome.error else found


def spread_of(strikes: list[Strike], name: str) -> dict[str, float | int | None]:
    return spread([value for value in (getattr(strike, name) for strike in strikes) if value is not None])


def spread(values: list[float]) -> dict[str, float | int | None]:
    if not values:
        return {"median": None, "p95": None, "min": None, "max": None, "count": 0}
    rounded = {"median": median(values), "p95": percentile(values, 95), "min": min(values), "max": max(values)}
    return {**{name: round(value, 4) for name, value in rounded.items()}, "count": len(values)}


def measure(case: Case, name: str, job: Job, kills: int, seed: int, folder: Path) -> tuple[Outcome, dict[str, Any]]:
    """Measure one system in one case."""
    kind = case.systems[name]
    options = {**SYSTEMS[name], "flags": [*case.flags]} if name == "everstep" else SYSTEMS[name]
    job = replace(job, options=options, **case.changes)
    if reason := kind.unavailable():
        say(f"{name}: skipped, {reason}")
        return Outcome(), {"skipped": reason}
    try:
        system = kind(job=job.moved(folder / f"{case.name}-{name}"))
        outcome = under_fire(case, system, kills, random.Random(seed), f"{case.name} {name}")
        if kind in PEERS_THAT_REDO:
            for strike in outcome.strikes:
                if strike.recovery_s is not None:
                    strike.beyond_recomputation_s = max(0.0, strike.recovery_s - outcome.step_s)
        return outcome, {**figures(outcome), "settings": options}
    except Exception:
        return Outcome(), {"skipped": f"failed: {traceback.format_exc(limit=3)}"}


def compare(name: str, job: Job, outcomes: dict[str, Outcome], found: dict[str, dict[str, Any]], folder: Path) -> None:
    """Fill in whether a system's digests equal those of its undisturbed run, in every case."""
    disturbed: dict[int, set[str]] = {}
    for outcome in outcomes.values():
        for step, digests in outcome.digests.items():
            disturbed.setdefault(step, set()).update(digests)
    if not disturbed:
        return
    kind = CASES["worker"].systems[name]
    quiet = kind(job=replace(job, options=SYSTEMS[name]).moved(folder / f"undisturbed-{name}"))
    known = undisturbed(quiet, disturbed, name)
    for case, outcome in outcomes.items():
        first = different(known, outcome.digests)
        same = first is None if known else None
        found[case][name] |= {"same_digests_as_undisturbed": same, "first_different_step": first}
        if same:
            found[case][name]["samples_lost"] = 0  # the same bits come from the same samples only


def different(undisturbed: dict[int, set[str]], disturbed: dict[int, set[str]]) -> int | None:
    """The first step of both whose digests differ."""
    steps = sorted(undisturbed.keys() & disturbed.keys())
    return next((step for step in steps if len(undisturbed[step] | disturbed[step]) > 1), None)


PEERS_THAT_REDO = (Torchft, Torchrun)


def ratios(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Everstep's median times to the next commit over each peer's, in the cases that both have."""
    shown: dict[str, dict[str, float]] = {}
    for case, found in cases.items():
        middles = {name: found[name].get("next_commit_s", {}).get("median") for name in found if name in SYSTEMS}
        ours = middles.pop("everstep", None)
        if ours is not None:
            shown[case] = {name: round(ours / theirs, 4) for name, theirs in middles.items() if theirs}
    return shown


def targets(cases: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Everstep's budgets: of what a fault costs beyond the computing that it makes necessary; and its digests."""
    rows: list[tuple[str, float | None, float]] = []
    for case, found in cases.items():
        ours = found.get("everstep", {})
        figures = [(case, "beyond_recomputation_s")] + ([("join", "join_stall_s")] if case == "drain" else [])
        for name, figure in figures:
            spread_here = ours.get(figure, {})
            rows.append((f"{name}: {figure}, median", spread_here.get("median"), MEDIAN_S))
            rows.append((f"{name}: {figure}, median, the goal", spread_here.get("median"), GOAL_S))
            rows.append((f"{name}: {figure}, p95", spread_here.get("p95"), P95_S))
        same = ours.get("same_digests_as_undisturbed")
        rows.append((f"{case}: steps differ from the undisturbed run", None if same is None else int(not same), 0))
        for peer, bound in (("torchft-tuned", 1 / 5), ("torchft", 1 / 10), ("torchrun", 1 / 10)):
            theirs = found.get(peer, {}).get("next_commit_s", {}).get("median")
            middle = ours.get("beyond_recomputation_s", {}).get("median")
            if theirs and middle is not None:
                rows.append((f"{case}: everstep beyond recomputation / {peer} to next commit", middle / theirs, bound))
    return [{"name": n, "value": v, "bound": b, "met": None if v is None else v <= b} for n, v, b in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object (the only format)")
    parser.add_argument("--kills", type=int, default=10, help="faults of each system in each case")
    parser.add_argument("--only", help=f"a comma-separated choice of {', '.join(CASES)} (drain: join too)")
    parser.add_argument("--systems", help=f"a comma-separated choice of {', '.join(SYSTEMS)}")
    parser.add_argument("--seed", type=int, default=0, help="of the victims and moments")
    parser.add_argument("--quick", action="store_true", help="one fault each, a smaller model, fewer peers")
    parser.add_argument("--keep", type=Path, help="keep logs and stamps in this folder")
    options = parser.parse_args()
    cases, systems = chosen(parser, options.only, CASES), chosen(parser, options.systems, SYSTEMS)
    if options.quick and not options.systems:
        systems = ["everstep", "torchft-tuned", "torchrun"]
    kills = 1 if options.quick else options.kills
    job = Job(layers=2, width=64, context=32) if options.quick else Job()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="everstep-recovery-"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    found: dict[str, dict[str, Any]] = {}
    outcomes: dict[str, dict[str, Outcome]] = {name: {} for name in systems}
    for case in (CASES[name] for name in cases):
        found[case.name] = {"what": case.what, "counts_from": case.counts}
        for name in (name for name in systems if name in case.systems and (case.name == "worker" or name in COMPARED)):
            outcome, figures_of = measure(case, name, job, kills, options.seed, folder)
            outcomes[name][case.name], found[case.name][name] = outcome, figures_of
    for name, of_cases in outcomes.items():
        compare(name, job, of_cases, found, folder)
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    shown = {k: v for k, v in asdict(job).items() if k not in ("folder", "options", "steps")}
    result = {"benchmark": "recovery", "versions": versions(), "seed": options.seed, "job": shown}
    print(json.dumps({**result, "cases": found, "ratios": ratios(found), "targets": targets(found)}, indent=2))


def chosen(parser: argparse.ArgumentParser, text: str | None, known: Collection[str]) -> list[str]:
    """The names of a comma-separated choice, or all."""
    names = text.split(",") if text else list(known)
    if unknown := set(names) - set(known):
        parser.error(f"{sorted(unknown)}: there are {', '.join(known)}")
    return names


if __name__ == "__main__":
    main()
