"""Puts other weights into the model between two steps, in the ways that scripts do, and puts them back; or not.

The JSON argument: `loop` ("steps" or "prepare"), `how` (a key of SWAPS), `left` (whether they stay, and on which rank),
`kill` (the rank that dies while the others' weights are in the model).
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

import everstep

config = json.loads(sys.argv[1])
out = Path(config["out"])
mine = int(os.environ.get("RANK", "0"))
AT = 3  # the step after which it is done


def in_place(model, values):
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(value)


def through_data(model, values):
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.data.copy_(value)


def other_storage(model, values):
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.data = value.clone()


def state_dict(model, values):
    model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))


def one_row(model, values):
    parameter = list(model.parameters())[2]
    parameter.data[7].copy_(values[2][7])


def replaced(model, values):
    model[2].weight = nn.Parameter(values[2].clone())


SWAPS = {f.__name__: f for f in (in_place, through_data, other_storage, state_dict, one_row, replaced)}


def between(model, step):
    """The user's code after a step: an evaluation with averaged weights."""
    if step != AT or config.get("left", mine) != mine:
        return
    swap = SWAPS[config["how"]]
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    swap(model, [torch.full_like(value, 0.125) for value in kept])
    model(torch.ones(1, 8)).sum().item()
    if config.get("kill") == mine and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        marker = out / "killed"
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    if "asked" in config:  # the protected version is the committed one, not what the model holds now
        torch.save(run_now.full_state_dict(), out / f"asked-{mine}.pt")
    if "left" not in config:
        swap(model, kept)


def samples():
    generator = torch.Generator().manual_seed(5)
    return torch.utils.data.TensorDataset(
        torch.randn(48, 8, generator=generator), torch.randn(48, 1, generator=generator)
    )


@everstep.elastic(steps=config["steps"], global_batch_size=8, micro_batch_size=2, seed=4)
def train(run):
    global run_now
    run_now = run
    model = nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 90), nn.Tanh(), nn.Linear(90, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if config["loop"] == "steps":
        for step in run.steps(model, optimizer, samples(), loss_fn=nn.functional.mse_loss):
            between(model, step.index)
    else:
        model, optimizer, batches = run.prepare(model, optimizer, samples())
        seen = run.step
        for inputs, targets in batches:
            nn.functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()
            if run.step > seen:
                seen = run.step
                between(model, seen - 1)
    torch.save(run.full_state_dict(), out / f"state-{mine}.pt")


if __name__ == "__main__":
    train()
