"""Plain DistributedDataParallel over gloo; started by torchrun. With a checkpoint, it resumes from it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from processes import die_with_parent
from stamps import Stamper
from torch.nn.parallel import DistributedDataParallel
from workload import Data, Report, accumulate, ballast, build, job_of_command_line, share_of, warm_up


def main() -> None:
    die_with_parent()
    job = job_of_command_line()
    warm_up(job)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    data = Data(job)
    model, optimizer = build(job)
    every: int = job.option("checkpoint_every_steps", 0)
    path = Path(job.folder) / "checkpoint.pt"
    first = 0
    if every and path.exists():
        saved = torch.load(path)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"] + 1
    # DDP changes the layout of its buckets after the first step of a process, and gloo's sums depend on the layout: a
    # job that continues from a checkpoint does not repeat its bits, unless option "ddp" is {"find_unused_parameters":
    # True}.
    wrapped = DistributedDataParallel(model, **job.option("ddp", {}))
    _held = ballast(job)
    report = Report(job, data)
    stamper = Stamper(job.folder, rank)
    for step in range(first, job.steps):
        optimizer.zero_grad()
        accumulate(job, data, wrapped, step, share_of(job, rank), wrapped.no_sync)
        optimizer.step()
        if every and rank == 0 and (step + 1) % every == 0:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(saved, path.with_suffix(".new"))
            os.replace(path.with_suffix(".new"), path)
        stamper.committed(step, samples=job.global_batch_size, **report(model))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
