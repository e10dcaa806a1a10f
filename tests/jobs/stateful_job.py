"""A job with its own states, of tensors, tuples and generators, on which training depends."""

import json
import sys
from pathlib import Path

import torch

import everstep

config = json.loads(sys.argv[1])
out = Path(config["out"])


class Noise:
    """Weights of the loss, drawn from a generator: what it drew last is kept, too."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)
        self.last = torch.zeros(2, dtype=torch.bfloat16)
        self.seen = (0, {1: "one"}, b"\x00\xff")

    def draw(self, step):
        self.last = torch.rand(2, generator=self.generator).bfloat16()
        self.seen = (step, {step: "step"}, bytes([step]))
        return self.last

    def state_dict(self):
        return {"generator": self.generator.get_state(), "last": self.last, "seen": self.seen}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])
        self.last, self.seen = state["last"], state["seen"]


@everstep.elastic(steps=config["steps"], global_batch_size=8, micro_batch_size=2, seed=1)
def train(run):
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    noise = Noise()
    run.register_state("noise", noise)
    data = torch.utils.data.TensorDataset(torch.randn(40, 5), torch.randn(40, 3))
    loss_fn = torch.nn.functional.mse_loss
    for step in run.steps(model, optimizer, data, loss_fn=loss_fn):
        drawn = noise.draw(step.index + 1)
        if run.rank == 0:
            print(json.dumps([step.index, step.loss, drawn.tolist(), noise.seen[0], noise.seen[2].hex()]), flush=True)
        for group in optimizer.param_groups:  # what is drawn decides how the next step is taken
            group["lr"] = float(drawn[0]) / 10


if __name__ == "__main__":
    train()
