"""Everstep on layers that sleep: many ranks are honest on a few processors, since a rank that computes needs none.

Arguments: a JSON object with `layers`, `stages`, `micro_batches`, `steps`, `forward_s` and `backward_s` of a layer.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

import everstep

config = json.loads(sys.argv[1])
WIDTH = config.get("width", 16)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        time.sleep(config["forward_s"])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        time.sleep(config["backward_s"])
        return gradient


class Sleeping(nn.Module):
    """A layer that takes as long as it is said to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, value: Tensor) -> Tensor:
        out: Tensor = _Sleep.apply(self.linear(value))
        return out


@everstep.elastic(
    steps=config["steps"],
    stages=config["stages"],
    global_batch_size=config["micro_batches"],
    micro_batch_size=1,
    seed=1,
)
def train(run: Any) -> None:
    model = nn.Sequential(*(Sleeping() for _ in range(config["layers"])))
    data = [(torch.randn(WIDTH), torch.randn(WIDTH)) for _ in range(config["micro_batches"])]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in run.steps(model, optimizer, data, loss_fn=nn.functional.mse_loss):
        pass


if __name__ == "__main__":
    train()
