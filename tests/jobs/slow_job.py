"""A small job that stops making progress in one place; the JSON argument selects the place and the cause.

`place`: fetch, forward, loop, between. `how`: storage (opens a named pipe without a writer), sleep, lock, spin,
beat. `ranks`: on which ranks; once for each missing file `OUT/stall-RANK`, in step `at`.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import torch
from torch import nn

import everstep

config = json.loads(sys.argv[1])
out = Path(config["out"])
rank = int(os.environ.get("RANK", "0"))
run = None


def stall(place):
    marker = out / f"stall-{rank}"
    if place != config.get("place") or rank not in config["ranks"] or run is None or run.step < config["at"]:
        return
    if marker.exists() and not config.get("again"):
        return
    marker.touch()
    how = config["how"]
    if how == "storage":
        stand_in_storage()
    elif how == "sleep":
        time.sleep(config["seconds"])
    elif how == "lock":
        wait_for_a_lock()
    elif how == "spin":
        spin()
    elif how == "beat":
        for _ in range(int(config["seconds"] * 20)):
            time.sleep(0.05)
            run.heartbeat()


def stand_in_storage():
    with open(out / "pipe") as pipe:  # until the test opens it
        pipe.read()


def wait_for_a_lock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def spin():
    while True:
        pass


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        stall("fetch")
        return torch.full((4,), index / 64), torch.full((1,), index / 64)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, inputs):
        stall("forward")
        return self.linear(inputs)


@everstep.elastic(steps=config["steps"], global_batch_size=8, micro_batch_size=2)
def train(given):
    global run
    run = given
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    if config.get("place") == "loop":
        model, optimizer, batches = run.prepare(model, optimizer, Samples())
        for inputs, targets in batches:
            nn.functional.mse_loss(model(inputs), targets).backward()
            stall("loop")
            optimizer.step()
    else:
        for _ in run.steps(nn.Sequential(model), optimizer, Samples(), loss_fn=nn.functional.mse_loss):
            stall("between")


if __name__ == "__main__":
    train()
