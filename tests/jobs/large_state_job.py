"""Large values of the script on which training depends: a queue in run.state, a bank that is a registered object.

The queue changes in each step, the bank in every third, the codebook never; a small value counts the steps. `plain`:
without Everstep, by one process that sums the gradients of the four parts of a batch. `over_steps`: a loop over
run.steps. `turns`: the bank and the count change in the turn that ends a step. `resumes`: it gets SIGTERM after its
third step, saves, ends, and is resumed in the same process. `stops`: all ranks end after the fourth step. `dies`: after
which step, behind its changes, which ranks kill themselves. `joins`: behind that step, ranks wait until another one is
ready to join; `saved`: behind the sixth step, or step `saves`, until there is a checkpoint in this folder. `mistake`:
what to do wrong.
"""

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
STEPS, PARTS, PART, WIDTH, ROWS = 12, 4, 2, 16, 3 << 15  # a queue of 6 MiB
lines = (out / f"losses-{mine}.txt").open("a")


class Bank:
    """Means of the weights in the past, and when they were taken."""

    def __init__(self):
        self.means = torch.zeros(1 << 15, WIDTH, dtype=torch.bfloat16)
        self.steps = np.full(1 << 13, -1)

    def write(self, step, row):
        with torch.no_grad():
            self.means[step :: STEPS + 1] = row.to(torch.bfloat16)
        self.steps[step] = step

    def state_dict(self):
        return {"means": self.means, "steps": self.steps}

    def load_state_dict(self, state):
        self.means.data.copy_(state["means"])
        self.steps = state["steps"].copy()


def model_of():
    torch.manual_seed(6)
    model = nn.Linear(6, WIDTH)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def values():
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(ROWS, WIDTH, generator=generator) for _ in range(2)]


def data():
    inputs = torch.randn(STEPS * PARTS * PART, 6, generator=torch.Generator().manual_seed(8))
    return torch.utils.data.TensorDataset(inputs, torch.arange(len(inputs)))


def loader():
    return torch.utils.data.DataLoader(data(), batch_size=PART)


def loss_of(found, queue, codebook, bank, seen):
    rows = torch.cat([queue[:: ROWS // 64], codebook[:: ROWS // 32], bank.means[::999].float()])
    return (found @ rows.T).square().mean() + found.square().mean() * (1 + seen / 9) + float(bank.steps.max()) / 100


@torch.no_grad()
def enqueue(queue, step, model):
    """Behind a step: writes rows all over the queue."""
    queue[(step * (ROWS // 64) + torch.arange(6) * (ROWS // 6)) % ROWS] = model.weight.mean(1)


@torch.no_grad()
def write(bank, step, model):
    if step % 3 == 2:
        bank.write(step, model.weight.mean(1))


def save(state, queue, codebook, bank, seen):
    values = {"queue": queue, "codebook": codebook, "means": bank.means, "steps": torch.from_numpy(bank.steps)}
    values["seen"] = torch.tensor(seen)
    torch.save({**state, "values": values}, out / f"part-{mine}.pt")
    (out / f"part-{mine}.pt").replace(out / f"state-{mine}.pt")


def train_plain():
    model, optimizer = model_of()
    (queue, codebook), bank = values(), Bank()
    sums, step = [], 0
    for inputs, indices in loader():
        loss = loss_of(model(inputs), queue, codebook, bank, step)
        print(int(indices[0]), loss.item().hex(), file=lines, flush=True)
        sums.append(torch.autograd.grad(loss, list(model.parameters())))
        if len(sums) == PARTS:
            for parameter, a, b, c, d in zip(model.parameters(), *sums, strict=True):
                parameter.grad = ((a + b) + (c + d)) / PARTS
            optimizer.step()
            enqueue(queue, step, model)
            write(bank, step, model)
            sums, step = [], step + 1
    states = {name: {"momentum_buffer": optimizer.state[p]["momentum_buffer"]} for name, p in model.named_parameters()}
    save({"model": model.state_dict(), "optimizer": states}, queue, codebook, bank, step)


def waits(comes):
    deadline_s = time.monotonic() + 60
    while not comes():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def mistake(run, queue):
    kind, rank = config.get("mistake"), int(mine)
    if kind == "differs" and rank == 1:
        queue[5] = 0.5
    elif kind == "type":
        run.state["codebook"] = torch.zeros(1 << 15, dtype=torch.float64 if rank else torch.float32)
    elif kind == "shape":
        run.state["codebook"] = torch.zeros((1 << 10, 4 + rank))
    elif kind == "unseen":
        run.state["codebook"].data.mul_(2)
    elif kind == "text":
        run.state["log"] = "much" * (1 << 20)


def train(run):
    model, optimizer = model_of()
    bank = Bank()
    run.register_state("bank", bank)
    if config.get("mistake") == "bank" and int(mine) == 1:
        bank.means[3] = 1
    if not config.get("over_steps"):
        model, optimizer, batches = run.prepare(model, optimizer, loader())
    else:
        loss_fn = lambda found, _: loss_of(found, *kept, bank, run.state["seen"])  # noqa: E731
        loop = run.steps(model, optimizer, loader(), loss_fn=loss_fn)
    kept = [run.state.setdefault(name, value) for name, value in zip(["queue", "codebook"], values(), strict=True)]
    queue, codebook = kept
    run.state.setdefault("seen", 0)

    def after(step):
        enqueue(queue, step.index, model)
        if not config.get("turns"):
            write(bank, step.index, model)
            run.state["seen"] += 1
        if step.index == 2:
            mistake(run, queue)
            if config.get("resumes"):
                signal.raise_signal(signal.SIGTERM)
            if config.get("stops"):
                run.stop("to resume it")
        if step.index == config.get("joins"):
            waits(lambda: '"join_prepared"' in (out / "events.jsonl").read_text())
        if config.get("saved") and step.index == config.get("saves", 5):
            waits(lambda: list(Path(config["saved"]).glob("*/manifest.json")))
        if int(mine) in config.get("dies", {}).get(str(step.index), []) and not run.is_replacement:
            os.kill(os.getpid(), signal.SIGKILL)

    if config.get("over_steps"):
        for step in loop:
            after(step)
    else:
        run.on_step(after)
        for inputs, indices in batches:
            loss = loss_of(model(inputs), queue, codebook, bank, run.state["seen"])
            print(int(indices[0]), loss.item().hex(), file=lines, flush=True)
            loss.backward()
            optimizer.step()
            if config.get("turns") and run.is_step_end:
                write(bank, run.step - 1, model)
                run.state["seen"] += 1
    assert queue is run.state["queue"]
    save(run.full_state_dict(), queue, codebook, bank, run.state["seen"])


if __name__ == "__main__":
    settings = {"steps": STEPS, "global_batch_size": PARTS * PART, "micro_batch_size": PART, "seed": 6}
    while not (out / f"state-{mine}.pt").exists():
        try:
            train_plain() if config.get("plain") else everstep.elastic(**settings)(train)()
        except SystemExit as ended:
            if ended.code != 128 + signal.SIGTERM:
                raise
