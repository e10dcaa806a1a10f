"""A job with epochs: its own loop over them, or `run.steps`; it notes which samples it has seen, and an epoch's result.

`kills`: [rank, place]: where a process of that rank kills itself, once, with place "epoch N" (in front of its batches),
"end N" (behind them, between two calls), "evaluation N" (also "N averaged"), "last" (behind the loop).
`nodes`: what is killed is the node of that process. `average`: parameters are averaged, and the averages evaluated.
`yields`: the loop is over `run.steps`. `stops`: after which step it
is to stop. `resumes`: it gets SIGTERM after its first step, saves, ends, and is resumed in the same process until it is
done.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

import everstep
from everstep.elastic.contract.faults import _kill_node

config = json.loads(sys.argv[1])
out = Path(config["out"])
mine = int(os.environ.get("RANK", "0"))
seen = []  # the samples of the micro-batches that this process has had


class Numbered(torch.utils.data.Dataset):
    def __len__(self):
        return config.get("samples", 21)

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return index, torch.randn(6, generator=generator), torch.randn(2, generator=generator)


def comes_by(place):
    marker = out / f"killed-{mine}-{place}"
    if [mine, place] in config.get("kills", []) and not marker.exists():
        marker.touch()
        if config.get("nodes"):
            _kill_node()
        os.kill(os.getpid(), signal.SIGKILL)


def evaluated(run, model, epoch, **how):
    """The losses of an evaluation; a rank may die when it has a first result."""
    had = []

    def loss_of(batch):
        numbers, inputs, targets = batch
        assert not model.training
        if had:
            comes_by(f"evaluation {epoch}")
        had.append(numbers.tolist())
        noise = torch.rand(()).item() * 1e-3
        return len(numbers), float(nn.functional.mse_loss(model(inputs), targets)) + noise, inputs.sum(0)

    before, values = torch.get_rng_state(), [p.detach().clone() for p in model.parameters()]
    loader = torch.utils.data.DataLoader(Numbered(), batch_size=2, num_workers=int(epoch == 1))
    sizes, losses, sums = zip(*run.evaluate(loader, loss_of, **how), strict=True)
    assert sizes == (2,) * 10 + (1,)
    assert model.training
    assert all(torch.equal(p, before) for p, before in zip(model.parameters(), values, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    return [*losses, *torch.stack(sums).sum(0).tolist()]


def in_epochs(run, model, optimizer):
    if config.get("average"):
        run.average(model, 0.75)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)
    model, optimizer, batches = run.prepare(model, optimizer, Numbered(), scheduler_every="epoch")
    run.state.setdefault("epochs", [])
    run.state.setdefault("begun", 0)
    for epoch in run.epochs():
        assert run.epoch == epoch
        comes_by(f"epoch {epoch}")
        run.state["begun"] += 1
        run.state["first"] = run.mean(epoch)
        for numbers, inputs, targets in batches:
            seen.append((run.step, numbers.tolist()))
            nn.functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()
        run.state["size"] = run.mean(sum(float(p.detach().double().norm()) for p in model.parameters()))
        comes_by(f"end {epoch}")
        scheduler.step()
        run.state["rates"] = [*run.state.get("rates", []), *scheduler.get_last_lr()]
        run.barrier()
        run.state["losses"] = [*run.state.get("losses", []), *evaluated(run, model, epoch)]
        if config.get("average"):
            run.state["averaged"] = evaluated(run, model, f"{epoch} averaged", average=True)
        run.state["epochs"] = [*run.state["epochs"], [epoch, run.step, run.state["size"]]]
    comes_by("last")
    run.state["last"] = run.broadcast(len(batches))


def in_steps(run, model, optimizer):
    loss_fn = nn.functional.mse_loss
    data = torch.utils.data.TensorDataset(torch.randn(21, 6), torch.randn(21, 2))
    run.state.setdefault("epochs", [])
    for _ in run.steps(model, optimizer, data, loss_fn=loss_fn):
        run.state["epochs"] = [*run.state["epochs"], run.epoch]


@everstep.elastic(epochs=config.get("epochs", 3), global_batch_size=8, micro_batch_size=1, seed=5)
def train(run):
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.1), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    @run.on_step
    def stop(step):
        if step.index == config.get("stops", -1):
            run.stop("enough")
        if config.get("resumes"):
            signal.raise_signal(signal.SIGTERM)

    (in_steps if config.get("yields") else in_epochs)(run, model, optimizer)
    torch.save({**run.full_state_dict(), "shared": dict(run.state), "step": run.step}, out / f"state-{mine}.pt")


if __name__ == "__main__":
    while not (out / f"state-{mine}.pt").exists():
        try:
            train()
        except SystemExit as ended:
            if ended.code != 128 + signal.SIGTERM:
                raise
    (out / f"seen-{mine}.json").write_text(json.dumps(seen))
