"""Everstep on layers that sleep: a computing rank needs no processor, so a few processors serve many ranks.

Arguments: a JSON object with `layers`, `stages`, `micro_batches`, `steps`, `forward_s` and `backward_s` of a layer; if
wanted also `width`, of a layer, `optimizer`, by its name in torch.optim, and `protection`. A file `slow-RANK` in the
folder `slow` holds how many times as long this rank takes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import everstep

config = json.loads(sys.argv[1])
WIDTH = config.get("width", 16)


def pace() -> float:
    """The slowdown of this rank at present, as a factor."""
    try:
        return float((Path(config["slow"]) / f"slow-{os.environ['RANK']}").read_text())
    except (KeyError, OSError):
        return 1.0


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        time.sleep(config["forward_s"] * pace())
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        time.sleep(config["backward_s"] * pace())
        return gradient


class Sleeping(nn.Module):
    """A layer with a given duration."""

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
    protection=config.get("protection", "parity"),
)
def train(run: Any) -> None:
    model = nn.Sequential(*(Sleeping() for _ in range(config["layers"])))
    data = [(torch.randn(WIDTH), torch.randn(WIDTH)) for _ in range(config["micro_batches"])]
    optimizer = getattr(torch.optim, config.get("optimizer", "SGD"))(model.parameters(), lr=0.01)
    for _ in run.steps(model, optimizer, data, loss_fn=nn.functional.mse_loss):
        pass


if __name__ == "__main__":
    train()
