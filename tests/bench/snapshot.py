"""The cost of a snapshot for the training thread, beside torch's checkpoints and a plain copy of the same bytes.

    python tests/bench/snapshot.py --json [--megabytes N] [--rounds N] [--quick]

One worker's state: float32 parameters and the two moments of AdamW, in shards of 4 MiB of parameters. Ours goes through
`Snapshots` into the memory of a keeper, which is another process. After each start of a snapshot the training thread
computes for longer than the copy takes; *blocking* is what it spends in calls: starting the snapshot, and waiting
for what has to be copied before the optimizer may change the state. Contenders take turns, the order rotates, figures
are medians. Torch's checkpoints go to a file system in memory, so that no disk is measured; what they do after the
state may change again is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import die_with_parent, environment
from stamps import median
from systems import versions
from throughput import coding, copying
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from wire import bytes_on_the_wire

from everstep.checkpointing.access.client import KeeperLink
from everstep.checkpointing.access.keeper_protocol import KeeperStart
from everstep.checkpointing.access.snapshot import Snapshots
from everstep.checkpointing.memory.record import record_bytes

SHARD_ELEMENTS = 1 << 20
STATE_BYTES = 12  # of a parameter: itself and two moments
TOKEN = "benchmark"

Between = Callable[[], None]
State = list[dict[str, Tensor]]


class Contender:
    """A way to save the state."""

    def save(self, state: State, between: Between) -> float:
        """Save once, calling `between` as soon as training may continue; returns the seconds of blocking."""
        raise NotImplementedError

    def close(self) -> None:
        """Release its resources."""


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


class Nothing(Contender):
    """Only the compute in between, as the baseline."""

    def save(self, state: State, between: Between) -> float:
        between()
        return 0.0


class Memcpy(Contender):
    """Every tensor copied into warm private memory, on the training thread."""

    def __init__(self, state: State) -> None:
        self._copies = [{name: tensor.clone() for name, tensor in shard.items()} for shard in state]

    def save(self, state: State, between: Between) -> float:
        seconds, _ = timed(
            lambda: [c[name].copy_(s[name]) for c, s in zip(self._copies, state, strict=True) for name in s]
        )
        between()
        return seconds


class Everstep(Contender):
    """`Snapshots`, into the memory of a keeper in another process."""

    def __init__(self, state: State, keeper: str) -> None:
        self._snapshots = Snapshots(KeeperLink(keeper, TOKEN, rank=0, incarnation=os.getpid()))
        sizes = [(i, record_bytes(shard), SHARD_ELEMENTS * 4) for i, shard in enumerate(state)]
        self.prepared_s, _ = timed(lambda: self._snapshots.protect(sizes))
        self.version = 0

    def save(self, state: State, between: Between) -> float:
        self.version += 1
        shards = range(len(state))
        begun, _ = timed(lambda: self._snapshots.begin(self.version, state.__getitem__, shards))
        between()
        waited, _ = timed(self._snapshots.wait)
        return begun + waited

    def close(self) -> None:
        self._snapshots.close()


class TorchSave(Contender):
    """`torch.save`."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "torch.pt"

    def save(self, state: State, between: Between) -> float:
        seconds, _ = timed(lambda: torch.save(state, self._path))
        between()
        return seconds


class AsyncSave(Contender):
    """`torch.distributed.checkpoint.async_save`: copies the state at once, or with a `stager` behind the compute."""

    def __init__(self, folder: Path, kind: AsyncCheckpointerType, stager: DefaultStager | None = None) -> None:
        self._folder = folder
        self._kind = kind
        self._stager = stager
        self._saved = 0

    def save(self, state: State, between: Between) -> float:
        self._saved += 1
        path = self._folder / str(self._saved)
        flat = {f"{name}.{i}": tensor for i, shard in enumerate(state) for name, tensor in shard.items()}
        begun, response = timed(
            lambda: dcp.async_save(
                flat,
                checkpoint_id=path,
                async_checkpointer_type=self._kind,
                async_stager=self._stager,
            )
        )
        between()
        waited, upload = 0.0, response
        if self._stager is not None:
            waited, _ = timed(response.staging_completion.result)  # before the state may change
            upload = response.upload_completion
        upload.result()
        shutil.rmtree(path)
        return begun + waited

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()


# ---------------------------------------------------------------- the surroundings


def make_state(megabytes: int) -> State:
    shards = max(1, megabytes * 1_000_000 // (SHARD_ELEMENTS * STATE_BYTES) + 1)
    names = ("value", "exp_avg", "exp_avg_sq")
    return [{name: torch.randn(SHARD_ELEMENTS) for name in names} for _ in range(shards)]


@contextlib.contextmanager
def keeper() -> Any:
    """Run a keeper in another process; yields its name."""
    name = f"everstep-benchmark-{os.getpid()}"
    command = [sys.executable, "-m", "everstep.checkpointing.keeper.service", "--node", "0", "--name", name]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1"],
        env=environment(EVERSTEP_TOKEN=TOKEN),
        stdin=subprocess.PIPE,  # the leash
        stdout=subprocess.PIPE,
        preexec_fn=die_with_parent,
    )
    try:
        assert process.stdout is not None
        if KeeperStart.of(process.stdout.readline().decode()).failure is not None:
            raise RuntimeError("the keeper did not start")
        yield name
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


