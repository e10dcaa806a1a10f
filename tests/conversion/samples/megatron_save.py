"""Train tiny Megatron GPTs, save each in every form, and record the state of their processes.

Usage: megatron_save.py FOLDER. Makes FOLDER/<case>/{iter_0000003, latest_..., truth.pt}, and FOLDER/<case>/legacy.
"""

from __future__ import annotations

import sys
from pathlib import Path

import megatron_state
import torch
import torch.distributed as dist
from megatron_world import Case, build, launch, start, stop, train

CASES = (
    Case("plain", tp=2, pp=2),
    Case("single", tp=2, bf16=False, swiglu=False, tied=False, layers=2),
    Case("reshardable", tp=2, sharding="fully_reshardable", tied=False),
    Case("buckets", tp=2, pp=2, sharding="dp_reshardable", layers=2),
    Case("small-buckets", pp=2, sharding="dp_reshardable", tied=False, layers=2, bucket=4000),
    Case("experts", pp=2, ep=2, experts=4, sharding="fully_reshardable", layers=2),
    Case("expert-buckets", ep=2, experts=4, sharding="dp_reshardable", layers=2),
)


def main(root: Path) -> None:
    for case in CASES:
        start(case)
        model, optimizer, config = build(case, seed=1)
        train(case, model, optimizer, steps=3)
        megatron_state.scheduler(optimizer)  # sets the optimizer's rates
        megatron_state.save(case, model, optimizer, root / case.name)
        if not case.experts:
            megatron_state.save_legacy(case, model, optimizer, root / case.name / "legacy")
        truth = megatron_state.gather(case, model, optimizer, config)
        if dist.get_rank() == 0:
            torch.save(truth, root / case.name / "truth.pt")
        stop()


if __name__ == "__main__":
    launch(4, lambda: main(Path(sys.argv[1])))
