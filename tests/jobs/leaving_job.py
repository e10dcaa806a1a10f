"""A job that leaves its loop before the last step, and then runs other code. The JSON argument selects how.

`how`: break, return, exit (sys.exit(0)), vanish (os._exit(0)), stop (run.stop), or empty: it does not leave; after the
step `at`, on the rank `alone` or on all. `after`: what follows training: raise, exit, kill, again, or wait (for the
file `go`).
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

import everstep

config = json.loads(sys.argv[1])
out = Path(config["out"])
mine = os.environ.get("RANK", "0")
how, at = config.get("how", ""), config.get("at", 5)
torch.manual_seed(7)
features, targets = torch.randn(64, 6), torch.randn(64, 2)


def leaves(run, step):
    if step >= config.get("spoil", 10**9) and run.rank == 0:
        spoil()
    if not how or step < at or config.get("alone", run.rank) != run.rank:
        return False
    if how == "exit":
        sys.exit(0)
    if how == "vanish":
        os._exit(0)
    if how == "stop":
        run.stop("good enough")
        return False
    return True


def note(step):
    with (out / f"steps-{mine}").open("a") as notes:
        notes.write(f"{step.index}\n")


def spoil():
    """The folder of the checkpoints goes away, and something else comes in its place."""
    folder = Path(config["folder"])
    while not folder.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # a save has made it again
            folder.touch(exist_ok=False)


def in_steps(run, model, optimizer, data):
    for step in run.steps(model, optimizer, data, loss_fn=torch.nn.functional.mse_loss):
        if leaves(run, step.index):
            if how == "return":
                return
            break


def in_loop(run, model, optimizer, data):
    model, optimizer, batches = run.prepare(model, optimizer, data)
    for inputs, wanted in batches:
        torch.nn.functional.mse_loss(model(inputs), wanted).backward()
        optimizer.step()
        if leaves(run, run.step - 1):
            if how == "return":
                return
            break


def in_epochs(run, model, optimizer, data):
    model, optimizer, batches = run.prepare(model, optimizer, data)
    left = False
    for _ in run.epochs():
        for inputs, wanted in batches:
            torch.nn.functional.mse_loss(model(inputs), wanted).backward()
            optimizer.step()
            if left := leaves(run, run.step - 1):
                if how == "return":
                    return
                break
        if left:
            break
        run.barrier()


length = {"epochs": config["epochs"]} if "epochs" in config else {"steps": config.get("steps", 30)}
loops = {"epochs": in_epochs, True: in_loop, False: in_steps}


@everstep.elastic(**length, global_batch_size=8, micro_batch_size=1)
def train(run):
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = torch.utils.data.TensorDataset(features, targets)
    run.on_step(note)
    loops["epochs" if "epochs" in config else config.get("loop", False)](run, model, optimizer, data)
    torch.save(run.full_state_dict(), out / f"state-{mine}.pt")
    (out / f"left-{mine}").write_text(str(run.step))


train()
(out / f"after-{mine}").touch()
match config.get("after"):
    case "raise":
        raise ValueError("the evaluation failed")
    case "exit":
        sys.exit(7)
    case "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    case "again":
        train()
    case "wait":
        while not (out / "go").exists():
            time.sleep(0.02)
(out / f"done-{mine}").touch()
