"""Load converted checkpoints into Megatron worlds of other shapes, and record the state of their processes.

Usage: megatron_load.py FOLDER CONVERTED. For every case in both, writes CONVERTED/<case>/loaded.pt.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import megatron_state
import torch
import torch.distributed as dist
from megatron_save import CASES
from megatron_world import build, launch, start, stop, train

WORLDS = {  # another world than the checkpoint is from
    "plain": {"tp": 1, "pp": 2, "sharding": "fully_reshardable"},
    "reshardable": {"tp": 1, "pp": 4},
    "buckets": {"tp": 2, "pp": 1, "sharding": "fully_reshardable"},
    "experts": {"tp": 1, "pp": 1, "ep": 4},
}


def main(root: Path) -> None:
    for case in CASES:
        if case.name not in WORLDS:
            continue
        other = replace(case, **WORLDS[case.name])
        start(other)
        model, optimizer, config = build(other, seed=2)
        train(other, model, optimizer, steps=1)  # torch's Adam has no state before
        state = megatron_state.restore(other, model, optimizer, root / case.name / "iter_0000003")
        loaded = megatron_state.gather(other, model, optimizer, config)
        if dist.get_rank() == 0:
            assert loaded is not None
            loaded["iteration"] = state["iteration"]
            torch.save(loaded, root / case.name / "loaded.pt")
        stop()


if __name__ == "__main__":
    launch(4, lambda: main(Path(sys.argv[1])))
