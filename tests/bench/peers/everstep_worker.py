"""The benchmark's job as an everstep script."""

from __future__ import annotations

from stamps import Stamper
from workload import Data, ballast, build, digest, job_of_command_line

import everstep
from everstep.demo.model import next_byte_loss

JOB = job_of_command_line()


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
    stamper = Stamper(JOB.folder, run.rank)
    for step in run.steps(model, optimizer, Data(JOB).text, loss_fn=next_byte_loss):
        found = {"digest": digest(model)} if JOB.digests else {}
        stamper.committed(step.index, **found)


if __name__ == "__main__":
    train()
