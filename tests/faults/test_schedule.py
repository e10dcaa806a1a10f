"""Every rank is killed in every phase, in every kind of layout; the run must be the undisturbed one, bit for bit."""

from __future__ import annotations

import random

import pytest

from tests.jobs import assert_same_run, reference, run_job

PHASES = ("compute", "reduce", "agree", "update", "commit", "recover", "restore", "join")
LAYOUTS = {"1x4": (1, 4), "2x2": (2, 4), "4x1": (4, 4), "uneven": (2, 3)}
SEED = 20
PATIENT = ["--es-hang-timeout=60"]  # a busy machine must not cause a hang, which would take the place of a kill


def schedule(workers: int, seed: int) -> list[dict[str, object]]:
    """For each rank a seeded order of the phases: each incarnation of it dies in the next one."""
    rng = random.Random(seed)
    faults: list[dict[str, object]] = []
    for rank in range(workers):
        phases = list(PHASES)
        rng.shuffle(phases)
        if phases[0] == "join":  # the first incarnation does not join
            phases.append(phases.pop(0))
        for incarnation, phase in enumerate(phases):
            step = 0 if phase == "join" else 2 + incarnation * 5 + rng.randrange(4)
            after = rng.randrange(3) if phase == "compute" else 0
            faults.append({"rank": rank, "incarnation": incarnation, "phase": phase, "step": step, "after": after})
    return faults


# One layout is enough for each change; the one whose stages share a parameter is the most delicate.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "2x2" else pytest.mark.soak) for name in LAYOUTS]
)
def test_kill_every_rank_in_every_phase(name: str) -> None:
    stages, workers = LAYOUTS[name]
    steps, config = 60, {"tied": True} if name == "2x2" else {}
    faults = schedule(workers, SEED)
    result = run_job(nproc=workers, stages=stages, steps=steps, faults=faults, flags=PATIENT, timeout_s=200, **config)
    assert_same_run(result, reference(steps, **config))
    died = [(e["rank"], e["incarnation"], e["phase"], e["step"], e["cause"]) for e in result.named("worker_died")]
    assert {cause for *_, cause in died} == {"killed by SIGKILL"}, died
    missed = {(rank, phase) for rank in range(workers) for phase in PHASES} - {(found[0], found[2]) for found in died}
    assert not missed, f"never killed in these places: {sorted(missed)}; but {sorted(died)}"
