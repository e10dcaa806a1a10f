"""Two hundred random kills in one job, several at once among them, and all at once."""

from __future__ import annotations

import random

from tests.jobs import assert_same_run, run_job

PHASES = ("compute", "reduce", "agree", "update", "commit", "recover", "restore", "join")
KILLS = 200


def random_faults(workers: int, kills: int, seed: int) -> list[dict[str, object]]:
    """Every incarnation dies in a random phase, some steps after the last one did."""
    rng = random.Random(seed)
    faults: list[dict[str, object]] = []
    for rank in range(workers):
        step = 1
        for incarnation in range(kills // workers):
            phase = rng.choice(PHASES if incarnation else PHASES[:5])
            faults.append(
                {"rank": rank, "incarnation": incarnation, "phase": phase, "step": step if phase != "join" else 0}
            )
            step += rng.choice((1, 2, 3, 4))
    return faults


def test_two_hundred_random_kills() -> None:
    workers, steps = 4, 160
    faults = random_faults(workers, KILLS + 20, seed=3)
    reference = run_job(nproc=1, steps=steps, timeout_s=60)
    result = run_job(nproc=workers, stages=2, steps=steps, faults=faults, timeout_s=220)
    assert_same_run(result, reference)
    deaths = result.named("worker_died")
    together = sum(len(e["ranks"]) > 1 for e in result.named("recovered"))
    print(f"{len(deaths)} kills in {len(result.named('recovered'))} recoveries, {together} of them of several workers")
    assert len(deaths) >= KILLS


def test_all_workers_at_once() -> None:
    """Nobody is left who was training: the replacements start from what the keepers hold."""
    faults = [{"rank": rank, "phase": "compute", "step": 3} for rank in range(2)]
    faults += [{"rank": rank, "phase": "update", "step": 6, "incarnation": 1} for rank in range(2)]
    reference = run_job(nproc=1, steps=10)
    result = run_job(nproc=2, stages=2, steps=10, faults=faults)
    assert_same_run(result, reference)
    assert len(result.named("worker_died")) >= 4


def test_one_worker_alone() -> None:
    reference = run_job(nproc=2, steps=8)
    faults = [{"rank": 0, "phase": phase, "step": 2 + i, "incarnation": i} for i, phase in enumerate(PHASES[:5])]
    result = run_job(nproc=1, steps=8, faults=faults)
    assert_same_run(result, reference)
