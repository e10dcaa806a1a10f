"""What the agreement of a step costs, and the look-ups with which a rank enters a generation, in jobs of many ranks.

    python tests/bench/agreement.py --json [--sizes 4:48,256:6144,1024:65536]

All ranks are driven by one thread over the in-memory communicator: the product's shares, its codec and its way through
the tree, with real messages. The processor time of every rank's piece of work is measured, and the time of a step is
that of the longest chain of pieces that wait for each other, as if each rank had a processor of its own and messages
took no time on their way. `cpu_ms` is what one rank spends, at most.

An order is what a node gets with a plan: who owns what, where each rank listens, where parity lies. The first one is
sent whole, and those of later losses as the difference from it.

The look-ups are those that a rank makes between a plan and its next step: whom it sends what in both exchanges, whom it
waits for, its own work, and the parity that its node holds. Best of several turns. One JSON object on stdout.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

from everstep.comms.control import everstep_pb2 as pb
from everstep.comms.control.differences import DifferenceReceiver, DifferenceSender
from everstep.comms.mesh.communicator import Key, Kind
from everstep.comms.mesh.in_memory import MemoryCommunicator, MemoryNetwork
from everstep.comms.mesh.tensors import host_bytes, of_bytes
from everstep.elastic.protocol.agreement import (
    SHARE_BYTES,
    Kept,
    Receive,
    Saving,
    Send,
    Share,
    exchange,
)
from everstep.elastic.protocol.events import CarryOut, WorkerId
from everstep.elastic.protocol.exact import ExactSum
from everstep.elastic.protocol.wire import decode, encode
from everstep.elastic.protocol.worker_messages import write
from everstep.resharding.layout import Layout
from everstep.resharding.moves import received
from everstep.resharding.placement import Placement, place
from everstep.resharding.plan import Plan, Report, plan_recovery
from everstep.resharding.planners import initial_layout
from everstep.resharding.units import ModelSpec, ParameterSpec
from everstep.resharding.work import Work

SIZES = "4:48,256:6144,1024:65536"
LOOKUP_TARGETS_MS = ((6144, 20.0), (1 << 60, 200.0))  # of jobs of at most so many shards
RANKS_PER_STAGE = 32
STEPS, TURNS = 5, 7
RANKS_PER_NODE = 8


def model(shards: int, stages: int) -> ModelSpec:
    """A model with this number of shards, four per parameter, and two layers per stage."""
    layers = 2 * stages
    count = shards // 4
    parameters = tuple(ParameterSpec(f"{i}", (16, 1 << 18), "float32", 4, (i * layers // count,)) for i in range(count))
    spec = ModelSpec((1.0,) * layers, parameters)
    assert len(spec.shards) == shards, len(spec.shards)
    return spec


# ------------------------------------------------------------ the agreement


class Ranks:
    """All ranks of a job, and when each would finish if all ran at the same time."""

    def __init__(self, ranks: int, shards: int) -> None:
        network, rng = MemoryNetwork(), random.Random(0)
        self.comms = [MemoryCommunicator(rank, 0, network=network) for rank in range(ranks)]
        for comm in self.comms:
            comm.edit(1, {other.rank: other.peer for other in self.comms})
        self.norms = [[rng.lognormvariate(0, 8) for _ in range(rank, shards, ranks)] for rank in range(ranks)]
        self.bytes: list[int] = []
        self.hops = 0

    def share(self, rank: int, step: int) -> Share:
        """The share of a rank in a job that uses every feature."""
        return Share(
            digest=random.Random(rank).getrandbits(64),
            join=0,
            kept=Kept(whole=step, before=step - 1, every=(rank, 4)),
            norm=ExactSum.of(norm * norm for norm in self.norms[rank]),
            loss=ExactSum.of([1 / (rank + 3)]),
            losses=1,
            terms=1 << 62,
            step_s=0.1,
            timed=True,
            saving=Saving(
                free=True, asked=False, again=False, newest=step, tried=step, first=(rank, time.time(), "0" * 16)
            ),
        )

    def step(self, number: int) -> tuple[float, float]:
        """Seconds of a step's agreement, and of the rank with the most work in it."""
        clock = [0.0] * len(self.comms)
        spent = [0.0] * len(self.comms)
        depth = [0] * len(self.comms)
        sent: dict[tuple[int, int], tuple[float, int]] = {}
        running: dict[int, Generator[Send | Receive, Any, Share]] = {}
        asked: dict[int, Send | Receive] = {}
        results: set[bytes] = set()
        encoded: list[tuple[object, bytes]] = [(None, b"")] * len(self.comms)  # as the product: once for all children

        def work(rank: int, act: Callable[[], Any]) -> None:
            began = time.process_time()
            try:
                asked[rank] = act()
            except StopIteration as end:
                del asked[rank]
                results.add(encode(end.value))
            took = time.process_time() - began
            clock[rank] += took
            spent[rank] += took

        def begin(rank: int) -> Send | Receive:
            running[rank] = exchange(rank, self.comms[rank].members, self.share(rank, number))
            asked[rank] = next(running[rank])
            return asked[rank]

        def carry_out(rank: int, wish: Send | Receive) -> Send | Receive:
            comm, key = self.comms[rank], Key(Kind.GATHER if wish.up else Kind.SCATTER, number, 0, 1)
            if isinstance(wish, Receive):
                return running[rank].send(decode(Share, host_bytes(comm.receive(wish.source, key))))
            if encoded[rank][0] is not wish.value:
                encoded[rank] = (wish.value, encode(wish.value))
            data = encoded[rank][1]
            self.bytes.append(len(data))
            comm.send(wish.to, key, [of_bytes(data)])
            return running[rank].send(None)

        for rank in range(len(self.comms)):
            asked[rank] = Receive(rank, True)  # so that one that is alone is through
            work(rank, lambda rank=rank: begin(rank))
        while asked:
            for rank, wish in list(asked.items()):
                if isinstance(wish, Receive):
                    if (wish.source, rank) not in sent:
                        continue
                    came, hops = sent.pop((wish.source, rank))
                    clock[rank], depth[rank] = max(clock[rank], came), max(depth[rank], hops)
                work(rank, lambda rank=rank, wish=wish: carry_out(rank, wish))
                if isinstance(wish, Send):
                    depth[rank] += 1
                    sent[rank, wish.to] = (clock[rank], depth[rank])
        assert len(results) == 1, "ranks agreed on different things"
        self.hops = max(depth)
        return max(clock), max(spent)


