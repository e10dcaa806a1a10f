"""A loop over epochs whose sampler and dataset are changed by the script; the JSON argument says how.

`kept`: what the sampler depends on is in `run.state`. `kills`: [rank, epoch]: where a process of that rank kills
itself, once, in the second turn of an epoch. `once`: a dropout is changed in one epoch, for all that follow. `stop`:
training ends after that step. `mistake`: "by rank": weights that ranks differ in; "no epochs": a loop without
`run.epochs`.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

import everstep

config = json.loads(sys.argv[1])
out = Path(config["out"])
mine = int(os.environ.get("RANK", "0"))
SAMPLES = 24
EPOCHS = 5


class Numbered(torch.utils.data.Dataset):
    epoch = 0

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return index, torch.randn(6, generator=generator), torch.randn(2, generator=generator) + self.epoch


def dies(epoch):
    marker = out / f"killed-{mine}-{epoch}"
    if [mine, epoch] in config.get("kills", []) and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def weights_behind(weights, epoch):
    """Samples that are easy by now are drawn less often."""
    changed = weights.clone()
    changed[epoch::3] *= 0.25
    return changed + (0.01 * mine if config.get("mistake") == "by rank" and epoch else 0.0)


@everstep.elastic(epochs=EPOCHS, global_batch_size=8, micro_batch_size=2, seed=5)
def train(run):
    model = nn.Sequential(nn.Linear(6, 2), nn.Dropout(0.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    weights = torch.linspace(1, 3, SAMPLES)
    sampler = torch.utils.data.WeightedRandomSampler(weights, SAMPLES)
    data, workers = Numbered(), config.get("workers", 0)
    loader = torch.utils.data.DataLoader(data, batch_size=2, sampler=sampler, num_workers=workers)
    model, optimizer, batches = run.prepare(model, optimizer, loader)
    losses = []

    @run.on_step
    def note(step):
        if step.index == config.get("stop"):
            run.stop("as the job is told")

    if config.get("mistake") == "no epochs":
        for turn, (_, inputs, targets) in enumerate(batches):
            nn.functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()
            if turn == 3:
                sampler.weights = weights_behind(weights, 1)
    else:
        if config.get("kept"):
            weights = run.state.setdefault("weights", weights)
        for epoch in run.epochs():
            data.epoch, sampler.weights = epoch, weights  # as `set_epoch`, in front of the batches
            if epoch == 1 and config.get("once"):
                model[1].p = 0.5
            for turn, (numbers, inputs, targets) in enumerate(batches):
                if turn == 1:
                    dies(epoch)
                if run.world_size < config.get("ranks", 1):
                    time.sleep(0.3)  # so that a replacement is there before the next kill
                loss = nn.functional.mse_loss(model(inputs), targets)
                losses.append((run.step, numbers.tolist()))
                loss.backward()
                optimizer.step()
            if run.step < 3 * (epoch + 1):
                break  # stopped in the midst of the epoch
            weights = weights_behind(weights, epoch)
            if config.get("kept"):
                run.state["weights"] = weights
    torch.save({"model": model.state_dict(), "samples": losses}, out / f"state-{mine}.pt")


if __name__ == "__main__":
    train()
