"""Spare nodes, as the coordinator decides: which may wait, which takes a place, and that nothing is lost with one."""

from __future__ import annotations

import dataclasses

from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.causes import Ending
from everstep.elastic.protocol.codec import changed_rows, state_of
from everstep.elastic.protocol.state import Phase, Quarantine

from .golden_draining import trained
from .script import Script, w
from .test_quarantine import records, tick


def spared(*names: str, spares: int = 2, nodes: int = 2) -> Script:
    """A job in training, and nodes that come afterwards."""
    s = trained(nodes, min_nodes=nodes)
    s.state = dataclasses.replace(s.state, config=dataclasses.replace(s.state.config, spares=spares))
    for name in names:
        s.node(name)
    return s


def came(s: Script, name: str, slots: int = 1, domains: tuple[str, ...] = ()) -> list[e.Effect]:
    return s(e.NodeJoined(name, f"host-{name}", slots, f"{name}:1", domains=domains))


def started(effects: list[e.Effect]) -> list[tuple[str, list[int]]]:
    """The spares that take places, with their ranks; asserts that their workers start."""
    lines = [(line["node"], line["ranks"]) for line in records(effects, "spare_started")]
    starts = [effect for effect in effects if isinstance(effect, e.StartWorkers)]
    assert [(start.node, [worker.rank for worker in start.workers]) for start in starts] == lines
    return lines


def test_a_node_that_there_is_no_place_for_waits() -> None:
    s = spared()
    for count in (1, 2):
        effects = came(s, f"s{count}")
        assert records(effects, "spare_joined")
        assert not any(isinstance(effect, e.StartWorkers | e.RefuseNode) for effect in effects)
        assert not came(s, f"s{count}"), "it has registered"
    (refused,) = came(s, "s3")
    assert isinstance(refused, e.RefuseNode)
    assert refused.why == "the job has its 2 nodes already, and 2 spare ones (--es-spares)"
    assert list(s.state.spares) == ["s1", "s2"]
    assert not started(tick(s))
    assert state_of(s.state.config, changed_rows(None, s.state)).spares == s.state.spares


def test_a_spare_has_the_size_of_a_node() -> None:
    (refused,) = came(spared(), "s1", slots=3)
    assert isinstance(refused, e.RefuseNode)
    assert "this one has 3, the nodes of the job 1" in refused.why


def test_a_spare_takes_the_place_of_a_lost_node_and_its_ranks() -> None:
    s = spared("s1", "s2")
    s(e.NodeLost("n1", "its stream ended"))
    assert started(tick(s)) == [("s1", [1])]
    assert s.state.workers[1].id == w(1, 1)
    assert list(s.state.spares) == ["s2"]
    assert not started(tick(s))


def test_a_spare_takes_the_place_of_one_that_leaves() -> None:
    """Although the job would have too few nodes without it."""
    s = spared("s1")
    assert records(s(e.DrainRequested("n1", "maintenance")), "draining")
    assert started(tick(s)) == [("s1", [2])]


def test_the_domain_with_the_fewest_nodes() -> None:
    s = spared()
    nodes = {name: dataclasses.replace(node, domains=("rack=a",)) for name, node in s.state.nodes.items()}
    s.state = dataclasses.replace(s.state, nodes=nodes)
    came(s, "s1", domains=("rack=a",))
    came(s, "s2", domains=("rack=b",))
    s(e.NodeLost("n0", "its stream ended"))
    assert started(tick(s)) == [("s2", [0])]


def test_no_spare_of_a_host_in_quarantine() -> None:
    s = spared("s1", "s2")
    s.state = dataclasses.replace(s.state, quarantined={"host-s1": Quarantine(0.0, 1e9, "hot")})
    s(e.NodeLost("n1", "its stream ended"))
    assert started(tick(s)) == [("s2", [1])]


def test_a_spare_in_quarantine_does_not_make_a_node_dispensable() -> None:
    s = spared("s1")
    s.state = dataclasses.replace(s.state, quarantined={"host-s1": Quarantine(0.0, 1e9, "hot")})
    effects = s(e.DrainRequested("n1", "maintenance"))
    assert not records(effects, "draining")
    assert any(isinstance(effect, e.EndJob) for effect in effects), "it has no checkpoints"


def test_nothing_is_lost_with_a_spare() -> None:
    s = spared("s1", "s2")
    generation = s.state.generation
    effects = s(e.NodeLost("s1", "its stream ended"))
    assert [type(effect) for effect in effects] == [e.Record, e.FenceNode]
    for ask in (e.DrainRequested("s2", "maintenance"), e.StopRequested("stopped by SIGTERM", Ending.STOPPED, "s2")):
        if "s2" not in s.state.spares:
            s.node("s2")
        effects = s(ask)
        assert [type(effect) for effect in effects] == [e.Record, e.ReleaseNode]
    assert not s.state.spares
    assert s.state.heard.keys() == {"n0", "n1"}
    assert (s.state.phase, s.state.generation) == (Phase.RUNNING, generation)


def test_a_silent_spare_is_lost() -> None:
    s = spared("s1")
    effects: list[e.Effect] = []
    for _ in range(40):
        effects += tick(s)  # only the nodes of the job are heard
    (line,) = records(effects, "node_lost")
    assert (line["node"], line["ranks"]) == ("s1", [])


def test_a_node_is_lost_before_training() -> None:
    """With a spare, it is not one too few."""
    s = Script(workers=1, min_nodes=2, max_nodes=2, spares=1)
    for name in ("n0", "n1", "s1"):
        s.node(name)
    s.elastic(w(0), w(1))
    s(e.NodeLost("n0", "its stream ended"))
    assert s.state.phase is Phase.LAUNCHED
    assert started(tick(s)) == [("s1", [0])]
    s.ready(w(0, 1), w(1))
    assert s.state.phase is Phase.RUNNING
