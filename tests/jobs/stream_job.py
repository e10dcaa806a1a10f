"""A job over a stream that ends before the last step; the JSON argument says how the stream is divided and given.

`workers`: how many worker processes the DataLoader has. `kills`: after this step, rank 0 kills them, once.
"""

import json
import multiprocessing
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
mine = os.environ.get("RANK", "0")


class Numbers(torch.utils.data.IterableDataset):
    """Samples with noise, shuffled through a buffer, as streams of text are."""

    def __init__(self, run):
        self.run = run

    def part(self):
        return (self.run.stream_index, self.run.stream_count) if config.get("divided") else (0, 1)

    def __iter__(self):
        first, step = self.part()
        buffer = []
        for number in range(first, config["samples"], step):
            buffer.append((torch.full((4,), number / 50) + torch.rand(4) / 10, torch.full((1,), number / 50)))
            if len(buffer) > 3:
                yield buffer.pop(random.randrange(len(buffer)))
        yield from buffer


class Resumable(Numbers):
    """The same with a state; it notes with how many samples each iteration begins."""

    def __init__(self, run):
        super().__init__(run)
        self.state = {"number": 0, "buffer": []}

    def __iter__(self):
        state = self.state
        first, step = self.part()
        with (out / f"begun-{mine}").open("a") as file:
            file.write(f"{state['number']}\n")
        while (number := first + state["number"] * step) < config["samples"] or state["buffer"]:
            if number < config["samples"]:
                value = number / 50
                state["buffer"].append((torch.full((4,), value) + torch.rand(4) / 10, torch.full((1,), value)))
                state["number"] += 1
            if len(state["buffer"]) > 3 or number >= config["samples"]:
                yield state["buffer"].pop(random.randrange(len(state["buffer"])))

    def __copy__(self):
        return Resumable(self.run)

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


@everstep.elastic(
    steps=config["steps"], stages=config.get("stages", 1), global_batch_size=8, micro_batch_size=2, seed=3
)
def train(run):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = (Resumable if config.get("stateful") else Numbers)(run)

    @run.on_step
    def seen(step):
        if config.get("resumes"):
            signal.raise_signal(signal.SIGTERM)
        if (mine, step.index) == ("0", config.get("kills")) and not (out / "killed").exists():
            readers = multiprocessing.active_children()
            (out / "killed").write_text(str(len(readers)))
            for reader in readers:
                reader.kill()

    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=config.get("workers", 0))
    if config.get("loop"):
        model, optimizer, batches = run.prepare(model, optimizer, loader)
        for inputs, targets in batches:
            nn.functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()
    else:
        for _ in run.steps(model, optimizer, loader, loss_fn=nn.functional.mse_loss):
            assert run.epoch == 0
    torch.save({**run.full_state_dict(), "step": run.step}, out / f"state-{mine}.pt")


if __name__ == "__main__":
    while not (out / f"state-{mine}.pt").exists():
        try:
            train()
        except SystemExit as ended:
            if ended.code != 128 + signal.SIGTERM:
                raise
