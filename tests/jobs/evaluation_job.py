"""A job of several stages that evaluates its whole model on all ranks, after every second step and behind its loop.

`stages`: of the job. `kills`: [rank, number of an evaluation]: where a process of that rank kills itself, once, when it
has a first result. `raises`: the sample that the evaluation fails for.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

import torch
from torch import nn

import everstep

config = json.loads(sys.argv[1])
out = Path(config["out"])
mine = int(os.environ.get("RANK", "0"))


class Words(nn.Module):
    """A tied embedding, statistics that forwards change, a frozen layer, and a buffer that no forward changes."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.hidden = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh())
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.frozen.register_buffer("scale", torch.rand(8))
        self.out = nn.Linear(8, 12, bias=False)
        self.out.weight = self.embedding.weight

    def pipeline_layers(self):
        return [self.embedding, self.hidden, self.frozen, self.out]

    def forward(self, x):
        for layer in self.pipeline_layers():
            x = layer(x)
        return x


class Own(torch.utils.data.Sampler):
    """Every sample once, in an order that no seed decides: another one on each rank."""

    def __iter__(self):
        return iter(random.SystemRandom().sample(range(11), 11))


def evaluated(run, model, number, sampler=None, **how):
    had = []

    def results(batch):
        inputs, targets = batch
        marker = out / f"killed-{mine}-{number}"
        if had and [mine, number] in config.get("kills", []) and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if config.get("raises", -1) in inputs.tolist():
            raise ValueError("the user's own mistake")
        assert not model.training
        outputs = model(inputs)
        had.append(len(inputs))
        hidden = model.hidden(model.embedding(inputs)) + torch.rand(8) * 1e-3
        return nn.functional.cross_entropy(outputs, targets).item(), outputs, hidden, inputs

    sizes = [parameter.numel() for parameter in model.parameters()]
    generator, generation = torch.get_rng_state(), run.generation
    data = torch.utils.data.TensorDataset(torch.arange(11), (torch.arange(11) * 5) % 12)
    found = run.evaluate(torch.utils.data.DataLoader(data, batch_size=2, sampler=sampler), results, **how)
    if run.generation == generation:  # and so with the same layers
        assert sizes == [parameter.numel() for parameter in model.parameters()], "what others have is released"
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.training
    losses, outputs, hidden, inputs = zip(*found, strict=True)
    run.state[f"samples {number}"] = torch.cat(inputs)
    run.state[f"losses {number}"], run.state[f"values {number}"] = (
        losses,
        torch.cat([torch.cat(outputs), torch.cat(hidden)], 1),
    )


@everstep.elastic(steps=5, stages=config["stages"], global_batch_size=8, micro_batch_size=2, seed=5)
def train(run):
    model = Words()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    run.average(model, 0.75)
    data = torch.utils.data.TensorDataset(torch.arange(40) % 12, (torch.arange(40) * 7) % 12)
    drawn = torch.utils.data.WeightedRandomSampler([1.0, 3.0] * 5 + [0.0], 13)
    for step in run.steps(model, optimizer, data, loss_fn=nn.functional.cross_entropy):
        if step.index % 2 == 1:
            evaluated(run, model, step.index, drawn if step.index == 3 else None)
    evaluated(run, model, 5, average=True)
    evaluated(run, model, 6)
    evaluated(run, model, 8, Own())
    torch.save({**run.full_state_dict(), "shared": dict(run.state)}, out / f"state-{mine}.pt")


if __name__ == "__main__":
    train()
