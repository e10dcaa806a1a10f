"""A script that draws from the global generators of Python, NumPy and torch, in turns, forwards and between epochs.

The JSON argument says where the data comes from: "workers" and "stream" are read by worker processes, "stages" has two
pipeline stages, "here" is read by the ranks.
"""

import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import everstep

config = json.loads(sys.argv[1])
kind = config["kind"]
EPOCHS, SAMPLES = 4, 48
length = {"steps": 12} if kind == "stream" else {"epochs": EPOCHS}
run = everstep.join(**length, global_batch_size=12, micro_batch_size=2, seed=3, stages=2 if kind == "stages" else 1)
inputs = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(1))
targets = inputs.sum(1, keepdim=True)


def draw():
    return random.random() + np.random.rand() + float(torch.rand(()))


class Noisy(nn.Module):
    """A layer that draws in its forward."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.inner(x) * draw()


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from zip(inputs, targets, strict=True)


model = nn.Sequential(nn.Linear(4, 4), Noisy(), Noisy(), nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
data = Endless() if kind == "stream" else TensorDataset(inputs, targets)
loss_fn = nn.functional.mse_loss
drawn = run.state.setdefault("drawn", [])


@run.on_step
def between(step):
    drawn.append(draw())  # ranks that differ here end the job


def turns(batches, scale=1.0):
    for x, y in batches:
        loss_fn(model(x * draw() * scale), y).backward()
        optimizer.step()


if kind == "stages":
    for _ in run.steps(model, optimizer, data, loss_fn=loss_fn):
        drawn.append(draw())
else:
    loader = DataLoader(data, 12, num_workers=0 if kind == "here" else 1)
    model, optimizer, batches = run.prepare(model, optimizer, loader)
    if kind == "stream":
        turns(batches)
    else:
        for _ in run.epochs():
            turns(batches, scale=draw())
            drawn.append(draw())
state = run.full_state_dict()
last = draw()
torch.save({**state, "drawn": drawn, "last": last}, Path(config["out"]) / f"state-{os.environ.get('RANK', '0')}.pt")
