"""An ordinary torch script: DistributedDataParallel over gloo, without everstep. Its argument selects how it dies."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

config = json.loads(sys.argv[1])


@record
def main():
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        model(torch.full((2, 4), float(rank))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 and attempt < config.get("failures", 0) and rank == attempt % world_size:
            if config.get("raise"):
                raise ValueError("an ordinary script's mistake")
            os.kill(os.getpid(), signal.SIGKILL)
    seen = store.add("seen", 1)  # a key of an earlier attempt would make it too many
    dist.barrier()
    assert store.add("seen", 0) == world_size, store.add("seen", 0)
    total = torch.tensor([float(p.sum()) for p in model.parameters()]).sum()
    dist.all_reduce(total)
    (Path(config["out"]) / f"{rank}.json").write_text(
        json.dumps({"attempt": attempt, "pid": os.getpid(), "seen": seen, "total": float(total)})
    )
    del model, optimizer  # before the group: torch 2.13 may deadlock when the reducer is the last to let go of it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
