"""FSDP2 models in two processes: trained, saved by torch.distributed.checkpoint, and loaded from converted checkpoints.

Usage: fsdp_samples.py save FOLDER, or: fsdp_samples.py load FOLDER.
Makes FOLDER/<case>/{checkpoint, truth.pt}; loads FOLDER/<case>/converted and writes FOLDER/<case>/loaded.pt.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

CASES = ("nested", "flat", "bare", "safetensors")
STATES = ("exp_avg", "exp_avg_sq")


class Tiny(nn.Module):
    """67 rows over two processes are 34 and 33; a vector of one element is all on the first."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(67, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 67, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.fixed = nn.Linear(16, 3).requires_grad_(False)
        self.register_buffer("counts", torch.zeros(5, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh()
        if self.training:
            self.counts += 1
            self.mean += 0.125
        return self.head(self.norm(hidden) * self.scale) + self.fixed(hidden).sum()


class App:
    """The application's state as torch's own tutorial has it."""

    def __init__(self, model: Any, optimizer: Any, options: StateDictOptions) -> None:
        self.model, self.optimizer, self.options = model, optimizer, options

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer, options=self.options)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=self.options,
        )


def build(seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    model = Tiny()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    decayed = [weight for weight in model.parameters() if weight.requires_grad and weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.requires_grad and weight.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))


def train(model: Any, optimizer: Any, steps: int) -> None:
    for step in range(steps):
        made = torch.Generator().manual_seed(10 * step + dist.get_rank())
        tokens = torch.randint(67, (2, 8), generator=made)
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def gather(model: Any, optimizer: Any) -> dict[str, Any]:
    held: dict[str, Any] = {"params": {}, "buffers": {}, "steps": set(), **{state: {} for state in STATES}}
    for name, weight in model.named_parameters():
        held["params"][name] = whole(weight)
        if weight in optimizer.state:
            held["steps"].add(float(optimizer.state[weight]["step"]))
            for state in STATES:
                held[state][name] = whole(optimizer.state[weight][state])
    held["buffers"] = {name: whole(buffer) for name, buffer in model.named_buffers()}
    return held


def state_of(case: str, model: Any, optimizer: Any) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=case == "flat")
    if case == "bare":
        return dict(model.state_dict())
    if case == "flat":
        parts = App(model, optimizer, options).state_dict()
        return {**parts["model"], "optimizer": parts["optimizer"], "train_state": {"step": 3, "tokens": 48}}
    return {"app": App(model, optimizer, options), "step": 3, "history": [1.5, {"loss": 2.5}]}


def save(case: str, folder: Path) -> None:
    model, optimizer = build(seed=1)
    train(model, optimizer, steps=3)
    form = SerializationFormat.SAFETENSORS if case == "safetensors" else SerializationFormat.TORCH_SAVE
    writer = FileSystemWriter(folder / "checkpoint", serialization_format=form)
    if case == "safetensors":
        weights = {name: weight for name, weight in model.state_dict().items() if name != "head.weight"}
        dcp.save({"model": weights}, storage_writer=writer)
    else:
        dcp.save(state_of(case, model, optimizer), storage_writer=writer)
    held = gather(model, optimizer)
    if dist.get_rank() == 0:
        torch.save(held, folder / "truth.pt")


def load(case: str, folder: Path) -> None:
    model, optimizer = build(seed=2)
    if case != "bare":
        train(model, optimizer, steps=1)
    state = state_of(case, model, optimizer)
    dcp.load(state, checkpoint_id=folder / "converted")
    if case == "bare":
        model.load_state_dict(state)
    elif case == "flat":
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        optim = state.pop("optimizer")
        assert state.pop("train_state") == {"step": 3, "tokens": 48}
        App(model, optimizer, options).load_state_dict({"model": state, "optimizer": optim})
    else:
        assert state["step"] == 3
        assert state["history"] == [1.5, {"loss": 2.5}]
    held = gather(model, optimizer)
    held["groups"] = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    if dist.get_rank() == 0:
        torch.save(held, folder / "loaded.pt")


def one_process(rank: int, store: str, what: str, root: Path) -> None:
    warnings.filterwarnings("ignore")
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for case in CASES:
        if what == "save":
            (root / case).mkdir(parents=True, exist_ok=True)
            save(case, root / case)
        elif (root / case / "converted").exists() and case != "safetensors":
            load(case, root / case)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        mp.start_processes(
            one_process, (str(Path(place, "store")), sys.argv[1], Path(sys.argv[2])), nprocs=2, start_method="fork"
        )
