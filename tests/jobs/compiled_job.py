"""A model that torch.compile compiles; each worker notes after every step what its compiler has done so far.

The JSON argument: `out`, a folder, and `steps`. While fewer than `ranks` train, a step takes longer, so that one that
was lost is back before the last.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

import everstep

config = json.loads(sys.argv[1])
out = Path(config["out"])
mine = os.environ.get("RANK", "0")


def compiled():
    """What torch's compiler counts: graphs that it has traced, and those that it has found in its cache, or not."""
    from torch._dynamo.utils import counters

    kinds = ("fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass")
    found = {kind.removeprefix("fxgraph_cache_"): counters["inductor"][kind] for kind in kinds}
    return {**found, "graphs": counters["stats"]["unique_graphs"]}


@everstep.elastic(steps=config["steps"], global_batch_size=8, micro_batch_size=1, seed=4)
def train(run):
    model = torch.compile(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    data = torch.utils.data.TensorDataset(torch.randn(24, 6), torch.randn(24, 2))
    model, optimizer, batches = run.prepare(model, optimizer, data)

    @run.on_step
    def note(step):
        line = {"step": step.index, "pid": os.getpid(), "new": run.is_replacement, **compiled()}
        with (out / f"compiled-{mine}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if run.world_size < config.get("ranks", 1):
            time.sleep(0.5)

    for inputs, targets in batches:
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    torch.save(run.full_state_dict(), out / f"state-{mine}.pt")


if __name__ == "__main__":
    train()
