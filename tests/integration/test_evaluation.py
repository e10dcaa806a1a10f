"""`run.evaluate` on several stages: the results of one stage, whoever is lost meanwhile, whatever a sampler chooses."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.jobs import JOBS, assert_same_state, everstep, run_job, same
from tests.jobs.interpreter import script

KILLS = [[0, 1], [2, 3], [1, 5], [0, 8]]


def test_several_stages_give_what_one_gives(tmp_path: Path) -> None:
    ended = script(JOBS / "evaluation_job.py", json.dumps({"out": str(tmp_path), "stages": 1}))
    assert ended.status == 0, ended.stderr
    expected = torch.load(tmp_path / "state-0.pt", weights_only=True)
    shared = expected.pop("shared")
    by_chance = {name: shared.pop(name) for name in ("samples 8", "losses 8", "values 8")}
    assert shared["samples 6"].tolist() == list(range(11))
    drawn = shared["samples 3"].tolist()
    assert len(drawn) == 13
    assert len(set(drawn)) < 11, "the sampler draws with replacement"
    assert drawn != sorted(drawn)
    assert shared["values 6"].shape == (11, 12 + 8)
    assert not torch.equal(shared["values 5"], shared["values 6"]), "the averages are other values"
    result = run_job(nproc=3, script="evaluation_job.py", stages=2, kills=KILLS)
    assert result.status == 0, result.output
    assert [event["rank"] for event in result.named("worker_died")] == [rank for rank, _ in KILLS]
    choices = []
    for rank in range(3):
        found = result.state(rank)
        values = found.pop("shared")
        choices.append([values.pop(name) for name in by_chance])
        assert sorted(choices[-1][0].tolist()) == list(range(11)), "each sample once, through the loss"
        assert values.keys() == shared.keys()
        assert all(same(values[name], value) for name, value in shared.items())
        assert_same_state(found, expected)
    assert all(same(a, b) for found in choices for a, b in zip(found, choices[0], strict=True))


def test_the_function_raises(tmp_path: Path) -> None:
    """The error names the batch, and the traceback is the user's."""
    arguments = [str(JOBS / "evaluation_job.py"), json.dumps({"out": str(tmp_path), "stages": 2, "raises": 3})]
    ended = everstep("run", "--nproc-per-node=2", f"--log-dir={tmp_path}/logs", *arguments)
    assert ended.status == 1
    assert "raised ValueError for batch 1 (samples 2 to 3): the user's own mistake" in ended.stderr.splitlines()[-1]
    assert 'raise ValueError("the user\'s own mistake")' in ended.stderr
