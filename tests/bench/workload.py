"""The workload of every system in a benchmark: model, data order and batch; and the arguments of a worker."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from everstep.demo.model import GPTConfig, gpt, next_byte_loss
from everstep.demo.text import SourceText


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training job; the workers read it from a JSON file."""

    folder: str = "."  # stamps, checkpoints and gates are files in it
    workers: int = 4
    stages: int = 1
    steps: int = 1_000_000
    global_batch_size: int = 64
    micro_batch_size: int = 4
    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 64
    dropout: float = 0.0
    learning_rate: float = 1e-3
    seed: int = 0
    ballast_mib: int = 0  # memory that each worker holds besides
    digests: bool = True  # stamp a digest of the parameters with every step
    losses: bool = False  # stamp the loss of fixed samples with every step
    options: dict[str, Any] | None = None  # what only one system understands

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(
            layers=self.layers, width=self.width, heads=self.heads, context=self.context, dropout=self.dropout
        )

    @property
    def micro_batches(self) -> int:
        return self.global_batch_size // self.micro_batch_size

    @property
    def tokens_per_micro_batch(self) -> int:
        return self.micro_batch_size * self.context

    def option(self, name: str, default: Any) -> Any:
        return (self.options or {}).get(name, default)

    def write(self) -> Path:
        path = Path(self.folder) / "job.json"
        path.write_text(json.dumps(asdict(self)))
        return path

    def moved(self, folder: Path, **changes: Any) -> Job:
        folder.mkdir(parents=True, exist_ok=True)
        return replace(self, folder=str(folder), **changes)


def job_of_command_line() -> Job:
    """The job named by the one argument of every worker script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parsed: dict[str, Any] = json.loads(parser.parse_args().job.read_text())
    return Job(**parsed)


class Data:
    """Micro-batches as a function of (step, micro-batch): every sample once an epoch, in a seeded order."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.text = SourceText(job.context)

    @cached_property
    def order(self) -> Tensor:
        return torch.randperm(len(self.text), generator=torch.Generator().manual_seed(self.job.seed))

    def micro_batch(self, step: int, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, both int64 of shape (micro_batch_size, context)."""
        start = step * self.job.global_batch_size + index * self.job.micro_batch_size
        ids = [int(self.order[i % len(self.order)]) for i in range(start, start + self.job.micro_batch_size)]
        pairs = [self.text[i] for i in ids]
        return torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The whole global batch of one step."""
        pairs = [self.micro_batch(step, i) for i in range(self.job.micro_batches)]
        return torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])


def build(job: Job) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """The seeded model and its optimizer."""
    torch.manual_seed(job.seed)
    model = gpt(job.config)
    return model, optimizer_for(job, model)


def optimizer_for(job: Job, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=job.learning_rate)


def accumulate(job: Job, data: Data, model: nn.Module, step: int, share: range, last: Callable[[], Any]) -> None:
    """Gradients of the micro-batches in `share`, their mean; `last` opens the context of all but the final backward."""
    for index in share:
        inputs, targets = data.micro_batch(step, index)
        if index == share[-1]:
            (next_byte_loss(model(inputs), targets) / len(share)).backward()
        else:
            with last():
                (next_byte_loss(model(inputs), targets) / len(share)).backward()


def share_of(job: Job, rank: int) -> range:
    """The micro-batches of one data-parallel rank."""
    each = job.micro_batches // job.workers
    return range(rank * each, (rank + 1) * each)


def ballast(job: Job) -> bytearray:
    """Resident memory, as long as the returned object lives."""
    held = bytearray(job.ballast_mib << 20)
    for start in range(0, len(held), 4096):
        held[start] = 1
    return held


def warm_up(job: Job) -> None:
    """Run one step and discard it: the first optimizer step of a process imports for seconds."""
    torch.set_num_threads(1)
    model, optimizer = build(job)
    tokens = torch.zeros(1, job.context, dtype=torch.int64)
    next_byte_loss(model(tokens), tokens).backward()
    optimizer.step()


class Evaluation:
    """The loss of fixed samples, which depends on the parameters alone: random numbers and the batch have no part."""

    def __init__(self, data: Data, samples: int = 32) -> None:
        pairs = [data.text[index * len(data.text) // samples] for index in range(samples)]
        self._inputs, self._targets = torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        model.eval()
        found = next_byte_loss(model(self._inputs), self._targets).item()
        model.train()
        return found


class Report:
    """What a worker stamps with each step, as the job asks for it."""

    def __init__(self, job: Job, data: Data) -> None:
        self._digests = job.digests
        self._evaluation = Evaluation(data) if job.losses else None

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        found: dict[str, Any] = {"digest": digest(model)} if self._digests else {}
        return {**found, "loss": self._evaluation.loss(model)} if self._evaluation else found


def digest(model: nn.Module) -> str:
    """xxh3 of every parameter's bytes, in the model's order."""
    hasher = xxhash.xxh3_64()
    for parameter in model.parameters():
        hasher.update(parameter.detach().contiguous().view(-1).numpy())
    return hasher.hexdigest()
