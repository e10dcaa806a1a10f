"""The benchmark's job as an everstep script."""

from __future__ import annotations

import os

import torch
from stamps import Stamper
from torch import Tensor, nn
from workload import Data, Report, ballast, build, job_of_command_line

import everstep
from everstep.demo.model import next_byte_loss

JOB = job_of_command_line()


def draw_from_own(model: nn.Module) -> None:
    """Have dropout draw from a generator of this process, as a trainer does that does not move random states."""
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))

    def drop(module: nn.Dropout, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not module.training:
            return output
        kept = torch.rand(inputs[0].shape, generator=generator) >= module.p
        return inputs[0] * kept / (1 - module.p)

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(drop)


@everstep.elastic(
    steps=JOB.steps,
    stages=JOB.stages,
    global_batch_size=JOB.global_batch_size,
    micro_batch_size=JOB.micro_batch_size,
    seed=JOB.seed,
)
def train(run: everstep.Run) -> None:
    model, optimizer = build(JOB)
    _held = ballast(JOB)
    data = Data(JOB)
    report = Report(JOB, data)
    if JOB.option("own_random_numbers", False):
        draw_from_own(model)
    stamper = Stamper(JOB.folder, run.rank)
    for step in run.steps(model, optimizer, data.text, loss_fn=next_byte_loss):
        stamper.committed(step.index, **report(model))


if __name__ == "__main__":
    train()
