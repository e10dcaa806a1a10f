"""A queue of former embeddings, far larger than what a step can agree on: a buffer that each turn of the loop rewrites.

`rows`: of the queue. `plain`: without Everstep, by one process that sums the gradients of the four parts of a batch.
`resumes`: it gets SIGTERM after its third step, saves, ends, and is resumed in the same process.
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
mine = os.environ.get("RANK", "0")
STEPS, PARTS, PART, WIDTH = 9, 4, 2, 16
ROWS = config.get("rows", 1 << 17)  # 8 MiB


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(6, WIDTH)
        self.register_buffer("queue", torch.randn(ROWS, WIDTH))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))

    def forward(self, inputs):
        return self.encoder(inputs)

    def loss(self, found):
        return (found @ self.queue[:: ROWS // 64].T).square().mean() + found.square().mean()

    @torch.no_grad()
    def enqueue(self, found):
        """Writes rows all over the queue, not in one shard alone."""
        at = (int(self.pointer) + torch.arange(len(found)) * (ROWS // PART)) % ROWS
        self.queue[at] = found.detach()
        self.pointer += 1


def data():
    return torch.utils.data.TensorDataset(torch.randn(STEPS * PARTS * PART, 6))


def train_plain():
    torch.manual_seed(6)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = torch.utils.data.DataLoader(data(), batch_size=PART)
    sums = []
    for (inputs,) in loader:
        found = model(inputs)
        sums.append(torch.autograd.grad(model.loss(found), list(model.parameters())))
        if len(sums) == PARTS:  # each part begins with the queue of the step before; the last one's stays
            model.enqueue(found)
            for parameter, a, b, c, d in zip(model.parameters(), *sums, strict=True):
                parameter.grad = ((a + b) + (c + d)) / PARTS
            optimizer.step()
            sums = []
    torch.save(model.state_dict(), out / "state-0.pt")


@everstep.elastic(steps=STEPS, global_batch_size=PARTS * PART, micro_batch_size=PART, seed=6)
def train(run):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = torch.utils.data.DataLoader(data(), batch_size=PART)
    model, optimizer, loader = run.prepare(model, optimizer, loader, buffers={"queue": "last", "pointer": "last"})

    @run.on_step
    def stop(step):
        if config.get("resumes") and step.index == 2:
            signal.raise_signal(signal.SIGTERM)

    for (inputs,) in loader:
        found = model(inputs)
        model.loss(found).backward()
        model.enqueue(found)
        optimizer.step()
    torch.save(run.full_state_dict()["model"], out / f"state-{mine}.pt")


if __name__ == "__main__":
    while not (out / f"state-{mine}.pt").exists():
        try:
            (train_plain if config.get("plain") else train)()
        except SystemExit as ended:
            if ended.code != 128 + signal.SIGTERM:
                raise
