"""Failure domains: racks that are lost as a whole, and what the coordinator says where that cannot be covered."""

from __future__ import annotations

import pytest

from everstep.elastic.protocol import events as e
from everstep.elastic.sim.run import SHAPES, main, simulate

from .script import Script

RACKS = [name for name, shape in SHAPES.items() if shape.racks]
SEEDS = range(12)


@pytest.mark.parametrize("name", RACKS)
def test_racks_are_lost_as_a_whole(name: str) -> None:
    """Random losses of whole racks. `simulate` raises where a job does not end with the undisturbed run's bytes."""
    outcomes = [simulate(seed, SHAPES[name]) for seed in SEEDS]
    assert sum(outcome.happenings["racks lost"] for outcome in outcomes) > len(SEEDS) // 2
    assert not [outcome.why for outcome in outcomes if outcome.why]


def started(labels: list[tuple[str, ...]], losses: int = 1) -> tuple[Script, list[e.Effect]]:
    """A job of one worker on each of these nodes, up to its start, and the effects of that."""
    s = Script(workers=1, losses=losses, min_nodes=len(labels), max_nodes=len(labels))
    for number, domains in enumerate(labels):
        s(e.NodeJoined(f"n{number}", f"host-n{number}", 1, f"n{number}:1", domains=domains))
    workers = [e.WorkerId(number, 0) for number in range(len(labels))]
    s.elastic(*workers)
    return s, s.ready(*workers)


def exposed(effects: list[e.Effect]) -> list[dict[str, object]]:
    return [dict(x.fields) for x in effects if isinstance(x, e.Record) and x.event == "domain_exposed"]


def test_what_is_not_covered_is_said_at_the_start() -> None:
    _, effects = started([("rack=7",)] * 4)
    assert exposed(effects) == [{"kind": "rack", "why": "all 4 nodes are in rack=7"}]
    texts = [x.text for x in effects if isinstance(x, e.TellNode)]
    assert len(texts) == 4
    assert all("a rack may not be lost as a whole: all 4 nodes are in rack=7" in text for text in texts)


@pytest.mark.parametrize("labels", [[("rack=1",), ("rack=1",), ("rack=2",), ("rack=2",)], [("rack=1",), ()], [(), ()]])
def test_nothing_is_said_where_every_domain_may_be_lost(labels: list[tuple[str, ...]]) -> None:
    s, effects = started(labels)
    assert not exposed(effects)
    assert s.state.placement is not None
    for stripe in s.state.placement.stripes:
        racks = [s.state.nodes[node].domains or (node,) for node in (*stripe.nodes, *stripe.parity)]
        assert len(set(racks)) == len(racks) > 1


def test_what_becomes_exposed_later_is_said_then() -> None:
    """The other rack is lost: of the two nodes that are left, each may be lost, but not both."""
    s, _ = started([("rack=1",), ("rack=1",), ("rack=2",)])
    effects = s(e.NodeLost("n2", "gone"))
    assert not exposed(effects), "the members have yet to report"
    for rank in (0, 1):
        s.reported(e.WorkerId(rank, 0))
    assert [line.strip() for line in s.lines].count("(domain_exposed)") == 1
    assert s.state.placement is not None
    assert s.state.placement.note.endswith("all 2 nodes are in rack=1")


def test_the_label_of_a_node_is_recorded() -> None:
    s = Script(min_nodes=2, max_nodes=2)
    (record,) = s(e.NodeJoined("n0", "h", 1, "n0:1", domains=("rack=7", "zone=a")))
    assert isinstance(record, e.Record)
    assert record.fields["domains"] == ["rack=7", "zone=a"]


def test_a_shape_that_does_not_exist_is_named() -> None:
    with pytest.raises(SystemExit, match=r"there is no shape 'no such'; there are .*'3 nodes'"):
        main(range(1), ["no such"])
