"""A job that shares values between its ranks: before the loop, after each step, and behind it.

`loop`: its own loop over prepared batches, instead of `run.steps`, with code behind turns that end a step (`ends`), or
behind those in which the step has changed. `kills`: [rank, place], with place "before", "behind" or a step: where a
process of that rank kills itself, once, between two calls. `breaks`: it leaves its own loop in the last turn. `joins`:
the turns of the last step wait until a lost rank's replacement is ready to join.
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


def comes_by(place):
    marker = out / f"killed-{mine}-{place}"
    if [mine, place] in config.get("kills", []) and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


class Count:
    """How many steps the loop has seen, which the script counts in its turns; its state has `kib` KiB more."""

    value = 0

    def state_dict(self):
        return {"value": self.value, "more": "x" * (config.get("kib", 0) << 10)}

    def load_state_dict(self, state):
        self.value = state["value"]


def replacement_is_ready():
    deadline_s = time.monotonic() + 30
    while '"join_prepared"' not in (out / "events.jsonl").read_text():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


told = Count()  # how many steps the functions have been called for


def between(run, step):
    state = run.state
    state["steps"] = state.get("steps", 0) + 1
    told.value += 1
    norm = run.mean(step.gradient_norm)
    comes_by(step.index)
    state["norms"] = [*state.get("norms", []), norm]
    state["best"] = min(state["best"], norm)
    state["largest"] = run.reduce(torch.tensor([norm, state["steps"]]), "max")
    assert set(run.gather(step.index)) == {step.index}


@everstep.elastic(steps=config["steps"], global_batch_size=8, micro_batch_size=1, seed=5)
def train(run):
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.1), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = torch.utils.data.TensorDataset(torch.randn(40, 6), torch.randn(40, 2))
    seen = Count()
    run.register_state("seen", seen)
    run.register_state("told", told)
    loss_fn = nn.functional.mse_loss
    if config.get("loop"):
        run.on_step(lambda step: between(run, step))
        model, optimizer, batches = run.prepare(model, optimizer, data)
    else:
        steps = run.steps(model, optimizer, data, loss_fn=loss_fn)
    drawn = run.broadcast(torch.rand(3))
    comes_by("before")
    run.barrier()
    run.state.setdefault("best", float("inf"))
    run.state["drawn"] = drawn
    if config.get("loop"):
        run.state["rows"] = torch.zeros(config.get("rows", 1), 64)  # its last value is that of the last turn
        before = run.step
        for inputs, targets in batches:
            loss_fn(model(inputs), targets).backward()
            if config.get("joins") and run.step == config["steps"] - 1:
                replacement_is_ready()
            optimizer.step()
            if run.is_step_end if config.get("ends") else run.step > before:
                seen.value += 1 if config.get("ends") else run.step - before
                before = run.step
                run.state["rows"] = run.state["rows"] + seen.value
                for group in optimizer.param_groups:
                    group["lr"] = 0.01 / (1 + seen.value)
                if config.get("breaks") and run.step == config["steps"]:
                    break
    else:
        for step in steps:
            between(run, step)
    run.state["behind"] = run.mean(7)
    comes_by("behind")
    run.barrier()
    torch.save(
        {**run.full_state_dict(), "shared": {**run.state, "seen": seen.value, "told": told.value}},
        out / f"state-{mine}.pt",
    )


if __name__ == "__main__":
    train()
