"""A job over a folder of files; the JSON argument chooses a DataLoader, how the folder grows, own loading, the pace."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import everstep

config = json.loads(sys.argv[1])
out = Path(config["out"])
mine = os.environ.get("RANK", "0")


class Files(torch.utils.data.Dataset):
    """A folder's files in the order of their names, augmented at random, as image folders are."""

    def __init__(self, folder):
        self.files = sorted(Path(folder).glob("*.txt"))

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        if config.get("kill_at") == index and torch.utils.data.get_worker_info() and not (out / "killed").exists():
            (out / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        value = float(self.files[index].read_text()) / 100
        noise = torch.rand(4) + float(np.random.rand())
        if config.get("unrepeatable"):
            noise = torch.full((4,), float(time.time_ns() % 1000))
        with (out / f"fetched-{mine}").open("a") as file:
            file.write(f"{os.getpid()} {index}\n")
        return torch.full((4,), value) + noise / 10, torch.full((1,), value)


def data(run):
    files = Files(config["folder"])
    if config.get("stretch") and run.is_replacement:  # a script that was changed while the job runs
        files.files = files.files[: config["stretch"]]
    if "loader" not in config:
        return files
    how = dict(config["loader"])
    if "drawn" in how:
        how["sampler"] = torch.utils.data.WeightedRandomSampler([1.0, 3.0] * (len(files) // 2), how.pop("drawn"))
    return torch.utils.data.DataLoader(files, **how)


@everstep.elastic(
    steps=config["steps"], stages=config.get("stages", 1), global_batch_size=8, micro_batch_size=2, seed=3
)
def train(run):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    own = out / "last.pt"
    if config.get("own") and own.exists():
        saved = torch.load(own)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9) if config.get("own") else None
    loss_fn = nn.functional.mse_loss

    def seen(step):
        if step >= config.get("patient_from", config["steps"]) and run.world_size < 2:
            time.sleep(0.02)  # so that there are steps left when a replacement is ready
        if scheduler is not None:
            scheduler.step()
        if config.get("own") and run.rank == 0 and step == 3:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(saved, own.with_suffix(".new"))
            own.with_suffix(".new").rename(own)
        if config.get("grows") and run.rank == 0 and step == 2:
            for number, value in config["grows"].items():
                (Path(config["folder"]) / f"{number}.txt").write_text(str(value))

    if config.get("loop"):
        net, optimizer, batches = run.prepare(model, optimizer, data(run))
        assert net.module is net
        before = 0
        for inputs, targets in batches:
            loss_fn(net.module(inputs), targets).backward()
            optimizer.step()
            if run.step > before:
                before = run.step
                seen(before - 1)
    else:
        for step in run.steps(model, optimizer, data(run), loss_fn=loss_fn):
            seen(step.index)
    torch.save(run.full_state_dict(), out / f"state-{mine}.pt")


if __name__ == "__main__":
    train()
