"""A loss over the embeddings of a global batch: the numbers of plain torch, and with kills the same bytes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs import JOBS, run_job, same
from tests.jobs.embeddings_job import BATCH, BATCHES, CLIP, PAIRS, Encoder, loss_of, optimizer_of
from tests.jobs.interpreter import Ended, script


def ended(out: Path, checkpoint: str = "", steps: int = 2 * BATCHES, **config: Any) -> Ended:
    """Without the launcher: one rank."""
    out.mkdir(exist_ok=True)
    arguments = json.dumps({"out": str(out), "steps": steps, "dropout": 0.2, **config})
    environment = {"EVERSTEP_CHECKPOINT": checkpoint} if checkpoint else {}
    return script(JOBS / "embeddings_job.py", arguments, environment=environment)


def alone(out: Path, checkpoint: str = "", **config: Any) -> dict[str, Any]:
    done = ended(out, checkpoint, **config)
    assert done.status == 0, done.stderr
    state: dict[str, Any] = torch.load(out / "state-0.pt", weights_only=True)
    return state


def plain_torch() -> tuple[dict[str, Any], list[float]]:
    """The same training in plain torch, with the whole batch at once: its parameters, and its losses."""
    torch.manual_seed(5)
    model, losses = Encoder(0.0), []
    optimizer = optimizer_of(model)
    for number in range(BATCHES):
        batch = torch.stack([PAIRS[(BATCH * number + i) % len(PAIRS)] for i in range(BATCH)])
        loss = loss_of(model, model(batch))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(float(loss.detach()))
    return model.state_dict(), losses


def test_the_numbers_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    """Of three micro-batches: the loss that each of them sees, and what is trained, the temperature too."""
    found, (expected, losses) = alone(tmp_path, dropout=0.0), plain_torch()
    assert found["model"].keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found["model"][name], value, rtol=1e-4, atol=1e-5)
    assert [step for step, _ in found["losses"]] == [2 * i + 1 for i in range(BATCHES) for _ in range(3)]
    assert [loss for _, loss in found["losses"]] == pytest.approx([x for x in losses for _ in range(3)], rel=1e-4)


def test_a_scale_of_the_losses(tmp_path: Path) -> None:
    """It changes by gradients alone: that embeddings are put together in between neither raises nor lowers it."""
    found = alone(tmp_path, dropout=0.0, scaler=True)
    scale, finite = 2.0**16, 0
    skipped = [not math.isfinite(norm) for norm in found["norms"]]
    assert not any(skipped[::2]), "the embeddings"
    assert 0 < sum(skipped) < BATCHES - 2
    for number, overflows in enumerate(skipped[1::2]):
        assert found["scales"][6 * number : 6 * number + 6] == [scale] * 6
        finite = 0 if overflows else finite + 1
        scale *= 0.5 if overflows else 2.0 if finite == 2 else 1.0
        finite %= 2
    assert found["scaler"]["scale"] == scale
    assert found["skipped"] == sum(skipped)


KILLS = [
    {"rank": 1, "phase": "compute", "step": 2, "after": 1},
    {"rank": 2, "phase": "compute", "step": 3, "after": 1},
    {"rank": 0, "phase": "agree", "step": 4},
    {"rank": 1, "phase": "update", "step": 6, "incarnation": 1},
    {"rank": 2, "phase": "commit", "step": 7, "incarnation": 1},
]


def states_equal(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Parameters and momentum, by `torch.equal`, and the scale of losses."""
    if (found["scaler"], found["skipped"]) != (expected["scaler"], expected["skipped"]):
        return False
    momenta = [[s["momentum_buffer"] for s in one["optimizer"]["state"].values()] for one in (found, expected)]
    values = [[*one["model"].values(), *momentum] for one, momentum in zip((found, expected), momenta, strict=True)]
    return all(same(a, b) for a, b in zip(*values, strict=True))


def test_ranks_die(tmp_path: Path) -> None:
    """While embeddings are collected and while they are used; one micro-batch for each rank, and three for one."""
    expected = alone(tmp_path, scaler=True)
    config = {"steps": 2 * BATCHES, "dropout": 0.2, "scaler": True}
    result = run_job(nproc=3, script="embeddings_job.py", faults=KILLS, **config)
    assert result.status == 0, result.output
    assert len(result.named("worker_died")) == len(KILLS)
    finished = list(result.out.glob("state-*.pt"))
    assert finished
    assert all(states_equal(torch.load(path, weights_only=True), expected) for path in finished)


def test_resumes_between_embeddings_and_their_use(tmp_path: Path) -> None:
    checkpoint = str(tmp_path / "saved")
    stopped = alone(tmp_path / "first", checkpoint, stop=5)
    assert stopped["losses"][-1][0] == 5
    assert states_equal(alone(tmp_path / "second", checkpoint), alone(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("no size", "run.prepare(..., embedding_size="),
        ("empty", "embedding_size is how many numbers run.gather_batch takes of a sample, got 0"),
        ("shape", "takes a tensor of shape (4, 6), (micro_batch_size, embedding_size), got one of shape (4, 4)"),
        ("no call", "run.gather_batch() was not called in a turn of the loop: each turn has one call of each"),
        ("twice", "call it once in each turn of the loop, before optimizer.step()"),
        ("short", 'embedding_size=6 needs batches of one size: last_batch="drop" or "pad", got "short"'),
        ("reduction", "embedding_size=6 needs loss_reduction=\"mean\", got 'sum'"),
    ],
)
def test_mistakes(mistake: str, said: str, tmp_path: Path) -> None:
    assert said in ended(tmp_path, mistake=mistake).error()


def test_an_odd_number_of_steps(tmp_path: Path) -> None:
    assert "steps=7 must be a multiple of 2: with embedding_size=6" in ended(tmp_path, steps=7).error()
