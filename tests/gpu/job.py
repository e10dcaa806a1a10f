"""The demo's model trained on a device; writes what is compared. Configured by a JSON argument."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import everstep
from everstep.demo.job import CONFIG
from everstep.demo.model import GPTConfig, gpt, next_byte_loss
from everstep.demo.text import SourceText

SMALL = GPTConfig(layers=4, width=32, heads=2, context=32, dropout=0.1)

config = json.loads(sys.argv[1])
out = Path(config["out"])


def be_deterministic():
    """The same kernels whatever rank computes; attention by the one that has no choice of algorithm."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.benchmark = False


class Autocast(nn.Module):
    """A layer that computes in bfloat16 where torch deems that good enough; its parameters stay as they are."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return self.layer(x).float()


def model_of(sizes):
    """With the precision and the compiler of this case."""
    model = gpt(sizes)
    if config.get("autocast"):
        model = nn.Sequential(*(Autocast(layer) for layer in model))
    if config.get("bfloat16"):
        model = model.to(torch.bfloat16)
    if config.get("compile"):
        for layer in model:
            layer.compile(dynamic=False)
    return model


def device_of(run):
    if config["device"] == "standin":
        from tests import accelerator

        accelerator.use()
    return torch.device("cpu") if config["device"] == "cpu" else run.device


@everstep.elastic(
    steps=config["steps"],
    stages=config["stages"],
    global_batch_size=32,
    micro_batch_size=4,
    seed=3,
    checkpoint=config.get("checkpoint", ""),
    checkpoint_every=4,
    protection=config.get("protection", "parity"),
)
def train(run):
    device = device_of(run)
    be_deterministic()
    sizes = replace(SMALL if config["small"] else CONFIG, dropout=config.get("dropout", 0.1))
    model = model_of(sizes).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=config.get("fused", False))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    mine = os.environ.get("RANK", "0")
    with (out / f"worker-{mine}-{os.getpid()}.jsonl").open("w", buffering=1) as log:
        data = SourceText(sizes.context)
        for step in run.steps(model, optimizer, data, loss_fn=next_byte_loss, scheduler=scheduler, clip_grad_norm=1.0):
            log.write(json.dumps({"step": step.index, "loss": step.loss, "device": str(device)}) + "\n")
    torch.save(run.full_state_dict(), out / f"state-{mine}.pt")


if __name__ == "__main__":
    train()
