"""A model of very many small parameters, like a mixture of experts; optionally with a large registered state."""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

import everstep

config = json.loads(sys.argv[1])
out = Path(config["out"])


class Experts(nn.Module):
    def __init__(self, parameters):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(parameters // 2 - 1))
        self.last = nn.Linear(4, 1)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x) / len(self.layers)
        return self.last(x)


class Growing:
    """Something that a script keeps, of `kib` KiB, and from one step on of ten times that."""

    def __init__(self, kib):
        self.text = "x" * (kib << 10)

    def state_dict(self):
        return {"text": self.text}

    def load_state_dict(self, state):
        self.text = state["text"]


@everstep.elastic(steps=config["steps"], global_batch_size=8, micro_batch_size=2, seed=3)
def train(run):
    model = Experts(config.get("parameters", 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    data = torch.utils.data.TensorDataset(torch.randn(40, 4), torch.randn(40, 1))
    kept = [Growing(kib) for kib in config.get("registered_kib", [])]
    for number, item in enumerate(kept):
        run.register_state(f"kept-{number}", item)
    mine = os.environ.get("RANK", "0")
    with (out / f"worker-{mine}-{os.getpid()}.jsonl").open("w", buffering=1) as log:
        for step in run.steps(model, optimizer, data, loss_fn=nn.functional.mse_loss):
            log.write(json.dumps({"step": step.index, "loss": step.loss, "pid": os.getpid()}) + "\n")
            if step.index == config.get("grows_at"):
                kept[0].text *= 10
            if step.index == config.get("raises_at"):
                raise ValueError("a row of the data: " + "9" * (32 << 20))
    torch.save(run.full_state_dict(), out / f"state-{mine}.pt")


if __name__ == "__main__":
    train()
