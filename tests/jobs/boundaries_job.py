"""Layers whose outputs lie in memory in other ways than row by row; the JSON argument names the model.

Where stages are cut decides which of these outputs come from another rank. Losses of all steps and the state are saved.
"""

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import everstep

config = json.loads(sys.argv[1])
kind, out = config["kind"], Path(config["out"])
MICRO, GLOBAL, SAMPLES, SEED = 3, 12, 48, 2


class Call(nn.Module):
    """A layer without parameters."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Pair(NamedTuple):
    rows: torch.Tensor
    columns: torch.Tensor


def heads(x):
    return x.view(x.shape[0], 17, 3, 11).transpose(1, 2)


def attend(x):
    return (x @ x.transpose(-1, -2)).softmax(-1) @ x


def build():
    torch.manual_seed(0)
    if kind == "channels_last":
        layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(8 * 169, 4)]
        return nn.Sequential(*layers).to(memory_format=torch.channels_last)
    if kind == "heads":
        merge = Call(lambda x: x.transpose(1, 2).flatten(2))
        return nn.Sequential(nn.Linear(33, 33), Call(heads), Call(attend), merge, nn.Linear(33, 4), Call(rows_mean))
    if kind == "expanded":  # its gradient is one number for all
        return nn.Sequential(nn.Linear(33, 33), nn.Linear(33, 4), Call(rows_mean), nn.Linear(4, 4))
    if kind == "asks":  # as kernels do
        part, ask = Call(lambda x: x[:, 1:, ::2]), Call(lambda x: x * (1 + x.is_contiguous()))
        return nn.Sequential(nn.Linear(33, 33), part, ask, nn.Linear(17, 4), Call(rows_mean))
    if kind == "pairs":
        both = Call(lambda x: Pair(x.transpose(1, 2), x[..., 1:12]))
        product = Call(lambda pair: pair[0] @ pair[1])
        return nn.Sequential(nn.Linear(33, 17), both, product, nn.Linear(11, 4), Call(rows_mean))
    assert kind == "in_place"
    tanh, double = Call(torch.tanh_), Call(lambda x: x.mul_(2))
    return nn.Sequential(nn.Linear(33, 33), nn.LayerNorm(33), tanh, nn.Linear(33, 4), double, Call(rows_mean))


def rows_mean(x):
    return x.mean(1)


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        shape = (3, 17, 17) if kind == "channels_last" else (17, 33)
        return torch.randn(shape, generator=generator), torch.randn(4, generator=generator)


def collate(samples):
    x, y = torch.utils.data.default_collate(samples)
    return (x.contiguous(memory_format=torch.channels_last) if kind == "channels_last" else x), y


@everstep.elastic(
    steps=config["steps"], stages=config["stages"], global_batch_size=GLOBAL, micro_batch_size=MICRO, seed=SEED
)
def train(run):
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in run.steps(model, optimizer, Data(), loss_fn=nn.functional.mse_loss, collate_fn=collate):
        pass
    state = run.full_state_dict()
    torch.save(state, out / f"state-{run.rank}.pt")
    (out / f"worker-{run.rank}-{os.getpid()}.jsonl").touch()


train()
