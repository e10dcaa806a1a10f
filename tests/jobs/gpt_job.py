"""A small GPT trained under `everstep run`; writes what the tests compare. Configured by a JSON argument.

If there is a file `sleeps.json` in its folder, with the seconds of each layer's forward and backward, layers sleep.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

import torch

import everstep
from everstep.demo.model import GPTConfig, gpt, next_byte_loss
from everstep.demo.text import SourceText

SLOW_S = 0.4
SLOWER = 1 / 8  # of the time that the test has waited: ten seconds take 17 steps, and a minute 31

config = json.loads(sys.argv[1])
out = Path(config["out"])


def dawdle():
    """Slow the steps down while the test waits, which it signals by a file."""
    with contextlib.suppress(FileNotFoundError):
        waited_s = time.time() - (out / "slow").stat().st_mtime
        time.sleep(max(SLOW_S, waited_s * SLOWER))


class Sleep(torch.autograd.Function):
    """Takes time, and changes nothing."""

    @staticmethod
    def forward(ctx, value, forward_s, backward_s):
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.backward_s)
        return gradient, None, None


def sleeping(layer, forward_s, backward_s):
    layer.register_forward_hook(lambda module, inputs, output: Sleep.apply(output, forward_s, backward_s))


@everstep.elastic(
    steps=config["steps"],
    stages=config["stages"],
    global_batch_size=config.get("global_batch_size", 16),
    micro_batch_size=2,
    seed=7,
)
def train(run):
    sizes = GPTConfig(
        layers=config.get("layers", 4), width=32, heads=2, context=32, dropout=0.1, tied=config.get("tied", False)
    )
    model = gpt(sizes).to(getattr(torch, config.get("dtype", "float32")))
    if (out / "sleeps.json").exists():
        for layer, seconds in zip(model, json.loads((out / "sleeps.json").read_text()), strict=True):
            sleeping(layer, *seconds)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if "momentum_from" in config:  # until then plain SGD, which has no state
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    mine = os.environ["RANK"]
    with (out / f"worker-{mine}-{os.getpid()}.jsonl").open("w", buffering=1) as log:
        data = SourceText(32, limit_bytes=200_000)
        for step in run.steps(model, optimizer, data, loss_fn=next_byte_loss, scheduler=scheduler, clip_grad_norm=1.0):
            line = {
                "step": step.index,
                "loss": step.loss,
                "norm": step.gradient_norm,
                "pid": os.getpid(),
                "model": id(model),
                "optimizer": id(optimizer),
                "generation": run.generation,
                "world_size": run.world_size,
            }
            if config.get("by_hand"):
                optimizer.param_groups[0]["weight_decay"] = 0.02 * (step.index % 7)
            if step.index >= config.get("momentum_from", config["steps"]):
                optimizer.param_groups[0]["momentum"] = 0.9
            log.write(json.dumps(line) + "\n")
            if config.get("dump") and run.rank == 0:
                torch.save(run.full_state_dict(), out / f"at-{run.step}.pt")
            dawdle()
    if config.get("model"):
        torch.save(model.state_dict(), out / f"model-{mine}.pt")
    state = run.full_state_dict()
    torch.save(state, out / f"state-{mine}.pt")


if __name__ == "__main__":
    train()
