"""A ZeRO-1 checkpoint of two ranks, written by DeepSpeed: OUT, millions of parameters, port. Run by its interpreter."""

from __future__ import annotations

import os
import sys

import deepspeed
import torch
import torch.multiprocessing as mp
from torch import nn

sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # or it compiles one, half a minute
WIDTH = 1024


def train(rank: int, out: str, millions: int, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(round(millions * 1e6 / WIDTH**2))])
    config = {
        "train_batch_size": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
    }
    deepspeed.init_distributed("gloo")
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    inputs = torch.randn(1, WIDTH, dtype=torch.bfloat16)
    engine.backward(engine(inputs).float().pow(2).mean())
    engine.step()
    engine.save_checkpoint(out, client_state={"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}})


if __name__ == "__main__":
    mp.spawn(train, (sys.argv[1], int(sys.argv[2]), int(sys.argv[3])), nprocs=2)
