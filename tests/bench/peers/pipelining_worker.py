"""`torch.distributed.pipelining`, Schedule1F1B, one process per stage, each with an optimizer of its own parameters."""

from __future__ import annotations

import torch
import torch.distributed as dist
from processes import die_with_parent
from stamps import Stamper
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from workload import Data, build, digest, job_of_command_line, optimizer_for, warm_up

from everstep.demo.model import next_byte_loss


def main() -> None:
    die_with_parent()
    job = job_of_command_line()
    warm_up(job)
    dist.init_process_group("gloo")
    rank, stages = dist.get_rank(), dist.get_world_size()
    data = Data(job)
    model = build(job)[0]
    cuts = [round(i * len(model) / stages) for i in range(stages + 1)]
    part = nn.Sequential(*list(model)[cuts[rank] : cuts[rank + 1]])
    optimizer = optimizer_for(job, part)
    stage = PipelineStage(part, rank, stages, torch.device("cpu"))
    schedule = Schedule1F1B(stage, job.micro_batches, loss_fn=next_byte_loss)
    stamper = Stamper(job.folder, rank)
    for step in range(job.steps):
        inputs, targets = data.batch(step)
        optimizer.zero_grad()
        schedule.step(*([inputs] if rank == 0 else []), target=targets if rank == stages - 1 else None)
        optimizer.step()
        found = {"digest": digest(part)} if job.digests else {}
        stamper.committed(step, **found)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
