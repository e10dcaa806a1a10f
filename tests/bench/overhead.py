"""What everstep costs when nothing fails: its step time over that of plain torch, block by block in turn.

    python tests/bench/overhead.py --json [--pairs N] [--steps N] [--only data_parallel,pipeline] [--torchft] [--quick]

Data parallel: everstep against DistributedDataParallel over gloo, which accumulates the same micro-batches (`no_sync`).
Pipeline: everstep with two stages against `torch.distributed.pipelining`'s Schedule1F1B with two. Two processes of one
thread each, the same model, global batch, micro-batches and AdamW.
Protection (parity, replicate, replay): everstep on two nodes of one worker each, with every version outliving either of
them, against everstep on the same nodes without protection from lost nodes. Machines drift, so short runs alternate
(A B, B A, A B, ...); a step time is the difference of successive commits of one process, the first few left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from stamps import Stamps, median
from systems import (
    Everstep,
    Pipelining,
    Protected,
    Replayed,
    Replicated,
    System,
    Torchft,
    Torchrun,
    Unprotected,
    versions,
)
from workload import Job, build

WARM_UP_STEPS = 3
START_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Comparison:
    """What is compared: with how many stages, whose step time over whose, and what it is to be at most."""

    stages: int
    ours: type[System]
    theirs: type[System]
    bound: float


COMPARISONS = {
    "data_parallel": Comparison(1, Everstep, Torchrun, 1.0),
    "pipeline": Comparison(2, Everstep, Pipelining, 1.0),
    "parity": Comparison(1, Protected, Unprotected, 1.05),
    "replicate": Comparison(1, Replicated, Unprotected, 1.05),
    "replay": Comparison(1, Replayed, Unprotected, 1.05),
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def block(kind: type[System], job: Job) -> list[float]:
    """Run one job to its end; its step times in seconds, of the process that took longest over them."""
    system = kind(job=job)
    stamps = Stamps(system.folder)
    deadline = time.monotonic() + START_TIMEOUT_S + 30.0 * job.steps
    try:
        system.start()
        while True:
            stamps.poll()
            done = [p for p in stamps.processes.values() if p.commits and p.commits[-1].step == job.steps - 1]
            if len(done) == job.workers:
                break
            system.tick()
            if system.finished() or time.monotonic() > deadline:
                raise RuntimeError(f"{len(done)} of {job.workers} workers finished; log ends: {system.tail()}")
            time.sleep(0.02)
    finally:
        system.stop()
    times = [[c.t for c in p.commits[WARM_UP_STEPS - 1 :]] for p in stamps.processes.values()]
    return max(([b - a for a, b in pairwise(t)] for t in times), key=sum)


def compare(
    name: str, ours: type[System], theirs: type[System], job: Job, pairs: int, folder: Path, options: dict[str, Any]
) -> dict[str, Any]:
    """Alternate the two for `pairs` pairs of blocks; a system that cannot run is reported, the other still measured."""
    steps: dict[str, list[list[float]]] = {"ours": [], "theirs": []}
    reasons = {"ours": ours.unavailable(), "theirs": theirs.unavailable()}
    for pair in range(pairs):
        order = ("ours", "theirs") if pair % 2 == 0 else ("theirs", "ours")
        for side in order:
            if reasons[side]:
                continue
            kind = ours if side == "ours" else theirs
            settings = options if side == "ours" else None
            where = folder / f"{name}-{pair}-{side}"
            try:
                times = block(kind, replace(job, options=settings).moved(where))
            except (RuntimeError, TimeoutError, OSError) as error:
                reasons[side] = f"{type(error).__name__}: {error}"
                say(f"{name}: {kind.__name__}: {reasons[side]}")
                continue
            steps[side].append(times)
            say(f"{name}: pair {pair + 1}/{pairs}: {kind.__name__}: median step {median(times):.4f} s")
    found: dict[str, Any] = {"pairs": pairs, "step_s": {}, "skipped": {}}
    for side, kind in (("ours", ours), ("theirs", theirs)):
        found["step_s"][kind.__name__.lower()] = summary(steps[side])
        if reasons[side]:
            found["skipped"][kind.__name__.lower()] = reasons[side]
    both = steps["ours"] and steps["theirs"]
    pooled = {side: median([s for times in steps[side] for s in times]) for side in steps}
    found["ratio"] = pooled["ours"] / pooled["theirs"] if both else None
    found["ratio_of_each_pair"] = [median(a) / median(b) for a, b in zip(steps["ours"], steps["theirs"], strict=False)]
    return found


def summary(blocks: list[list[float]]) -> dict[str, Any] | None:
    if not blocks:
        return None
    pooled = [s for times in blocks for s in times]
    by_block = [round(median(times), 5) for times in blocks]
    return {"median": round(median(pooled), 5), "min": round(min(pooled), 5), "of_each_block": by_block}


def target(name: str, ratio: float | None) -> dict[str, Any]:
    bound = COMPARISONS[name].bound
    met = None if ratio is None else ratio <= bound
    over = "the unprotected one" if issubclass(COMPARISONS[name].ours, Protected) else "torch's"
    return {"name": f"{name}: everstep's step time over {over}", "value": ratio, "bound": bound, "met": met}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object (the only format)")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10, help="measured in each block")
    parser.add_argument("--only", default=",".join(COMPARISONS), help="a comma-separated choice of comparisons")
    parser.add_argument("--torchft", action="store_true", help="measure torchft against DDP too, for reference")
    parser.add_argument("--quick", action="store_true", help="one short pair each, a smaller model")
    parser.add_argument("--keep", type=Path, help="keep logs and stamps in this folder")
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - set(COMPARISONS):
        parser.error(f"no such comparison: {sorted(unknown)}; there are {list(COMPARISONS)}")
    job = Job(
        workers=2, global_batch_size=32, micro_batch_size=4, layers=6, width=256, heads=8, context=128, digests=False
    )
    if options.quick:
        options.pairs, options.steps = 1, 3
        job = replace(job, layers=2, width=64, heads=2)
    job = replace(job, steps=WARM_UP_STEPS + options.steps)
    folder = options.keep or Path(tempfile.mkdtemp(prefix="everstep-overhead-"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    found = {}
    for name in options.only.split(","):
        chosen = COMPARISONS[name]
        staged = replace(job, stages=chosen.stages)
        found[name] = compare(name, chosen.ours, chosen.theirs, staged, options.pairs, folder, {})
    if options.torchft:
        found["torchft_for_reference"] = compare("torchft", Torchft, Torchrun, job, options.pairs, folder, {})
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    shown = {k: v for k, v in asdict(job).items() if k not in ("folder", "options", "digests", "stages")}
    sizes = {
        "parameters": sum(p.numel() for p in build(job)[0].parameters()),
        "tokens_per_micro_batch": job.tokens_per_micro_batch,
        "micro_batches_per_step": job.micro_batches,
    }
    targets = [target(name, comparison["ratio"]) for name, comparison in found.items() if name in COMPARISONS]
    result = {"benchmark": "overhead", "versions": versions(), "job": {**shown, **sizes}}
    print(json.dumps({**result, "comparisons": found, "targets": targets}, indent=2))


if __name__ == "__main__":
    main()
