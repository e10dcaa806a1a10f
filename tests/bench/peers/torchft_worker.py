"""One torchft replica group of one process, restarted by the benchmark when it dies; or, with no rank, the lighthouse.

The parts are those of torchft's documentation: Manager, its reconfigurable gloo group, start_quorum and should_commit
around each step, healing over HTTP. What the documentation leaves to the user is chosen in its favour. Gradients are
averaged by `Manager.allreduce` of one flat tensor, since torchft 0.2.0's DistributedDataParallel crashes every survivor
when a gloo allreduce fails (`assert fut._fut` in its communication hook), which loses the whole job. Samples are a
function of the step, so a step tried again sees the same ones; the optimizer state is healed too; the imports of the
first optimizer step are paid before joining; a replica is a bare process, which starts faster than a torchrun of one.
"""

from __future__ import annotations

import os
import threading
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from processes import die_with_parent, wait_until_file
from stamps import Stamper
from torch import nn
from torch.distributed import TCPStore
from torchft import Manager, ProcessGroupGloo
from torchft.coordination import LighthouseServer
from workload import Data, Job, Report, accumulate, ballast, build, job_of_command_line, share_of, warm_up


def main() -> None:
    die_with_parent()
    job = job_of_command_line()
    if "REPLICA" in os.environ:
        train(job, int(os.environ["REPLICA"]))
    else:
        serve(job)


def serve(job: Job) -> None:
    server = LighthouseServer(bind="[::]:0", min_replicas=1, **job.option("lighthouse", {}))
    path = Path(job.folder) / "lighthouse"
    path.with_suffix(".new").write_text(server.address())
    path.with_suffix(".new").rename(path)
    threading.Event().wait()


def train(job: Job, replica: int) -> None:
    warm_up(job)
    data = Data(job)
    model, optimizer = build(job)

    def state_dict() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def load_state_dict(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    timeouts: dict[str, float] = job.option("manager", {})
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=job.option("process_group_timeout_s", 60.0))),
        load_state_dict=load_state_dict,
        state_dict=state_dict,
        min_replica_size=job.option("min_replica_size", 1),
        rank=0,
        world_size=1,
        store_addr="localhost",
        store_port=store.port,
        lighthouse_addr=(Path(job.folder) / "lighthouse").read_text(),
        replica_id=f"replica_{replica}",
        hostname="localhost",
        init_sync=False,  # every replica is built from the same seed
        **{name: timedelta(seconds=value) for name, value in timeouts.items()},
    )
    _held = ballast(job)
    report = Report(job, data)
    stamper = Stamper(job.folder, replica)
    wait_until_file(Path(job.folder) / "go", timeout_s=120)
    while (step := manager.current_step()) < job.steps:
        manager.start_quorum()
        optimizer.zero_grad()
        accumulate(job, data, model, step, share_of(job, replica), nullcontext)
        average_gradients(manager, model)
        if not manager.should_commit():
            stamper.failed(step)
            continue
        optimizer.step()
        samples = manager.num_participants() * job.global_batch_size // job.workers
        stamper.committed(manager.current_step() - 1, samples=samples, **report(model))
    manager.shutdown(wait=False)


def average_gradients(manager: Manager, model: nn.Module) -> None:
    """Over the replicas that take part; an error is the manager's to remember until `should_commit`."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.view(-1) for g in gradients])
    manager.allreduce(flat).wait()
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
