"""Orders as differences: what arrives is what was sent, whatever was sent before it, and little is sent."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everstep.comms.control import everstep_pb2 as pb
from everstep.comms.control.differences import (
    LARGE,
    BadDifference,
    DifferenceReceiver,
    DifferenceSender,
    apply,
    difference,
)
from everstep.elastic.protocol.events import AskSave, CarryOut, WorkerId
from everstep.elastic.protocol.worker_messages import read_order, write
from everstep.resharding.placement import place
from everstep.resharding.plan import plan_recovery
from everstep.resharding.planners import initial_layout
from tests.bench.agreement import model, report

pieces = st.lists(st.sampled_from(["1,", "22,", "[3,", "4],", '{"a":', '"é"}', "x", '\\"', ","]), max_size=60)


@given(pieces.map("".join), pieces.map("".join))
def test_any_text_is_made_of_any_other(before: str, after: str) -> None:
    assert apply(before, difference(before, after)) == after


@given(st.integers(0, 1 << 30))
def test_edits_of_a_long_text_are_small(seed: int) -> None:
    rng = random.Random(seed)
    values = [rng.randrange(1000) for _ in range(5000)]
    before = json.dumps(values)
    for _ in range(3):
        at = rng.randrange(len(values))
        values[at : at + rng.randrange(3)] = [rng.randrange(10_000)] * rng.randrange(3)
    after = json.dumps(values)
    changed = difference(before, after)
    assert apply(before, changed) == after
    assert len(changed) < len(after) // 50


@pytest.mark.parametrize("changed", ["", "{", "3", "[3]", "[[1]]", "[[0,9]]", "[[-1,2]]", '[[0,"1"]]', "[[0,1,2]]"])
def test_what_is_no_difference_is_refused(changed: str) -> None:
    with pytest.raises(BadDifference):
        apply("12345", changed)


def order(text: str, rank: int = 0) -> pb.AttachResponse:
    return pb.AttachResponse(number=7, to_worker=pb.ToWorker(worker=pb.WorkerId(rank=rank), json=text))


@given(st.lists(st.integers(0, 400), max_size=8), st.integers(0, 1 << 30))
def test_a_stream_of_orders(lengths: list[int], seed: int) -> None:
    """Large ones and small ones, and messages that are none."""
    rng = random.Random(seed)
    sender, receiver = DifferenceSender(), DifferenceReceiver()
    values = [rng.randrange(1000) for _ in range(600)]
    for rank, length in enumerate(lengths):
        values[length] = rng.randrange(1000)
        sent = order(json.dumps(values if length % 3 else values[:length]), rank)
        for message in (sent, pb.AttachResponse(notice=pb.Notice(text="x" * LARGE))):
            expected = message.SerializeToString()
            reduced = pb.AttachResponse.FromString(sender.reduce(message).SerializeToString())
            assert message.SerializeToString() == expected, "it is kept until it is acknowledged"
            receiver.restore(reduced)
            assert reduced.SerializeToString() == expected


def test_a_difference_on_a_stream_that_has_no_text_yet_is_refused() -> None:
    sender = DifferenceSender()
    sender.reduce(order("1," * LARGE))
    with pytest.raises(BadDifference):
        DifferenceReceiver().restore(sender.reduce(order("1," * LARGE + "2")))


def test_a_plan_travels_as_what_changed() -> None:
    """The second loss of a job of 128 ranks: its text is long, and the difference from the first one's is short."""
    ranks = 128
    spec = model(3072, 4)
    layout = initial_layout(spec, range(ranks), 4, 4 * ranks)
    sender, receiver = DifferenceSender(), DifferenceReceiver()
    sizes = []
    for generation, lost in ((2, 5), (3, 77)):
        reports = [report(spec, layout, rank) for rank in layout.ranks if rank != lost]
        plan = plan_recovery(spec, layout, reports, generation)
        layout = plan.layout
        nodes = {rank: f"node-{rank // 8}" for rank in layout.ranks}
        held = [nodes[owner] for owner in layout.owners]
        placement = place(held, [1] * len(spec.shards), sorted(set(nodes.values())), losses=1)
        peers = {rank: {"host": f"10.0.0.{rank}", "port": 4000 + rank, "incarnation": 0} for rank in layout.ranks}
        for rank in layout.ranks[:8]:
            message = CarryOut(WorkerId(rank, 0), plan, peers, {}, placement, nodes)
            sent = sender.reduce(order(write(message), rank))
            sizes.append(len(sent.to_worker.json))
            receiver.restore(sent)
            assert read_order(WorkerId(rank, 0), sent.to_worker.json) == message
    first, others = sizes[0], sizes[1:8]
    assert max(others) < 100, "a node's workers get one plan"
    assert sizes[8] < first / 3, (first, sizes[8])
    assert read_order(WorkerId(0, 0), write(AskSave(WorkerId(0, 0)))) == AskSave(WorkerId(0, 0))
