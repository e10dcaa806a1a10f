"""Messages between workers and the coordinator arrive as they were sent."""

from __future__ import annotations

import json

import pytest

from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.codec import Unreadable
from everstep.elastic.protocol.worker_messages import (
    FROM_WORKER,
    TO_WORKER,
    FromWorker,
    ToWorker,
    read_event,
    read_order,
    write,
)
from everstep.resharding.placement import Placement, Stripe
from everstep.resharding.plan import Leg, Report, plan_start
from everstep.resharding.planners import initial_layout
from everstep.resharding.units import ModelSpec, ParameterSpec

ME = e.WorkerId(3, 2)
MODEL = ModelSpec((1.0, 2.0), tuple(ParameterSpec(f"{i}.weight", (4, 3), "float32", 4, (i,)) for i in range(2)), True)
JOB = e.Job(
    steps=9,
    stages=2,
    micro_batches=4,
    global_batch_size=8,
    model=MODEL,
    sample_digests=("a", "b"),
    state_bytes=(96, 96),
    gradient_bytes=(48, 48),
)
REPORT = Report(rank=ME.rank, generation=5, owned_version=7, owned=(0, 1), layers=(0, 1), held=(Leg(0, 0, 1),))
PEER = {"rank": 3, "incarnation": 2, "host_id": "h", "local_name": "n", "address": "[::1]:5"}
PLAN = plan_start(initial_layout(MODEL, [0, 1, 3], 2, 4))
STRIPES = (Stripe((0, 1), ("n0", "n1"), ("n3",)),)
SAID: list[FromWorker] = [
    e.WorkerDeclaredElastic(ME),
    e.WorkerReady(ME, PEER, JOB, (e.Saved(4, "step-4", '{"loss": NaN}'), e.Saved(2, "step-2", ""))),
    e.WorkerReported(ME, 5, REPORT, 0.25),
    e.WorkerLacking(ME, 5, 7, (1, 2)),
    e.CorruptionFound(ME, 5, "keeper", node="n1", shard=1, detail="version 7"),
    e.WorkerResumed(ME, 5, 0.01, 0.02),
    e.WorkerSwitched(ME, 6, 0.125, 1 << 40, 7),
    e.WorkerIdled(ME, 6),
    e.WorkerCommitted(ME, 8, "{}", loss=None, digest="00ff", generation=6, protected=7, every=2),
    e.WorkerCommitted(ME, 8, "{}", loss=float("inf"), settled=True),
    e.WorkerNoted(ME, "warning", {"text": "a\nb\u2028é", "nested": {"1": [2, {"three": None}]}}),
    e.CheckpointSaved(ME, e.Saved(8, "step-8", "{}"), {"seconds": 0.5, "bytes": 1 << 40}),
    e.CheckpointUnreadable(ME, "step-8", "chunk 3 is damaged"),
    e.WorkerLeft(ME, 9, "step-9"),
    e.WorkerWentOn(ME, 9),
    e.WorkerFinished(ME, 9, "step-9"),
    e.WorkerConcluded(ME, "step-9"),
    e.WorkerRaised(ME, "ValueError: x", "Traceback"),
]
HEARD: list[ToWorker] = [
    e.AbortGeneration(ME, 5),
    e.CarryOut(ME, PLAN, {0: PEER, 3: PEER}, {"n0": "h:1"}, Placement(5, 2, 1, 1, STRIPES), {0: "n0", 3: "n3"}),
    e.AskSave(ME),
    e.TellLeft(ME, 8),
    e.Conclude(ME, 8, "step-8"),
    e.EndTraining(ME),
    e.EndWorker(ME),
]


def test_every_kind_is_here() -> None:
    assert {type(message).__name__ for message in SAID} == set(FROM_WORKER)
    assert {type(message).__name__ for message in HEARD} == set(TO_WORKER)


@pytest.mark.parametrize("message", SAID, ids=lambda message: type(message).__name__)
def test_what_a_worker_says(message: FromWorker) -> None:
    text = write(message)
    assert "\n" not in text
    assert read_event(ME, text) == message


@pytest.mark.parametrize("message", HEARD, ids=lambda message: type(message).__name__)
def test_what_a_worker_hears(message: ToWorker) -> None:
    assert read_order(ME, write(message)) == message


def test_the_channel_names_the_worker() -> None:
    """Not the message: no worker sends for another."""
    assert "worker" not in json.loads(write(e.WorkerIdled(ME, 6)))
    assert read_event(e.WorkerId(0, 0), write(e.WorkerIdled(ME, 6))) == e.WorkerIdled(e.WorkerId(0, 0), 6)
    with pytest.raises(Unreadable, match=r"these came: .*'worker'"):
        read_event(ME, json.dumps({"kind": "WorkerIdled", "generation": 6, "worker": [0, 0]}))


def test_a_worker_gives_no_orders() -> None:
    with pytest.raises(Unreadable, match="no message starts with"):
        read_event(ME, write(e.EndTraining(ME)))
    with pytest.raises(Unreadable, match="no message starts with"):
        read_order(ME, write(e.WorkerIdled(ME, 6)))