def agreement(ranks: int, shards: int) -> dict[str, Any]:
    """One size's figures."""
    job = Ranks(ranks, shards)
    took = [job.step(number) for number in range(STEPS)]
    for comm in job.comms:
        comm.close()
    return {
        "bytes_per_message": max(job.bytes, default=0),
        "messages_per_step": len(job.bytes) // STEPS,
        "hops": job.hops,
        "hops_target": 2 * math.ceil(math.log2(ranks)),
        "step_ms": round(min(total for total, _ in took) * 1e3, 3),
        "cpu_ms": round(min(most for _, most in took) * 1e3, 3),
    }


# ------------------------------------------------------------ entering a generation


def look_up(layout: Layout, spec: ModelSpec, plan: Plan, rank: int) -> int:
    """Every look-up of a rank that enters a generation; returns the number of messages that it will exchange."""
    index, work = layout.index(spec), Work(plan.work, plan.kept)
    layout.stage_of(rank)
    messages = len(received(plan.moves, rank))
    owners = {owner for layer in work.layers_of(rank) for owner in index.owners_in(layer)}
    for owner in owners:
        owned = index.owned_in(owner)
        messages += bool([owned[layer] for layer in work.layers_of(rank) if layer in owned])
    sources = {source for layer in index.owned_in(rank) for source in work.contributors(layer)}
    messages += len([work.layers_of(source) for source in sources])
    messages += len([index.read_from(rank, reader) for reader in index.readers(rank)])
    messages += len([index.read_from(owner, rank) for owner in index.sources(rank)])
    for span in work.spans_of(rank):
        for found in (work.next_segment(span), work.previous_segment(span)):
            messages += found is not None
    return messages


