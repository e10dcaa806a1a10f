"""A job with the optimizer that `name` says, of `optimizers.py`; `sparse`: the embedding has sparse gradients."""

import json
import os
import sys
from pathlib import Path

import torch
from optimizers import ALL
from torch import nn

import everstep

config = json.loads(sys.argv[1])
out = Path(config["out"])
mine = os.environ.get("RANK", "0")


class Words(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, 12, (5,), generator=generator), torch.randn(3, generator=generator)


@everstep.elastic(steps=config["steps"], global_batch_size=8, micro_batch_size=1, seed=3)
def train(run):
    sparse = config.get("sparse", False)
    model = nn.Sequential(
        nn.Embedding(12, 8, sparse=sparse), nn.Flatten(), nn.Linear(40, 16), nn.Tanh(), nn.Linear(16, 3)
    )
    optimizer = ALL[config["name"]](list(model.parameters()))
    several = {"updates": "simultaneous"} if isinstance(optimizer, list) else {}
    dense = {"sparse_gradients": "dense"} if sparse else {}
    first, optimizers = (model, optimizer) if not several else ([model], optimizer)
    trained, steppers, batches = run.prepare(first, optimizers, Words(), **several, **dense)
    (trained,) = trained if several else (trained,)
    steppers = steppers if several else [steppers]
    for words, targets in batches:
        nn.functional.mse_loss(trained(words), targets).backward()
        for stepper in steppers:
            stepper.step()
    torch.save(run.full_state_dict(), out / f"state-{mine}.pt")


if __name__ == "__main__":
    train()
