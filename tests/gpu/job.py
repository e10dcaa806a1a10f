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
    """A layer that computes in `dtype` where torch deems that good enough; its parameters stay as they are."""

    def __init__(self, layer, dtype):
        super().__init__()
        self.layer = layer
        self.dtype = dtype

    def forward(self, x):
        with torch.autocast(x.device.type, dtype=self.dtype):
            return self.layer(x).float()


def model_of(sizes):
    """With the precision and the compiler of this case."""
    model = gpt(sizes)
    if config.get("autocast") or config.get("float16"):
        dtype = torch.float16 if config.get("float16") else torch.bfloat16
        model = nn.Sequential(*(Autocast(layer, dtype) for layer in model))
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
    scaler = None
    if config.get("float16"):  # it begins with a scale that overflows
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**17, growth_interval=4)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    mine = os.environ.get("RANK", "0")
    with (out / f"worker-{mine}-{os.getpid()}.jsonl").open("w", buffering=1) as log:
        data = SourceText(sizes.context)
        how = {"loss_fn": next_byte_loss, "scheduler": scheduler, "clip_grad_norm": 1.0, "scaler": scaler}
        for step in run.steps(model, optimizer, data, **how):
            log.write(json.dumps({"step": step.index, "loss": step.loss, "device": str(device)}) + "\n")
    scale = scaler.state_dict() if scaler is not None else {}
    torch.save({**run.full_state_dict(), "scale": {**scale, "skipped": run.skipped_steps}}, out / f"state-{mine}.pt")


if __name__ == "__main__":
    train()
