"""The overhead of everstep without failures: its step time over that of plain torch, in alternating blocks.

    python tests/bench/overhead.py --json [--pairs N] [--steps N] [--only data_parallel,pipeline] [--torchft] [--quick]

Data parallel: everstep against DistributedDataParallel over gloo, which accumulates the same micro-batches (`no_sync`).
Pipeline: everstep with two stages against `torch.distributed.pipelining`'s Schedule1F1B with two. Two processes of one
thread each, the same model, global batch, micro-batches and AdamW.
Protection (parity, replicate, replay): everstep on two nodes of one worker each, with every version outliving either of
them, against everstep on the same nodes without protection from lost nodes. Machines drift, so short runs alternate
(A B, B A, A B, ...); a step time is the difference of successive commits of one process, the first few left out, and
the ratio is the median of those of the pairs. Processor seconds of a step, over all processes, are steadier.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any

import psutil
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
    """A comparison: the number of stages, the two systems, and the target of their ratio of step times."""

    stages: int
    ours: type[System]
    theirs: type[System]
    bound: float


COMPARISONS = {
    "data_parallel": Comparison(1, Everstep, Torchrun, 1.0),
    "pipeline": Comparison(2, Everstep, Pipelining, 1.0),
    "parity": Comparison(1, Protected, Unprotected, 1.03),
    "replicate": Comparison(1, Replicated, Unprotected, 1.03),
    "replay": Comparison(1, Replayed, Unprotected, 1.03),
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Block:
    """One run: step times in seconds, of the slowest process; processor seconds of a step."""

    times: list[float]
    processor_s: float


def processor_s(system: System) -> float:
    """Processor seconds of all processes of a system since their start."""
    total = 0.0
    for child in system.children:
        with contextlib.suppress(psutil.Error):
            first = psutil.Process(child.pid)
            for process in [first, *first.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    used = process.cpu_times()
                    total += used.user + used.system
    return total


def block(kind: type[System], job: Job) -> Block:
    """Run one job to its end."""
    system = kind(job=job)
    stamps = Stamps(system.folder)
    deadline = time.monotonic() + START_TIMEOUT_S + 30.0 * job.steps
    marks: dict[int, float] = {}  # step committed by all -> processor seconds when that was first seen
    try:
        system.start()
        while True:
            stamps.poll()
            steps = [p.commits[-1].step for p in stamps.processes.values() if p.commits]
            if len(steps) == job.workers and WARM_UP_STEPS - 1 <= min(steps) < job.steps - 1:
                marks[min(steps)] = marks.get(min(steps)) or processor_s(system)
            if steps.count(job.steps - 1) == job.workers:
                break
            system.tick()
            if system.finished() or time.monotonic() > deadline:
                raise RuntimeError(f"the workers committed {steps} of {job.steps} steps; log ends: {system.tail()}")
            time.sleep(0.05)
    finally:
        system.stop()
    first, last = min(marks), max(marks)
    times = [[c.t for c in p.commits[WARM_UP_STEPS - 1 :]] for p in stamps.processes.values()]
    longest = max(([b - a for a, b in pairwise(t)] for t in times), key=sum)
    return Block(longest, (marks[last] - marks[first]) / max(1, last - first))


def compare(
    name: str, ours: type[System], theirs: type[System], job: Job, pairs: int, folder: Path, options: dict[str, Any]
) -> dict[str, Any]:
    """Alternate the two systems for `pairs` pairs of blocks; a system that cannot run is reported."""
    blocks: dict[str, list[Block]] = {"ours": [], "theirs": []}
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
                found_here = block(kind, replace(job, options=settings).moved(where))
            except (RuntimeError, TimeoutError, OSError) as error:
                reasons[side] = f"{type(error).__name__}: {error}"
                say(f"{name}: {kind.__name__}: {reasons[side]}")
                continue
            blocks[side].append(found_here)
            say(f"{name}: pair {pair + 1}/{pairs}: {kind.__name__}: median step {median(found_here.times):.4f} s")
    steps = {side: [block.times for block in blocks[side]] for side in blocks}
    used = {side: [block.processor_s for block in blocks[side]] for side in blocks}
    found: dict[str, Any] = {"pairs": pairs, "step_s": {}, "processor_s_of_a_step": {}, "skipped": {}}
    for side, kind in (("ours", ours), ("theirs", theirs)):
        found["step_s"][kind.__name__.lower()] = summary(steps[side])
        found["processor_s_of_a_step"][kind.__name__.lower()] = [round(s, 4) for s in used[side]]
        if reasons[side]:
            found["skipped"][kind.__name__.lower()] = reasons[side]
    both = steps["ours"] and steps["theirs"]
    each = [median(a) / median(b) for a, b in zip(steps["ours"], steps["theirs"], strict=False)]
    found["ratio"] = median(each) if both else None
    found["ratio_of_each_pair"] = [round(ratio, 4) for ratio in each]
    found["quartiles_of_the_ratios"] = [round(q, 4) for q in quantiles(each)] if len(each) > 1 else None
    found["ratio_of_processor_s"] = median(used["ours"]) / median(used["theirs"]) if both else None
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
    parser.add_argument("--pairs", type=int, default=12)
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
