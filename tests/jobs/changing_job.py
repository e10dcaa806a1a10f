"""A job whose code changes rates, freezes and unfreezes layers, steps its scheduler itself and skips bad samples.

The JSON argument selects the loop: "prepare", "steps", or "plain", which is torch without the runtime.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

import everstep
from everstep.elastic.step.order import DataOrder

config = json.loads(sys.argv[1])
out = Path(config["out"])
mine = os.environ.get("RANK", "0")
what = config["changes"]
BATCH, MICRO, SEED, STAGES = 6, config.get("micro", 2), 5, config.get("stages", 1)
mse = nn.functional.mse_loss


class Data(torch.utils.data.Dataset):
    """Sample 13 is bad."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(6, generator=generator)
        return (x * float("inf") if "skip" in what and index == 13 else x), x.sum().reshape(1)


def build():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    groups = [{"params": [*model[0].parameters(), *model[2].parameters()]}, {"params": model[4].parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=config.get("rate", 0.02), weight_decay=0.1)
    scheduler = None
    if "schedule" in what:
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.25, total_iters=3)
        falling = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, falling], [3])
    return model, optimizer, scheduler


def change(step, model, optimizer):
    """What the user's code sets for this step."""
    if "rates" in what:
        optimizer.param_groups[1]["lr"] = 0.04 / (1 + step)
        optimizer.param_groups[0]["betas"] = (0.9, 0.99) if step < 4 else (0.8, 0.95)
    if "decay" in what:
        optimizer.param_groups[0]["weight_decay"] = 0.01 * step
    if "freeze" in what:
        model[0].requires_grad_(step >= 3)
        model[4].requires_grad_(step < 5)


def plain():
    model, optimizer, scheduler = build()
    order, data = DataOrder(samples=40, global_batch_size=BATCH, micro_batch_size=MICRO, seed=SEED), Data()
    for step in range(config["steps"]):
        change(step, model, optimizer)
        optimizer.zero_grad()
        for number in range(BATCH // MICRO):
            samples = [data[index] for index in order.indices(step, number)]
            x, y = (torch.stack(part) for part in zip(*samples, strict=True))
            loss = mse(model(x), y)
            if torch.isfinite(loss):
                (loss / (BATCH // MICRO)).backward()
        if config.get("clip"):
            nn.utils.clip_grad_value_(model.parameters(), config["clip"])
        optimizer.step()
        if scheduler:
            scheduler.step()
    write(model.state_dict(), optimizer)


@everstep.elastic(steps=config["steps"], global_batch_size=BATCH, micro_batch_size=MICRO, seed=SEED, stages=STAGES)
def train(run):
    model, optimizer, scheduler = build()
    whole = config.get("whole_steps", False)  # a step is left out, and not a micro-batch
    if config["loop"] == "prepare":
        prepared, optimizer, batches = run.prepare(model, optimizer, Data(), skip_nonfinite=whole)
        if config.get("late"):  # built on what prepare returned
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        for x, y in batches:
            change(run.step, model, optimizer)
            loss = mse(prepared(x), y)
            if not torch.isfinite(loss) and not whole:
                run.skip()
                continue
            loss.backward()
            if config.get("clip"):
                run.clip_grad_value_(config["clip"])
            optimizer.step()
            if scheduler:
                scheduler.step()
            optimizer.zero_grad()
    else:
        handed = scheduler if config.get("handed") else None
        steps = run.steps(model, optimizer, Data(), loss_fn=mse, scheduler=handed, skip_nonfinite=whole)
        change(0, model, optimizer)  # also where this process takes the place of another one, in mid-run
        if config.get("clip"):
            run.clip_grad_value_(config["clip"])
        for step in steps:
            if step.index + 1 < config["steps"]:
                change(step.index + 1, model, optimizer)
            if scheduler:
                scheduler.step()
            if "alone" in config and step.index == 1 and run.rank == 1:
                optimizer.param_groups[1]["lr"] = config["alone"]
    write(model.state_dict(), optimizer)
    whole = run.full_state_dict()
    assert all(torch.equal(whole["model"][name], tensor) for name, tensor in model.state_dict().items())


def write(model, optimizer):
    state = {"model": model, "optimizer": optimizer.state_dict()}
    torch.save(state, out / f"state-{mine}.pt")


if __name__ == "__main__":
    plain() if config["loop"] == "plain" else train()
