"""A small regression, for a first look: `everstep run --nproc-per-node 4 docs/examples/train.py`."""

import torch
from torch import nn

import everstep


class Waves(torch.utils.data.Dataset):
    """Points of a function that a network can learn."""

    def __len__(self):
        return 100_000

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        x = torch.rand(16, generator=generator) * 6 - 3
        return x, torch.sin(x).prod().reshape(1) * 10


@everstep.elastic(steps=20_000, global_batch_size=64, micro_batch_size=4, seed=0)
def train(run):
    model = nn.Sequential(nn.Linear(16, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in run.steps(model, optimizer, Waves(), loss_fn=nn.functional.mse_loss):
        if run.rank == 0 and step.index % 500 == 0:
            print(f"step {step.index}: loss {step.loss:.4f}", flush=True)


if __name__ == "__main__":
    train()
