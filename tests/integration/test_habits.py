"""The usual code around a training loop, and the loops that the README shows: killed on the way, equal at the end."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.jobs import JOBS, Result, assert_same_state, command, read_result, run_job
from tests.messages import ROOT

KILLS = [
    {"rank": 0, "phase": "compute", "step": 5},
    {"rank": 1, "phase": "commit", "step": 9},
    {"rank": 2, "phase": "reduce", "step": 13},
    {"rank": 0, "phase": "update", "step": 17, "incarnation": 1},
]


def alone(out: Path, script: str | Path, **config: object) -> Result:
    out.mkdir()
    (out / "events.jsonl").touch()
    ended = command([str(script), json.dumps({"out": str(out), **config})])
    return read_result(out, ended.status, ended.stderr)


@pytest.mark.parametrize("loop", [pytest.param(True, marks=pytest.mark.soak), False])
def test_what_scripts_have_around_their_loop(loop: bool, tmp_path: Path) -> None:
    reference = alone(tmp_path / "alone", JOBS / "habits_job.py", loop=loop)
    assert reference.status == 0, reference.output
    result = run_job(nproc=3, steps=0, script="habits_job.py", faults=KILLS, loop=loop)
    assert result.status == 0, result.output
    assert result.named("worker_died")
    finished = [int(path.stem.removeprefix("state-")) for path in result.out.glob("state-*.pt")]
    assert finished
    for rank in finished:
        assert_same_state(result.state(rank), reference.state())
        assert (result.out / f"after-{rank}").exists(), "the code after the loop ran"
    expected = (reference.out / "tracked-0").read_text().splitlines()
    tracked = {line for path in result.out.glob("tracked-*") for line in path.read_text().splitlines()}
    assert tracked == set(expected), "each step was seen with the same scores, and none beside them"


PREAMBLE = """
import json, os, sys, torch, everstep
from torch import nn
from torch.optim import AdamW
out = json.loads(sys.argv[1])["out"]
class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
dataset = [(torch.randn(4, generator=torch.Generator().manual_seed(i)), torch.full((1,), i / 99)) for i in range(128)]
loss_fn = nn.functional.mse_loss
"""
EPILOGUE = """
    torch.save(run.full_state_dict(), f"{out}/state-{os.environ.get('RANK', 0)}.pt")
train()
"""


def of_the_readme() -> list[str]:
    """Its two training functions: what stands to the right of the first one, and the second."""
    first, second = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[:2]
    lines = first.splitlines()
    column = next(line.index("import everstep") for line in lines if "import everstep" in line)
    after = "\n".join(line[column:] for line in lines[1:])
    return [
        after,
        second.replace("nn.Sequential(...) ", "nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)) "),
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_the_loops_of_the_readme(number: int, tmp_path: Path) -> None:
    script = tmp_path / "readme.py"
    text = of_the_readme()[number].replace("steps=200", "steps=12")
    assert "steps=12" in text, text
    script.write_text(PREAMBLE + text.rstrip() + EPILOGUE)
    reference = alone(tmp_path / "alone", script)
    assert reference.status == 0, reference.output
    kills = [{"rank": 1, "phase": "compute", "step": 4}, {"rank": 2, "phase": "reduce", "step": 7}]
    result = run_job(nproc=3, steps=0, script=str(script), faults=kills)
    assert result.status == 0, result.output
    assert len(result.named("worker_died")) == 2
    finished = [int(path.stem.removeprefix("state-")) for path in result.out.glob("state-*.pt")]
    assert finished
    for rank in finished:
        assert_same_state(result.state(rank), reference.state())
