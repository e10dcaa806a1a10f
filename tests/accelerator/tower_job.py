"""The user's own loop, with nested batches, on a stand-in device or the CPU. Configured by a JSON argument."""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

import everstep
from tests import accelerator

config = json.loads(sys.argv[1])
out = Path(config["out"])


class Numbers(torch.utils.data.Dataset):
    """Dictionaries of tensors, which the default collation nests."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {
            "x": {"a": torch.randn(6, generator=generator), "b": [torch.randn(2, generator=generator)]},
            "y": index % 3,
        }


class Tower(nn.Module):
    """Batch norm, dropout by the device's random numbers if asked for, and a constant buffer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.frozen = nn.Linear(16, 16)
        self.frozen.requires_grad_(False)
        self.drop = nn.Dropout(config.get("dropout", 0.0))
        self.register_buffer("shift", torch.full((16,), 0.25))
        self.scale = nn.Parameter(torch.ones(()))
        self.last = nn.Linear(16, 3)

    def forward(self, x):
        hidden = torch.relu(self.norm(self.first(torch.cat([x["a"], *x["b"]], 1))))
        return self.last(self.drop(self.frozen(hidden) * self.scale + self.shift))


@everstep.elastic(
    steps=config["steps"],
    global_batch_size=24,
    micro_batch_size=4,
    seed=5,
    protection=config.get("protection", "parity"),
    verify_every=2,
    checkpoint=config.get("checkpoint", ""),
    checkpoint_every=3,
)
def train(run):
    if config["device"] == "standin":
        accelerator.use()
    device = run.device
    model = Tower().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **config.get("optimizer", {}))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    model, optimizer, batches = run.prepare(model, optimizer, Numbers(), scheduler=scheduler)
    devices = set()
    for batch in batches:
        devices |= {str(t.device) for t in (batch["x"]["a"], batch["x"]["b"][0], batch["y"])}
        loss = nn.functional.cross_entropy(model(batch["x"]), batch["y"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    mine = os.environ.get("RANK", "0")
    if config["device"] == "standin":
        assert accelerator.seeds(), "the device's generators were not seeded"
    (out / f"devices-{mine}.json").write_text(json.dumps(sorted(devices)))
    torch.save(run.full_state_dict(), out / f"state-{mine}.pt")


if __name__ == "__main__":
    train()