class Compute:
    """The training thread's work: products of matrices that stay in the cache, for a fixed time."""

    def __init__(self) -> None:
        self._matrix = torch.randn(256, 256)
        self.duration_s = 0.0
        self.products = 0
        self.products_per_cpu_s = 0.0  # does not count what other processes take from this one

    def __call__(self) -> None:
        self.products = 0
        cpu_s = time.thread_time()
        until = time.perf_counter() + self.duration_s
        while time.perf_counter() < until:
            for _ in range(8):
                self._matrix @ self._matrix
            self.products += 8
        self.products_per_cpu_s = self.products / (time.thread_time() - cpu_s)


def blocking(state: State, rounds: int, folder: Path) -> dict[str, Any]:
    """Run every contender `rounds` times; returns seconds of blocking, and the compute done meanwhile."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    compute = Compute()
    with keeper() as name:
        ours = Everstep(state, name)
        staging = DefaultStager(StagingOptions(False, False, True, False))
        contenders: dict[str, Contender] = {
            "nothing": Nothing(),
            "memcpy": Memcpy(state),
            "everstep": ours,
            "torch_save": TorchSave(folder),
            "async_save_thread": AsyncSave(folder / "thread", AsyncCheckpointerType.THREAD),
            "async_save_process": AsyncSave(folder / "process", AsyncCheckpointerType.PROCESS),
            "async_save_thread_staged_behind": AsyncSave(folder / "staged", AsyncCheckpointerType.THREAD, staging),
        }
        copy_s = min(contenders["memcpy"].save(state, lambda: None) for _ in range(3))
        compute.duration_s = max(0.1, 8 * copy_s)
        first = {name: contender.save(state, compute) for name, contender in contenders.items()}
        times: dict[str, list[float]] = {name: [] for name in contenders}
        products: dict[str, list[float]] = {name: [] for name in contenders}
        speeds: dict[str, list[float]] = {name: [] for name in contenders}
        alone: list[float] = []
        names = list(contenders)
        for number in range(rounds):
            for key in names[number % len(names) :] + names[: number % len(names)]:
                step(state)
                times[key].append(contenders[key].save(state, compute))
                products[key].append(compute.products)
                speeds[key].append(compute.products_per_cpu_s)
            alone.append(ours.save(state, lambda: None))
        for contender in contenders.values():
            contender.close()
    dist.destroy_process_group()
    return {
        "compute_in_between_s": round(compute.duration_s, 4),
        "first_s": {key: round(seconds, 5) for key, seconds in first.items() if key != "nothing"},
        "later_s": {key: round(median(seconds), 5) for key, seconds in times.items() if key != "nothing"},
        "later_worst_s": {key: round(max(seconds), 5) for key, seconds in times.items() if key != "nothing"},
        "everstep_room_made_s": round(ours.prepared_s, 4),
        "everstep_without_compute_in_between_s": round(median(alone), 5),
        "compute_done_of_undisturbed": {
            key: round(median(done) / median(products["nothing"]), 3) for key, done in products.items()
        },
        "compute_per_cpu_second_of_undisturbed": {
            key: round(median(speed) / median(speeds["nothing"]), 3) for key, speed in speeds.items()
        },
    }


def step(state: State) -> None:
    """Change every tensor, as an optimizer does."""
    for shard in state:
        for tensor in shard.values():
            tensor.mul_(0.999)


def targets(blocked: dict[str, Any], copied: dict[str, float], coded: dict[str, float]) -> list[dict[str, Any]]:
    def target(name: str, value: float, bound: float, met: bool) -> dict[str, Any]:
        return {"name": name, "value": round(value, 4), "bound": bound, "met": met}

    block = blocked["later_s"]["everstep"] / blocked["later_s"]["memcpy"]
    copy = copied["copy_with_checksum"] / copied["memcpy"]
    encode = coded["encode"] / coded["memcpy"]
    return [
        target("blocking per snapshot over a warm memcpy of the state", block, 0.05, block <= 0.05),
        target("copy with checksum: throughput over memcpy", copy, 0.8, copy >= 0.8),
        target("encoding k=4, m=2: throughput over memcpy", encode, 0.7, encode >= 0.7),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object (the only format)")
    parser.add_argument("--megabytes", type=int, default=200, help="of state, at least")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="a small state and two rounds")
    options = parser.parse_args()
    if options.quick:
        options.megabytes, options.rounds = 24, 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    torch.set_num_threads(1)
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="everstep-snapshot-", dir=memory if memory.is_dir() else None))
    try:
        state = make_state(options.megabytes)
        blocked = blocking(state, options.rounds, folder)
        block_bytes = SHARD_ELEMENTS * STATE_BYTES
        copied = copying(len(state), block_bytes, 3 * options.rounds)
        coded = coding(max(1, len(state) // 4), block_bytes, options.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = {
        "benchmark": "snapshot",
        "versions": versions(),
        "state_bytes": len(state) * block_bytes,
        "rounds": options.rounds,
        "blocking": blocked,
        "copying_GB_per_s": {"of": "bytes copied per second", **copied},
        "coding_GB_per_s": {"of": "bytes of members read per second; memcpy: bytes copied; k=4, m=2", **coded},
        "bytes_on_the_wire": {"not_measured": "--quick"} if options.quick else bytes_on_the_wire(),
        "targets": targets(blocked, copied, coded),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
