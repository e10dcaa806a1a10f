"""Ranks die while partial sums of their last micro-batch are under way: the same bytes, and no part of an old step."""

from __future__ import annotations

import torch

from tests.jobs import assert_same_state, run_job

STEPS = 9
KILLS = [  # rank, step, layer whose gradient is there: the last of the backward, one in its middle, the first
    (0, 2, 0),
    (1, 3, 2),
    (2, 4, 4),
    (1, 6, 1),
]
FAULTS = [{"rank": 0, "phase": "reduce", "step": 7, "incarnation": 1}]  # all parts are out, and what confirms them not


def test_ranks_die_while_parts_are_under_way() -> None:
    alone = run_job(nproc=1, steps=STEPS, script="wide_job.py", kills=[])
    assert alone.status == 0, alone.output
    flags = ["--es-tcp"]  # as between hosts
    result = run_job(nproc=3, steps=STEPS, script="wide_job.py", kills=KILLS, faults=FAULTS, flags=flags)
    assert result.status == 0, result.output
    assert len(result.named("worker_died")) == len(KILLS) + len(FAULTS), result.named("worker_died")
    rank, step, layer = KILLS[0]  # of three ranks, at the end of its backward, where all parts are out
    assert int((result.out / f"killed-{rank}-{step}-{layer}").read_text()) > 0
    states = list(result.out.glob("state-*.pt"))
    assert states
    for path in states:
        assert_same_state(torch.load(path, weights_only=True), alone.state())
