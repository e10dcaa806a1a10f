"""An ordinary torch script under plain torchrun: all ranks add themselves up, and wait until they are enough."""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

out, enough = Path(sys.argv[1]), int(sys.argv[2])
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
found = torch.ones(1)
dist.all_reduce(found)
told = {"rank": rank, "group": os.environ["GROUP_RANK"], "sum": int(found), "attempt": attempt, "pid": os.getpid()}
with (out / "ranks.jsonl").open("a") as stream:
    stream.write(json.dumps({**told, "world_size": world_size}) + "\n")
if rank == 1 and not (out / "failed").exists() and len(sys.argv) > 3:
    (out / "failed").touch()
    os._exit(3)  # torch may hang in an ordinary exit while there is a gloo group
while world_size < enough or not (out / "go").exists():
    time.sleep(0.05)
dist.barrier()
dist.destroy_process_group()
