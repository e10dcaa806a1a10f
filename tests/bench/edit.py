"""The time to remove one of n ranks from a running communicator: ours is edited, gloo's is rebuilt.

    python tests/bench/edit.py --json

n real processes, every pair of which has exchanged a message; then the last rank is out, and the survivors are timed
from the moment the first of them knows to the moment the last of them has left its first barrier. Both ways in one run,
turn by turn; medians of several turns. One JSON object on stdout.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from processes import die_with_parent
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo
from torch.distributed import TCPStore

from everstep.comms.mesh.communicator import Key, Kind
from everstep.comms.mesh.gather import barrier
from everstep.comms.mesh.mesh import MeshCommunicator
from everstep.comms.mesh.tensors import of_bytes

SIZES = (4, 8, 12)
GLOO_TIMEOUT = datetime.timedelta(seconds=60)
ANSWER_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Turn:
    """What one survivor measured: monotonic seconds, which all processes of a host share, and its links."""

    begun_s: float
    ended_s: float
    closed: int
    opened: int
    kept: int


def mesh_turn(rank: int, size: int, turn: int, shared_memory: bool, pipe: Connection) -> Turn | None:
    """Everstep: every pair exchanges a message, the last rank leaves, the others edit."""
    comm = MeshCommunicator(rank, turn, host_id="bench", token="bench", shared_memory=shared_memory)
    try:
        pipe.send(comm.peer)
        peers = {peer.rank: peer for peer in pipe.recv()}
        comm.edit(1, peers)
        others = [other for other in range(size) if other != rank]
        for other in others:
            comm.send(other, Key(Kind.USER, 0), [of_bytes(b"hello")])
        for other in others:
            comm.receive(other, Key(Kind.USER, 0))
        barrier(comm, 0, 0)
        result = None
        if rank != size - 1:
            del peers[size - 1]
            begun = time.monotonic()
            comm.abort()
            report = comm.edit(2, peers)
            barrier(comm, 1, 0)
            result = Turn(begun, time.monotonic(), report.closed, report.opened, report.kept)
        pipe.send(result)
        pipe.recv()  # every rank stays until all have measured
        return result
    finally:
        comm.close()


def gloo_turn(rank: int, size: int, turn: int, store: TCPStore, pipe: Connection) -> Turn | None:
    """gloo: the same, with a process group that is destroyed and rebuilt among the survivors."""

    def group(name: str, members: int) -> Any:
        return ProcessGroupGloo(PrefixStore(f"{turn}/{name}", store), rank, members, GLOO_TIMEOUT)

    pg = group("all", size)
    tensor = torch.zeros(8, dtype=torch.uint8)
    others = [other for other in range(size) if other != rank]
    sends = [pg.send([tensor], other, 0) for other in others]
    receives = [pg.recv([torch.empty_like(tensor)], other, 0) for other in others]
    for work in sends + receives:
        work.wait()
    del work, sends, receives
    pg.barrier().wait()
    result = None
    if rank != size - 1:
        begun = time.monotonic()
        del pg
        pg = group("survivors", size - 1)
        pg.barrier().wait()
        result = Turn(begun, time.monotonic(), 2 * (size - 1), 2 * (size - 2), 0)  # a pair is two of our one-way links
    pipe.send(result)
    pipe.recv()
    return result


def worker(rank: int, size: int, port: int, pipe: Connection) -> None:
    """Take part in turns until the pipe closes."""
    die_with_parent()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False)
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        system, turn = order
        if system == "gloo":
            gloo_turn(rank, size, turn, store, pipe)
        else:
            mesh_turn(rank, size, turn, system == "mesh-shm", pipe)


def answers(pipes: list[Connection]) -> list[Any]:
    """Wait for one answer of each worker; raises an error instead of hanging."""
    found = []
    for rank, pipe in enumerate(pipes):
        if not pipe.poll(ANSWER_TIMEOUT_S):
            raise TimeoutError(f"rank {rank} said nothing for {ANSWER_TIMEOUT_S} s")
        found.append(pipe.recv())
    return found


def tell(pipes: list[Connection], what: object) -> None:
    """Send a message to every worker."""
    for pipe in pipes:
        pipe.send(what)


def play(system: str, turn: int, pipes: list[Connection]) -> tuple[float, Turn]:
    """Run one turn of all workers; returns the survivors' time, and the links of one of them."""
    tell(pipes, (system, turn))
    if system != "gloo":
        tell(pipes, answers(pipes))
    turns = [result for result in answers(pipes) if result is not None]
    tell(pipes, "done")
    return max(t.ended_s for t in turns) - min(t.begun_s for t in turns), turns[0]


def measure(size: int, repeats: int) -> dict[str, Any]:
    """Medians for `size` ranks; the systems alternate."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe() for _ in range(size)]
    pipes = [ours for ours, _ in ends]
    workers = [
        context.Process(target=worker, args=(rank, size, store.port, theirs), daemon=True)
        for rank, (_, theirs) in enumerate(ends)
    ]
    for process in workers:
        process.start()
    try:
        answers(pipes)
        systems = ("mesh-shm", "mesh-tcp", "gloo")
        times: dict[str, list[float]] = {system: [] for system in systems}
        links: dict[str, dict[str, int]] = {}
        for turn in range(1 + repeats):
            for system in systems:
                seconds, example = play(system, 1 + turn, pipes)
                if turn:  # the first one warms up
                    times[system].append(seconds)
                links[system] = {"closed": example.closed, "opened": example.opened, "kept": example.kept}
        tell(pipes, None)
    finally:
        for process in workers:
            process.join(5)
            process.kill()
            process.join()
    return {
        "ranks": size,
        "median_ms": {system: round(statistics.median(times[system]) * 1e3, 3) for system in systems},
        "worst_ms": {system: round(max(times[system]) * 1e3, 3) for system in systems},
        "links_per_survivor": links,
    }


def targets(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Everstep is not slower than gloo at any size."""
    found = []
    for result in results:
        bound = result["median_ms"]["gloo"]
        for system in ("mesh-shm", "mesh-tcp"):
            value = result["median_ms"][system]
            name = f"edit of {result['ranks']} ranks, {system}, ms"
            found.append({"name": name, "value": value, "bound": bound, "met": value <= bound})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--ranks", type=int, nargs="+", default=SIZES, metavar="N")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    results = [measure(size, options.repeats) for size in options.ranks]
    report = {"bench": "edit", "cpus": os.cpu_count(), "repeats": options.repeats, "results": results}
    report["targets"] = targets(results)
    if options.json:
        print(json.dumps(report))
    else:
        for result in results:
            print(result["ranks"], result["median_ms"], result["links_per_survivor"])
    return 0 if all(target["met"] for target in report["targets"]) else 1


if __name__ == "__main__":
    sys.exit(main())
