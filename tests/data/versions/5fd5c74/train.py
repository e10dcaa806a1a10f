"""A small training script, run alone or as a job: the checkpoints in this folder are of it."""

import json
import sys

import torch
from torch import nn

import everstep

SETTINGS = json.loads(sys.argv[1])
FACTS = {"steps": 8, "global_batch_size": 8, "micro_batch_size": 4, "seed": 3}


class Points(torch.utils.data.Dataset):
    """Sixty-four points of a plane, with a value each."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        point = torch.tensor([index % 8, index // 8], dtype=torch.float32) / 8
        return point, point.sin().sum().reshape(1)


@everstep.elastic(**{**FACTS, **SETTINGS})
def train(run):
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in run.steps(model, optimizer, Points(), loss_fn=nn.functional.mse_loss):
        print(f"step {step.index} loss {step.loss!r}", flush=True)
    if run.rank == 0:
        print(f"digest {everstep.state_digest(run.full_state_dict())}", flush=True)


train()
