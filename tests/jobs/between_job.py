"""A script that does something else in its turns or between epochs; the JSON argument says what."""

import itertools
import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import everstep

config = json.loads(sys.argv[1])
kind = config["kind"]
samples = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))
others = DataLoader(TensorDataset(samples[:32].clone()), 4, shuffle=True, num_workers=int(kind == "next"))
length = {"steps": 8} if kind in ("counted", "range") else {"epochs": 2}
run = everstep.join(**length, global_batch_size=12, micro_batch_size=3, seed=3)
loader = DataLoader(TensorDataset(samples, samples.sum(1, keepdim=True)), 12, num_workers=int(kind == "turns"))
model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
model, optimizer, batches = run.prepare(model, optimizer, loader)


def evaluate():
    model.eval()
    with torch.no_grad():
        found = sum(float(model(inputs).sum()) for (inputs,) in others)
    model.train()
    return found


def turn(inputs, targets, more):
    loss = nn.functional.mse_loss(model(inputs), targets)
    if more is not None:
        loss = loss + model(more).square().mean()
    loss.backward()
    optimizer.step()


endless = itertools.cycle(others)
evaluate()
if kind == "counted":
    iterator = iter(batches)
    for _ in range(8):
        turn(*next(iterator), None)
for _ in () if kind == "counted" else range(2) if kind == "range" else run.epochs():
    if kind == "zip":
        for (inputs, targets), (more,) in zip(batches, endless, strict=False):
            turn(inputs, targets, more)
    else:
        forever = iter(others)
        for inputs, targets in batches:
            if kind == "turns":
                evaluate()
            if kind == "next" and run.step == 1:
                next(forever)
            turn(inputs, targets, None)
    if kind == "statistics":
        with torch.no_grad():
            model(samples)
    evaluate()
torch.save(run.full_state_dict(), Path(config["out"]) / "state.pt")
