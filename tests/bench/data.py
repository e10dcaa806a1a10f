"""Loading data: everstep's step time over that of DistributedDataParallel, with the same DataLoader that works ahead.

    python tests/bench/data.py --json [--pairs N] [--steps N]

Two ranks; a sample takes 20 ms to load, and each rank has two worker processes for that, which is enough only if they
work ahead all the time. A micro-batch of eight samples is computed for 100 ms. Both sleep, so that what is measured is
the waiting, not the machine. Blocks alternate (A B, B A, ...), and the ratio is the median of those of the pairs.
`fetch_share`: the part of a step in which a rank waits for its next micro-batch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

SAMPLE_S, COMPUTE_S = 0.02, 0.1
RANKS, WORKERS, MICRO, TURNS = 2, 2, 8, 4  # TURNS: micro-batches of a rank in a step
BATCH = RANKS * MICRO * TURNS
WARM_UP = 5


class Slow(torch.utils.data.Dataset[Any]):
    """A dataset with a fixed loading time per sample."""

    def __len__(self) -> int:
        return 100 * BATCH

    def __getitem__(self, index: int) -> Any:
        time.sleep(SAMPLE_S)
        return torch.full((8,), float(index % 7)), torch.full((1,), float(index % 3))


class Watch:
    """Records the duration of steps, and how long the rank waits for micro-batches in them."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.steps: list[float] = []
        self.fetches: list[float] = []
        self._fetched, self._began = 0.0, time.monotonic()

    def each(self, batches: Iterable[Any]) -> Iterable[Any]:
        iterator = iter(batches)
        while True:
            began = time.monotonic()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._fetched += time.monotonic() - began
            yield batch

    def step(self) -> None:
        now = time.monotonic()
        self.steps.append(now - self._began)
        self.fetches.append(self._fetched)
        self._began, self._fetched = now, 0.0

    def write(self) -> None:
        found = {"steps": self.steps[WARM_UP:], "fetches": self.fetches[WARM_UP:]}
        (self.out / f"times-{os.environ['RANK']}.json").write_text(json.dumps(found))


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    inputs, targets = batch
    time.sleep(COMPUTE_S)
    return nn.functional.mse_loss(model(inputs), targets)


def with_everstep(out: Path, steps: int) -> None:
    import everstep

    @everstep.elastic(steps=steps, global_batch_size=BATCH, micro_batch_size=MICRO)
    def train(run: Any) -> None:
        model = nn.Linear(8, 1)
        loader = DataLoader(Slow(), batch_size=MICRO, shuffle=True, num_workers=WORKERS)
        model, optimizer, batches = run.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01), loader)
        watch = Watch(out)
        for turn, batch in enumerate(watch.each(batches), 1):
            loss_of(model, batch).backward()
            optimizer.step()
            if turn % TURNS == 0:
                watch.step()
        watch.write()

    train()


def with_ddp(out: Path, steps: int) -> None:
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    model = nn.parallel.DistributedDataParallel(nn.Linear(8, 1))
    sampler = torch.utils.data.DistributedSampler(Slow())
    loader = DataLoader(Slow(), batch_size=MICRO, sampler=sampler, num_workers=WORKERS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    watch = Watch(out)
    for turn, batch in enumerate(watch.each(loader), 1):
        if turn % TURNS:
            with model.no_sync():
                loss_of(model, batch).backward()
            continue
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.step()
        if len(watch.steps) == steps:
            break
    watch.write()
    torch.distributed.destroy_process_group()


def block(system: str, steps: int) -> dict[str, float]:
    """One run: the median step, and the longest waiting time of a rank as a share of it."""
    with tempfile.TemporaryDirectory(prefix="everstep-data-") as folder:
        runner = ["everstep", "run"] if system == "everstep" else ["torch.distributed.run"]
        command = [sys.executable, "-m", *runner, f"--nproc-per-node={RANKS}", f"--log-dir={folder}/logs"]
        command += (
            [] if system == "everstep" else ["--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        )
        command += [__file__, f"--role={system}", f"--steps={steps}", f"--out={folder}"]
        subprocess.run(command, check=True, stdout=sys.stderr, timeout=300)
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("times-*.json"))]
    assert len(found) == RANKS
    step_s = statistics.median(statistics.median(rank["steps"]) for rank in found)
    share = max(sum(rank["fetches"]) / sum(rank["steps"]) for rank in found)
    return {"step_s": step_s, "fetch_share": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object (the only format)")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=40, help="of each block")
    parser.add_argument("--role", choices=("everstep", "ddp"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        (with_everstep if options.role == "everstep" else with_ddp)(options.out, options.steps)
        return
    blocks: dict[str, list[dict[str, float]]] = {"everstep": [], "ddp": []}
    for pair in range(options.pairs):
        for system in ("everstep", "ddp") if pair % 2 == 0 else ("ddp", "everstep"):
            blocks[system].append(block(system, options.steps))
            print(f"pair {pair + 1}/{options.pairs}: {system}: {blocks[system][-1]}", file=sys.stderr, flush=True)
    ratios = [a["step_s"] / b["step_s"] for a, b in zip(blocks["everstep"], blocks["ddp"], strict=True)]
    ratio = statistics.median(ratios)
    share = statistics.median(found["fetch_share"] for found in blocks["everstep"])
    result = {
        "pairs": options.pairs,
        "samples_s": {"least": BATCH * SAMPLE_S / (RANKS * WORKERS), "computing": TURNS * COMPUTE_S},
        "step_s": {name: [round(found["step_s"], 5) for found in each] for name, each in blocks.items()},
        "fetch_share": {name: [round(found["fetch_share"], 4) for found in each] for name, each in blocks.items()},
        "ratio_of_each_pair": [round(found, 4) for found in ratios],
        "targets": [
            {"name": "step time over that of DDP", "value": round(ratio, 4), "bound": 1.02, "met": ratio <= 1.02},
            {"name": "share of a step spent fetching", "value": round(share, 4), "bound": 0.02, "met": share <= 0.02},
        ],
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
