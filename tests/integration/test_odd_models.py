"""Models with unusual memory layouts or parameters: the results of plain torch, with kills too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.jobs import JOBS, assert_same_state, run_job
from tests.jobs.interpreter import script

STEPS = 5
KINDS = ["channels_last", "transposed", "sliced", "empty", "unused", "sometimes", "weight_norm", "tied", "lazy"]
KINDS += ["compiled", "buffers", "spectral", "codebook", "experts", "synced"]
KILLS = [
    {"rank": 0, "phase": "compute", "step": 1},
    {"rank": 1, "phase": "update", "step": 2},
    {"rank": 0, "phase": "commit", "step": 3, "incarnation": 1},
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them, one after the other, without the launcher, and plain torch beside it."""
    out = tmp_path_factory.mktemp("alone")
    config = {"out": str(out), "kinds": KINDS, "steps": STEPS, "plain": True}
    ended = script(JOBS / "odd_models_job.py", json.dumps(config))
    assert ended.status == 0, ended.stderr
    return out


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_plain_torch(kind: str, alone: Path) -> None:
    found, expected = load(alone / f"state-{kind}-alone.pt"), load(alone / f"plain-{kind}.pt")
    assert_same_state(found, expected)
    assert found["optimizer"].keys() == expected["optimizer"].keys(), "no state where there was no gradient"


@pytest.mark.parametrize("kind", ["channels_last", "sometimes", "buffers", "codebook", "experts", "synced"])
def test_with_kills(kind: str, alone: Path) -> None:
    result = run_job(nproc=2, steps=STEPS, script="odd_models_job.py", kinds=[kind], faults=KILLS)
    assert result.status == 0, result.output
    assert len(result.named("worker_died")) == len(KILLS)
    states = [load(path) for path in result.out.glob(f"state-{kind}-*.pt")]
    assert states
    for state in states:
        assert_same_state(state, load(alone / f"state-{kind}-alone.pt"))


@pytest.mark.parametrize("first", [pytest.param(True, marks=pytest.mark.soak), False])
def test_compiled_goes_on_uncompiled(first: bool, tmp_path: Path, alone: Path) -> None:
    """And the other way round: names in checkpoints are those without torch.compile."""
    flags = [f"--es-checkpoint={tmp_path / 'saved'}"]
    for steps, uncompiled in ((3, first), (STEPS, not first)):
        result = run_job(
            nproc=2, steps=steps, script="odd_models_job.py", kinds=["compiled"], flags=flags, uncompiled=uncompiled
        )
        assert result.status == 0, result.output
    assert_same_state(load(result.out / "state-compiled-0.pt"), load(alone / "state-compiled-alone.pt"))


def test_the_state_of_a_channels_last_model_is_one_that_torch_loads(alone: Path) -> None:
    state = load(alone / "state-channels_last-alone.pt")["model"]
    model = nn.Conv2d(3, 8, 3, padding=1).to(memory_format=torch.channels_last)
    model.load_state_dict({name.removeprefix("conv."): t for name, t in state.items() if name.startswith("conv.")})
    assert torch.equal(model.weight, state["conv.weight"])
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
