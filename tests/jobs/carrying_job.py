"""A loop that carries something from turn to turn, which its loss depends on; the JSON argument says what."""

import copy
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

import everstep

config = json.loads(sys.argv[1])
kind = config["kind"]
samples = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))
dataset = TensorDataset(samples, samples.sum(1, keepdim=True))
run = everstep.join(epochs=3, global_batch_size=12, micro_batch_size=2, seed=3, repeat_every=1)


class Count:
    """Counts the batches of its epoch."""

    def __init__(self):
        self.turns = 0


model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
teacher = copy.deepcopy(model)
generator, numpy_generator = torch.Generator().manual_seed(5), np.random.default_rng(5)
queue, average, count, turns, losses = torch.zeros(8, 1), 1.0, Count(), 0, []


def measured(output, y):
    global turns
    turns += 1
    return nn.functional.mse_loss(output, y) * (1 + turns)


if kind == "loss_fn":
    for _ in run.steps(model, optimizer, dataset, loss_fn=measured):
        pass
else:
    model, optimizer, batches = run.prepare(model, optimizer, dataset)
    for _ in run.epochs():
        for i, (x, y) in enumerate(batches):
            if kind == "generator":
                x = x + torch.randn(x.shape, generator=generator)
            elif kind == "numpy_generator":
                x = x * numpy_generator.random()
            output = model(x * np.random.rand())
            loss = nn.functional.mse_loss(output, y)
            if kind == "enumerate":
                loss = loss / (1 + i)
            elif kind == "count":
                loss = loss / (1 + turns)
            elif kind == "object":
                loss = loss / (1 + count.turns)
            elif kind == "average":
                average = 0.9 * average + 0.1 * loss.item()
                loss = loss / average
            elif kind == "queue":
                loss = loss + (output - queue[0]).square().mean()
                queue = torch.cat([output.detach(), queue])[:8]
            elif kind == "teacher":
                loss = loss + (output - teacher(x).detach()).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())  # harmless, as what is only logged
            turns += 1
            count.turns += 1
            with torch.no_grad():
                for follower, leader in zip(teacher.parameters(), model.parameters(), strict=True):
                    follower.lerp_(leader, 0.1)
torch.save(run.full_state_dict(), Path(config["out"]) / f"state-{os.environ.get('RANK', '0')}.pt")
