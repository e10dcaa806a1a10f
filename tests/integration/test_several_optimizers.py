"""A GAN in the user's own loop: the numbers of plain torch, and with kills the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.jobs import JOBS, run_job, same
from tests.jobs.gan_job import EVERY, SAMPLES, loss_of_d, loss_of_g, models, optimizers, scaler_of
from tests.jobs.interpreter import script

BATCHES = {"alternating": 7, "simultaneous": 7, "critic": 6}
STEPS = {"alternating": 14, "simultaneous": 7, "critic": 8}


def alone(out: Path, checkpoint: str = "", **config: Any) -> dict[str, Any]:
    """Without the launcher: one rank."""
    out.mkdir(exist_ok=True)
    arguments = json.dumps({"out": str(out), "steps": STEPS[config["updates"]], **config})
    environment = {"EVERSTEP_CHECKPOINT": checkpoint} if checkpoint else {}
    ended = script(JOBS / "gan_job.py", arguments, environment=environment)
    assert ended.status == 0, ended.stderr
    state: dict[str, Any] = torch.load(out / "state-0.pt", weights_only=True)
    return state


def differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """Where two states differ, tensors by `torch.equal`; ranks have turns and draws of their own."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        names = expected.keys() - {"draws"}
        return [bad for name in names for bad in differences(found[name], expected[name], f"{where}/{name}")]
    if isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        return [bad for i, item in enumerate(expected) for bad in differences(found[i], item, f"{where}/{i}")]
    return [] if same(found, expected) else [where]


def mean_gradients(losses: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
    """The mean of the gradients of four micro-batches, in the order in which the runtime sums."""
    first, *others = [torch.autograd.grad(loss, parameters) for loss in losses]
    assert len(others) == 3
    return [((a + b) + (c + d)) / 4 for a, b, c, d in zip(first, *others, strict=True)]


def plain_torch(updates: str, scaled: bool) -> dict[str, Any]:
    """The same training in plain torch, with the gradients of micro-batches summed by hand."""
    scaler, skipped = scaler_of(scaled), 0
    torch.manual_seed(5)
    g, d = models(plain=True)
    (opt_g, opt_d), rates = optimizers(g, d)

    def gradients(optimizer: torch.optim.Optimizer, batches: list[Any]) -> None:
        with torch.autocast("cpu", torch.float16, enabled=scaled):
            fakes = [(real, g(noise)) for real, noise in batches]
            of_d = optimizer is opt_d
            losses = [loss_of_d(d, real, fake) if of_d else loss_of_g(d, fake) for real, fake in fakes]
        losses = [scaler.scale(loss) for loss in losses]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter, gradient in zip(parameters, mean_gradients(losses, parameters), strict=True):
            parameter.grad = gradient
        nonlocal skipped
        skipped += scaled and not all(bool(p.grad.isfinite().all()) for p in parameters if p.grad is not None)

    average = {name: value.clone() for name, value in g.state_dict().items()}
    for number in range(BATCHES[updates]):
        samples = [SAMPLES[(8 * number + i) % len(SAMPLES)] for i in range(8)]
        batches = [torch.utils.data.default_collate(samples[i : i + 2]) for i in range(0, 8, 2)]
        gradients(opt_d, batches)
        if updates == "simultaneous":
            gradients(opt_g, batches)
            scaler.step(opt_d)
        else:
            scaler.step(opt_d)
        is_due = updates != "critic" or number % EVERY[0] == 0
        if is_due:
            if updates != "simultaneous":
                gradients(opt_g, batches)
            scaler.step(opt_g)
        scaler.update()
        for rate in rates:
            rate.step()
        for name, value in g.state_dict().items() if is_due else ():
            average[name].lerp_(value, 0.25)
    state = {"g": g.state_dict(), "d": d.state_dict(), "opt_g": opt_g.state_dict(), "opt_d": opt_d.state_dict()}
    return {**state, "average": average, "scaler": scaler.state_dict(), "skipped": skipped}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the scaler leaves out the first step
@pytest.mark.parametrize(
    ("updates", "scaled"),
    [("alternating", False), ("simultaneous", False), ("critic", False), ("alternating", True), ("critic", True)],
)
def test_the_numbers_are_those_of_plain_torch(updates: str, scaled: bool, tmp_path: Path) -> None:
    """Parameters, averages of one model, the state of both optimizers, the rates of schedulers, and the loss scale."""
    found, expected = alone(tmp_path, plain=True, updates=updates, scaler=scaled), plain_torch(updates, scaled)
    assert len(found.pop("norms")) == STEPS[updates]
    draws = torch.stack(found.pop("draws"))
    assert len(draws) == 4 * STEPS[updates]
    if updates == "alternating":  # both turns of a micro-batch have the same random numbers
        assert torch.equal(draws[0:4], draws[4:8])
    assert len(draws.unique(dim=0)) == 4 * BATCHES[updates]
    for name in ("opt_g", "opt_d"):
        for groups in (found[name]["param_groups"], expected[name]["param_groups"]):
            for group in groups:
                group.pop("initial_lr", None)
    assert not differences(found, expected)


KILLS = [
    {"rank": 1, "phase": "compute", "step": 2, "after": 1},
    {"rank": 2, "phase": "agree", "step": 3},
    {"rank": 0, "phase": "update", "step": 5},
]


@pytest.mark.parametrize("updates", STEPS)
def test_ranks_die(updates: str, tmp_path: Path) -> None:
    """Dropout, spectral norm, clipping, a discriminator that is frozen in turns, rates, and a scale of the losses."""
    scaled = updates != "simultaneous"
    expected = alone(tmp_path, plain=False, updates=updates, scaler=scaled)
    config = {"steps": STEPS[updates], "plain": False, "updates": updates, "scaler": scaled}
    result = run_job(nproc=3, script="gan_job.py", faults=KILLS, **config)
    assert result.status == 0, result.output
    assert len(result.named("worker_died")) == len(KILLS)
    finished = list(result.out.glob("state-*.pt"))
    assert finished, "who died in the last steps may not be back, but the others are there"
    for path in finished:
        assert not differences(torch.load(path, weights_only=True), expected)


@pytest.mark.parametrize("updates", STEPS)
def test_resumes_between_the_steps_of_a_batch(updates: str, tmp_path: Path) -> None:
    config = {"plain": False, "updates": updates, "scaler": updates != "simultaneous"}
    checkpoint = str(tmp_path / "saved")
    stopped = alone(tmp_path / "first", checkpoint, stop=5 if updates == "alternating" else 3, **config)
    assert 0 < len(stopped["norms"]) < STEPS[updates]
    assert updates == "simultaneous" or len(stopped["norms"]) % 2
    resumed, expected = alone(tmp_path / "second", checkpoint, **config), alone(tmp_path / "whole", **config)
    assert not differences(resumed, expected)
