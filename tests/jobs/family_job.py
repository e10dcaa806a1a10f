"""A small job whose workers have children or signal handlers, or wait; it records what happens in files.

`python family_job.py CONFIG` or under `everstep run`. Lines `step N` show its progress.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import everstep

config = json.loads(sys.argv[1])
out = Path(config["out"])
RANK = os.environ.get("RANK", "0")


def note(name, text=""):
    """A file appears with all of its text."""
    path = out / f"{name}-{RANK}-{os.getpid()}"
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)


def forked_helper():
    note("forked")
    while True:
        time.sleep(1)


def make_daemon():
    """A process that leaves its session and its parent, as daemon(3) has it."""
    script = "import os, time\nos.setsid()\nif os.fork(): os._exit(0)\nprint(os.getpid(), flush=True)\ntime.sleep(1000)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        note("daemon", process.stdout.readline())


def start_helpers():
    multiprocessing.get_context("fork").Process(target=forked_helper, daemon=True).start()
    helper = subprocess.Popen(["sh", "-c", "sleep 1000 & sleep 1001"])
    make_daemon()
    note("helpers", str(helper.pid))


def heard(number, frame):
    note(f"heard-{signal.Signals(number).name}")


def ends_children():
    """Start child processes and end them again."""
    for helper in (
        subprocess.Popen(["sleep", "1000"]),
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,)),
    ):
        if isinstance(helper, subprocess.Popen):
            helper.terminate()
            helper.wait()
        else:
            helper.start()
            helper.terminate()
            helper.join()
    note("ended-children")


if config.get("handles"):
    signal.signal(signal.SIGUSR1, heard)


@everstep.elastic(steps=config["steps"], global_batch_size=8, micro_batch_size=2, seed=5)
def train(run):
    if config.get("helpers"):
        start_helpers()
    if config.get("handles"):
        signal.signal(signal.SIGUSR2, heard)
    model = torch.nn.Linear(6, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = torch.utils.data.TensorDataset(torch.randn(64, 6), torch.randn(64, 3))
    if config.get("loader"):
        data = torch.utils.data.DataLoader(data, batch_size=2, num_workers=1)
    if config.get("ends_children"):
        ends_children()

    def between(index):
        with (out / "steps").open("a") as file:
            file.write(f"{RANK} {os.getpid()} {index}\n")
        if index == config.get("waits_at"):
            note("waits")
            time.sleep(1000)
        while (out / "slow").exists() and index >= config.get("slow_from", 0):
            time.sleep(0.3)
            break

    if config.get("prepared"):
        model, optimizer, batches = run.prepare(model, optimizer, data)
        last = 0
        for inputs, targets in batches:
            torch.nn.functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()
            if run.step > last:
                last = run.step
                between(last - 1)
    else:
        for step in run.steps(model, optimizer, data, loss_fn=torch.nn.functional.mse_loss):
            between(step.index)
    torch.save(run.full_state_dict(), out / f"state-{RANK}.pt")


if __name__ == "__main__":
    try:
        train()
    finally:
        note("left")