def report(spec: ModelSpec, layout: Layout, rank: int) -> Report:
    """The report of a survivor in the middle of a step, with half of its work done."""
    stage, spans = layout.stage_of(rank), layout.work.spans_of(rank)
    return Report(
        rank=rank,
        generation=1,
        owned=tuple(shard.index for shard in layout.index(spec).owned(rank)),
        owned_version=1,
        values_version=1,
        agreed=0,
        layers=(stage.start, stage.stop),
        held=spans[: len(spans) // 2],
        todo=spans[len(spans) // 2 :],
    )


def entering(ranks: int, shards: int, stages: int) -> dict[str, Any]:
    """One layout's figures: the generation that follows the loss of a rank."""
    spec = model(shards, stages)
    old = initial_layout(spec, range(ranks), stages, ranks)
    reports = [report(spec, old, rank) for rank in range(1, ranks)]
    began = time.perf_counter()
    plan = plan_recovery(spec, old, reports, 2)
    planned_s = time.perf_counter() - began
    text = plan.to_json()
    nodes = [f"node-{rank // RANKS_PER_NODE}" for rank in range(ranks)]
    placement = place([nodes[owner] for owner in plan.layout.owners], [1] * shards, sorted(set(nodes)), losses=1)
    took, decoded = [], []
    for _ in range(TURNS):
        gc.collect()
        began = time.process_time()
        fresh = Plan.from_json(text)
        decoded.append(time.process_time() - began)
        began = time.process_time()
        look_up(fresh.layout, spec, fresh, 1)
        replace(placement).held_by(nodes[1])
        took.append(time.process_time() - began)
    return {
        "lookups_ms": round(min(took) * 1e3, 2),
        "decode_plan_ms": round(min(decoded) * 1e3, 2),
        "plan_bytes": len(text),
        **orders(spec, plan, placement),
        "coordinator_plans_ms": round(planned_s * 1e3, 1),
    }


def orders(spec: ModelSpec, plan: Plan, placement: Placement) -> dict[str, Any]:
    """The bytes sent to a node: the whole order of this plan, then the changes for the next loss."""
    sender, receiver, sent, took = DifferenceSender(), DifferenceReceiver(), [], []
    for another in (False, True):
        if another:
            reports = [report(spec, plan.layout, rank) for rank in plan.layout.ranks[:-1]]
            plan = plan_recovery(spec, plan.layout, reports, plan.generation + 1)
        nodes = {rank: f"node-{rank // RANKS_PER_NODE}" for rank in plan.layout.ranks}
        peers = {rank: {"host": f"10.0.{rank >> 8}.{rank & 255}", "port": 4000 + rank} for rank in plan.layout.ranks}
        text = write(CarryOut(WorkerId(1, 0), plan, peers, {}, placement, nodes))
        began = time.perf_counter()
        order = sender.reduce(pb.AttachResponse(to_worker=pb.ToWorker(json=text)))
        took.append(time.perf_counter() - began)
        sent.append(len(order.to_worker.json))
        receiver.restore(order)
        assert order.to_worker.json == text
    return {"order_bytes_first": sent[0], "order_bytes_next": sent[1], "difference_ms": round(took[1] * 1e3, 1)}


def measure(ranks: int, shards: int) -> dict[str, Any]:
    """One size, with pipeline stages and without."""
    layouts = {stages: entering(ranks, shards, stages) for stages in sorted({1, max(1, ranks // RANKS_PER_STAGE)})}
    return {"ranks": ranks, "shards": shards, "agreement": agreement(ranks, shards), "entering_by_stages": layouts}


def targets(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of at most 1 KiB, logarithmically many hops, and look-ups in a few milliseconds."""
    found = []
    for result in results:
        size, agreed = f"{result['ranks']} ranks, {result['shards']} shards", result["agreement"]
        pairs = [("bytes per message", agreed["bytes_per_message"], SHARE_BYTES)]
        pairs.append(("hops", agreed["hops"], agreed["hops_target"]))
        bound = next(ms for shards, ms in LOOKUP_TARGETS_MS if result["shards"] <= shards)
        for stages, entered in result["entering_by_stages"].items():
            pairs.append((f"look-ups of a rank, {stages} stages, ms", entered["lookups_ms"], bound))
        found += [
            {"name": f"{name}, {size}", "value": value, "bound": bound, "met": value <= bound}
            for name, value, bound in pairs
        ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--sizes", default=SIZES, metavar="RANKS:SHARDS,...")
    options = parser.parse_args()
    results = [measure(*map(int, size.split(":"))) for size in options.sizes.split(",")]
    report = {"bench": "agreement", "cpus": os.cpu_count(), "steps": STEPS, "turns": TURNS, "results": results}
    report["targets"] = targets(results)
    if options.json:
        print(json.dumps(report))
    else:
        for result in results:
            print(result["ranks"], result["shards"], result["agreement"], result["entering_by_stages"])
    return 0 if all(target["met"] for target in report["targets"]) else 1


if __name__ == "__main__":
    sys.exit(main())
