"""Communication that a step waits for: everstep and DistributedDataParallel over links of 1 Gbit/s, and over fast ones.

    python tests/bench/overlap.py --json [--steps N] [--rounds N]

Two nodes of one rank (network namespaces and tc; without them the JSON reports it, and all links are those of the
loopback interface). Each layer sleeps in its forward and in its backward, so what is measured is the waiting, not the
machine; a step has two micro-batches a rank. `exposed_s`: the median step less the time that its layers sleep.
Systems: everstep; DistributedDataParallel, which reduces a bucket while the layers below compute; and the same model
with one all-reduce behind the backward. Rounds alternate the order of the systems; medians of all rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from everstep import __version__
from tests.jobs import finish
from tests.jobs.hosts import Cannot, Hosts
from tests.jobs.ports import free_port

BITS_PER_S = 1e9
RANKS, TURNS, LAYERS, WIDTH = 2, 2, 12, 724
FORWARD_S, BACKWARD_S = 0.01, 0.02
COMPUTE_S = TURNS * LAYERS * (FORWARD_S + BACKWARD_S)
WARM_UP = 3
BUCKET_MB = 4  # of DistributedDataParallel: two layers; by its default all of this model is in two buckets
SYSTEMS = ("everstep", "ddp", "behind")


class Sleep(torch.autograd.Function):
    """Takes time in the forward, and in the backward."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        time.sleep(FORWARD_S)
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        time.sleep(BACKWARD_S)
        return gradients[0].clone()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return Sleep.apply(self.linear(inputs))  # type: ignore[no-any-return, no-untyped-call]


def model() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(*(Layer() for _ in range(LAYERS)))


def report(out: Path, rank: int, stamps: list[float]) -> None:
    steps = [after - before for before, after in itertools.pairwise(stamps)][WARM_UP:]
    (out / f"steps-{rank}.json").write_text(json.dumps(steps))


# ---------------------------------------------------------------- the jobs


def train_by_everstep(out: Path, steps: int) -> None:
    import everstep

    @everstep.elastic(steps=steps, global_batch_size=RANKS * TURNS, micro_batch_size=1, protection="none")
    def train(run: everstep.Run) -> None:
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        data = TensorDataset(torch.ones(RANKS * TURNS, WIDTH))
        trained, stepper, batches = run.prepare(net, optimizer, data)
        stamps: list[float] = []
        run.on_step(lambda step: stamps.append(time.monotonic()))
        for (inputs,) in batches:
            trained(inputs).square().mean().backward()
            stepper.step()
        report(out, int(os.environ["RANK"]), stamps)

    train()


def train_by_torch(out: Path, steps: int, rank: int, at: str, *, overlaps: bool) -> None:
    torch.set_num_threads(1)
    dist = torch.distributed
    if not at.startswith("tcp://127."):
        os.environ["GLOO_SOCKET_IFNAME"] = "eth0"  # of the host's namespace
    dist.init_process_group("gloo", init_method=at, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    net = model()
    trained = nn.parallel.DistributedDataParallel(net, bucket_cap_mb=BUCKET_MB) if overlaps else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    stamps: list[float] = []
    for _ in range(steps):
        for turn in range(TURNS):
            last = turn == TURNS - 1
            with contextlib.nullcontext() if last or not overlaps else trained.no_sync():  # type: ignore[union-attr, operator]
                (trained(torch.ones(1, WIDTH)).square().mean() / TURNS).backward()
        if not overlaps:
            flat = torch.cat([parameter.grad.view(-1) for parameter in net.parameters() if parameter.grad is not None])
            dist.all_reduce(flat)
            flat /= RANKS
            at_element = 0
            for parameter in net.parameters():
                parameter.grad = flat[at_element : at_element + parameter.numel()].view_as(parameter)
                at_element += parameter.numel()
        optimizer.step()
        optimizer.zero_grad()
        stamps.append(time.monotonic())
    report(out, rank, stamps)
    dist.destroy_process_group()


# ---------------------------------------------------------------- the measurement


def measure(system: str, steps: int, *, slow: bool) -> tuple[list[float], bool]:
    """The times of the slower rank's steps, and whether the links were limited."""
    with tempfile.TemporaryDirectory() as folder, Hosts(RANKS) as hosts:
        limited = False
        if slow:
            with contextlib.suppress(Cannot):
                hosts.limit(*hosts.hosts, bits_per_s=BITS_PER_S)
                limited = True
        arguments = ["--out", folder, "--steps", str(steps), "--job", system]
        if system == "everstep":
            hosts.coordinator(str(RANKS))
            flags = [f"--nnodes={RANKS}", "--nproc-per-node=1"]
            nodes = [hosts.launch(host, Path(__file__), arguments, flags) for host in hosts.hosts]
        else:
            at = f"tcp://{hosts.address(0)}:{free_port()}"
            nodes = [
                hosts.run(host, sys.executable, __file__, *arguments, "--rank", str(host), "--at", at)
                for host in hosts.hosts
            ]
        said = [finish(node) for node in nodes]
        assert all(node.returncode == 0 for node in nodes), said
        ranks = [json.loads((Path(folder) / f"steps-{rank}.json").read_text()) for rank in range(RANKS)]
    return [max(times) for times in zip(*ranks, strict=True)], limited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object (the only format)")
    parser.add_argument("--steps", type=int, default=15, help="of a job; the first ones are not counted")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--job", choices=SYSTEMS, help="run one rank of a job (used by this script)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--at", default="")
    options = parser.parse_args()
    if options.job == "everstep":
        train_by_everstep(options.out, options.steps)
        return
    if options.job:
        train_by_torch(options.out, options.steps, options.rank, options.at, overlaps=options.job == "ddp")
        return
    found: dict[tuple[str, bool], list[float]] = {}
    limited = False
    for number in range(options.rounds):
        for slow in (True, False):
            for system in SYSTEMS if number % 2 == 0 else reversed(SYSTEMS):
                times, was = measure(system, options.steps, slow=slow)
                found.setdefault((system, slow), []).extend(times)
                limited |= was
    steps = {key: statistics.median(times) for key, times in found.items()}
    results: dict[str, Any] = {
        "benchmark": "overlap",
        "versions": {"everstep": __version__, "torch": torch.__version__, "cpus": os.cpu_count()},
        "links_limited": limited,
        "links_bits_per_s": BITS_PER_S,
        "job": {
            "ranks": RANKS,
            "micro_batches_a_rank": TURNS,
            "layers": LAYERS,
            "gradient_bytes": LAYERS * WIDTH * WIDTH * 4,
            "compute_s": round(COMPUTE_S, 3),
        },
        **{
            name: {
                system: {
                    "step_s": round(steps[system, slow], 4),
                    "exposed_s": round(steps[system, slow] - COMPUTE_S, 4),
                    "over_ddp": round(steps[system, slow] / steps["ddp", slow], 3),
                }
                for system in SYSTEMS
            }
            for name, slow in (("slow_links", True), ("fast_links", False))
        },
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
