"""The user's own loop: any model and optimizer, alone or on several workers, with kills: the same bytes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import JOBS, Result, assert_same_state, command, read_result, run_job
from tests.jobs.interpreter import script

STEPS = 9
KILLS = [
    {"rank": 0, "phase": "compute", "step": 2, "after": 1},
    {"rank": 1, "phase": "compute", "step": 3},
    {"rank": 2, "phase": "reduce", "step": 3},
    {"rank": 1, "phase": "update", "step": 5, "incarnation": 1},
    {"rank": 0, "phase": "agree", "step": 6, "incarnation": 1},
    {"rank": 2, "phase": "commit", "step": 7, "incarnation": 1},
]
VARIANTS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "whole": {"optimizer": "whole"},
    "adam-bfloat16": {"optimizer": "adam", "dtype": "bfloat16", "batch_norm": False},
    "adam-float64": {"optimizer": "adam", "dtype": "float64"},
    "adam-autocast": {"optimizer": "adam", "autocast": True},
}


def alone(out: Path, config: dict[str, Any]) -> Result:
    """`python loop_job.py`, without the launcher."""
    out.mkdir()
    (out / "events.jsonl").touch()
    ended = script(JOBS / "loop_job.py", json.dumps({"out": str(out), "steps": STEPS, **config}))
    return read_result(out, ended.status, ended.stderr)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "sgd" else pytest.mark.soak) for name in VARIANTS]
)
def test_the_users_loop(name: str, tmp_path: Path) -> None:
    """Alone, and on three workers of which each is killed twice."""
    config = VARIANTS[name]
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(alone, tmp_path / "alone", config)
        result = run_job(nproc=3, steps=STEPS, script="loop_job.py", faults=KILLS, **config)
        reference = waiting.result()
    assert reference.status == 0, reference.output
    assert result.status == 0, result.output
    assert len(result.named("worker_died")) == len(KILLS)
    finished = [int(path.stem.removeprefix("state-")) for path in result.out.glob("state-*.pt")]
    assert finished, "who died in the last steps may not be back, but the others are there"
    for rank in finished:
        assert_same_state(result.state(rank), reference.state())
    rates = {line["lr"] for lines in (*result.workers.values(), *reference.workers.values()) for line in lines}
    assert len(rates) == 1, rates
    if name == "sgd":
        undisturbed = run_job(nproc=3, steps=STEPS, script="loop_job.py", **config)
        assert_same_state(undisturbed.state(1), reference.state())


IMPORTS = """
import sys
import torch
import everstep

@everstep.elastic(steps=2, global_batch_size=2, micro_batch_size=1)
def train(run):
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    data = [(torch.ones(4), torch.ones(1))] * 4
    for step in run.steps(model, optimizer, data, loss_fn=torch.nn.functional.mse_loss):
        pass
    assert "sympy" not in sys.modules

train()
"""


def test_what_is_dear_to_import_is_not_imported(tmp_path: Path) -> None:
    """Every replacement would wait for it: sympy, which torch imports for some operations, takes a second."""
    script = tmp_path / "script.py"
    script.write_text(IMPORTS)
    ended = command(["-m", "everstep", "run", "--standalone", "--nproc-per-node=1", str(script)])
    assert ended.status == 0, ended.stderr
