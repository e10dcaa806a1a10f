"""The demo's training script: a byte-level GPT learns the source of the Python standard library."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import everstep
from everstep.demo.model import GPTConfig, gpt, next_byte_loss
from everstep.demo.text import SourceText

STEPS = 60
STAGES = 2
GLOBAL_BATCH_SIZE = 16
MICRO_BATCH_SIZE = 2
SEED = 0
CONFIG = GPTConfig(layers=6, width=96, heads=6, context=64, dropout=0.1)


@everstep.elastic(
    steps=STEPS,
    stages=STAGES,
    global_batch_size=GLOBAL_BATCH_SIZE,
    micro_batch_size=MICRO_BATCH_SIZE,
    seed=SEED,
)
def train(run: everstep.Run, out: Path) -> None:
    """Train; the lowest rank writes the digest of the trained state."""
    model = gpt(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    data = SourceText(CONFIG.context)
    for _ in run.steps(model, optimizer, data, loss_fn=next_byte_loss, scheduler=scheduler, clip_grad_norm=1.0):
        pass
    state = run.full_state_dict()
    if run.rank == 0:
        summary = {
            "digest": everstep.state_digest(state),
            "parameters": sum(tensor.numel() for tensor in state["model"].values()),
        }
        out.write_text(json.dumps(summary))


if __name__ == "__main__":
    train(Path(sys.argv[1]))
