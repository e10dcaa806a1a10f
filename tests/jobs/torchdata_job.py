"""Loaders of torchdata; the JSON argument says of what kind."""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import everstep

config = json.loads(sys.argv[1])


class Samples(Dataset):
    def __len__(self):
        return 96

    def __getitem__(self, index):
        return torch.full((8,), index / 96) + 0.01 * torch.randn(8), torch.tensor([index % 3 / 3])


class Stream(IterableDataset):
    """Remembers how far it has been read."""

    def __init__(self):
        self.read = 0

    def __iter__(self):
        while True:
            self.read += 1
            yield torch.full((8,), self.read * 7 % 97 / 97), torch.tensor([self.read % 3 / 3])

    def state_dict(self):
        return {"read": self.read}

    def load_state_dict(self, state):
        self.read = state["read"]


stream = config["kind"] == "stream"
length = {"steps": 36} if stream else {"epochs": 3}
run = everstep.join(global_batch_size=8, micro_batch_size=2, seed=4, **length)
model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
if stream:
    loader = StatefulDataLoader(Stream(), batch_size=2)
else:
    loader = StatefulDataLoader(Samples(), batch_size=8, shuffle=True, num_workers=2)
model, optimizer, loader = run.prepare(model, optimizer, loader)
for _ in [0] if stream else run.epochs(3):
    for inputs, targets in loader:
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
torch.save(run.full_state_dict(), Path(config["out"]) / f"state-{run.rank}.pt")
