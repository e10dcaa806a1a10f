"""A script with what scripts have around their loop: hand-set rates, an average of the weights that is swapped in for
an evaluation, a best score, a tracker with a thread, an early end. The JSON argument chooses the loop."""

import json
import math
import os
import queue
import sys
import threading
from pathlib import Path

import torch
from torch import nn

import everstep

config = json.loads(sys.argv[1])
out = Path(config["out"])
mine = os.environ.get("RANK", "0")
LAST = 24  # committed steps, of many more that the job might take


class Waves(torch.utils.data.Dataset):
    def __init__(self, first, count):
        self.first, self.count = first, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        x = torch.rand(4, generator=torch.Generator().manual_seed(self.first + index)) * 6 - 3
        return x, torch.sin(x).prod().reshape(1)


class Best:
    """The best score so far, and the step it was reached in: equal on every rank."""

    def __init__(self):
        self.score, self.step = math.inf, -1

    def state_dict(self):
        return {"score": self.score, "step": self.step}

    def load_state_dict(self, state):
        self.score, self.step = state["score"], state["step"]


class Tracker:
    """Hands lines to a thread that writes them, as trackers of experiments do; the script waits for it at its end."""

    def __init__(self, path):
        self.lines = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.write, args=(path,))
        self.thread.start()

    def write(self, path):
        with path.open("a", buffering=1) as file:
            while (line := self.lines.get()) is not None:
                file.write(line + "\n")

    def close(self):
        self.lines.put(None)
        self.thread.join()


def evaluate(model, average, data):
    """The loss with the averaged weights, which take the place of the trained ones meanwhile."""
    trained = [p.detach().clone() for p in model.parameters()]
    model.eval()
    with torch.no_grad():
        for parameter, averaged in zip(model.parameters(), average.module.parameters(), strict=True):
            parameter.copy_(averaged)
        x, y = torch.utils.data.default_collate([data[i] for i in range(len(data))])
        score = float(nn.functional.mse_loss(model(x), y))
        for parameter, value in zip(model.parameters(), trained, strict=True):
            parameter.copy_(value)
    model.train()
    return score


def rate(step):
    return 0.01 * min(1.0, (step + 1) / 5) * (0.5 + 0.5 * math.cos(step / LAST * math.pi))


@everstep.elastic(steps=1000, global_batch_size=12, micro_batch_size=2, seed=5)
def train(run):
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.1), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate(0))
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    best, tracker, held_out = Best(), Tracker(out / f"tracked-{mine}"), Waves(5000, 8)
    run.register_state("average", average)
    run.register_state("best", best)

    def between(committed):
        """After a step; returns whether that is enough."""
        average.update_parameters(model)
        if committed % 4 == 0:
            score = evaluate(model, average, held_out)
            if score < best.score:
                best.score, best.step = score, committed
        tracker.lines.put(f"{committed} {best.score!r} {best.step} {int(average.n_averaged)}")
        return committed == LAST

    loss_fn = nn.functional.mse_loss
    if config["loop"]:
        net, wrapped, batches = run.prepare(model, optimizer, Waves(0, 60))
        before = run.step
        for x, y in batches:
            for group in wrapped.param_groups:
                group["lr"] = rate(run.step)
            loss_fn(net(x), y).backward()
            wrapped.step()
            wrapped.zero_grad()
            if run.step > before:
                before = run.step
                if between(run.step):
                    break
    else:
        for step in run.steps(model, optimizer, Waves(0, 60), loss_fn=loss_fn):
            for group in optimizer.param_groups:
                group["lr"] = rate(step.index + 1)
            if between(step.index + 1):
                break
    state = run.full_state_dict()
    state["model"] |= {f"average.{name}": value for name, value in average.state_dict().items()}
    state["optimizer"]["best"] = best.state_dict()
    tracker.close()
    torch.save(state, out / f"state-{mine}.pt")


if __name__ == "__main__":
    train()
    (out / f"after-{mine}").touch()
