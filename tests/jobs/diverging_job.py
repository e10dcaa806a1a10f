"""A job whose loss becomes infinite, and then NaN."""

from __future__ import annotations

import time

import torch

import everstep


class Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((4,), index / 64), torch.full((1,), index / 64)


@everstep.elastic(steps=1_000_000, global_batch_size=8, micro_batch_size=2)
def train(run: everstep.Run) -> None:
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e4)
    for _ in run.steps(model, optimizer, Data(), loss_fn=torch.nn.functional.mse_loss):
        time.sleep(0.01)


train()
