"""Hosts that fail or lag repeatedly are kept out, by policy; the job never lacks nodes because of it."""

from __future__ import annotations

import dataclasses
import functools

import pytest

from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.codec import changed_rows, state_of
from everstep.elastic.protocol.state import Config, Phase
from everstep.elastic.protocol.troubles import HOSTS_KEPT, TROUBLES_KEPT
from everstep.elastic.sim import run

from .golden_draining import trained
from .script import Script, w


def policy(s: Script, after: int = 2, within_s: float = 100.0, seconds: float = 50.0) -> Script:
    config = dataclasses.replace(
        s.state.config, max_nodes=9, quarantine_after=after, quarantine_within_s=within_s, quarantine_s=seconds
    )
    s.state = dataclasses.replace(s.state, config=config)
    return s


def slow(node: str, rank: int, again: bool = False) -> e.StragglerFound:
    evidence = "0.3 s a micro-batch, the others 0.1 s"
    return e.StragglerFound(node, rank, "compute", 3.0, evidence, fields={"steps": 12}, again=again)


def records(effects: list[e.Effect], event: str) -> list[dict]:
    return [dict(effect.fields) for effect in effects if isinstance(effect, e.Record) and effect.event == event]


def tick(s: Script, after_s: float = 0.1) -> list[e.Effect]:
    """Time passes, and all nodes are heard."""
    effects: list[e.Effect] = []
    steps = max(1, round(after_s / 0.5))
    for _ in range(steps):
        s(e.HeartbeatsReceived(tuple(s.state.nodes)), after_s / steps)
        effects += s(e.Ticked(), 0.0)
    return effects


def test_a_straggler_is_a_line_and_no_more_without_a_policy() -> None:
    s = trained(3, min_nodes=1)
    for _ in range(40):
        (line,) = records(s(slow("n1", 1)), "straggler_found")
        assert (line["rank"], line["node"], line["what"], line["factor"], line["steps"]) == (
            1,
            "n1",
            "compute",
            3.0,
            12,
        )
    assert not s.state.quarantined
    assert len(s.state.troubles["host-n1"]) == TROUBLES_KEPT
    assert records(s(e.StragglerGone("n1", 1, "compute", "level again")), "straggler_gone")
    assert not s(slow("n9", 1)), "a node that is not there"


def test_who_lags_repeatedly_hands_over_and_is_refused_until_released() -> None:
    s = policy(trained(3, min_nodes=2))
    assert not records(s(slow("n1", 1)), "node_quarantined")
    assert not records(tick(s), "draining")
    effects = s(slow("n1", 1, again=True))
    assert records(effects, "straggler_lasts")
    (line,) = records(effects, "node_quarantined")
    assert (line["host"], line["nodes"], line["troubles"]) == ("host-n1", ["n1"], 2)
    assert "0.3 s a micro-batch" in line["why"]
    (line,) = records(tick(s), "draining")
    assert line["why"].startswith("quarantine: 2 troubles in 100 s")
    s(e.WorkerSwitched(w(0), s.state.generation))
    s(e.WorkerSwitched(w(1), s.state.generation))
    s.protected = 4
    for step in (3, 4):
        s.committed(w(0), step)
    assert "n1" not in s.state.nodes
    effects = s(e.NodeJoined("n1-2", "host-n1", 1, "n1-2:1"))
    (refused,) = [effect for effect in effects if isinstance(effect, e.RefuseNode)]
    assert "host host-n1 is in quarantine for" in refused.why
    assert records(effects, "node_refused")
    s.node("n3")
    assert "n3" in s.state.nodes, "other hosts may come"
    assert records(tick(s, 50.0), "node_released") == [{"host": "host-n1"}]
    assert not s.state.troubles.get("host-n1")
    s(e.NodeJoined("n1-3", "host-n1", 1, "n1-3:1"))
    assert "n1-3" in s.state.nodes


def test_an_operator_keeps_a_host_out_and_lets_it_in_again() -> None:
    """Without a policy, and without any trouble of the host."""
    s = trained(3, min_nodes=1)
    (line,) = records(s(e.QuarantineOrdered("host-n1", 60.0, "a hot card")), "node_quarantined")
    assert (line["nodes"], line["seconds"], line["why"]) == (["n1"], 60.0, "a hot card")
    assert records(tick(s), "draining")[0]["node"] == "n1"
    s(e.ReleaseOrdered("host-n2"))
    assert list(s.state.quarantined) == ["host-n1"], "the other host is in none"
    s(e.ReleaseOrdered("host-n1"))
    assert records(tick(s), "node_released") == [{"host": "host-n1"}]
    assert not s.state.quarantined


def test_failures_count_by_host_whatever_its_nodes_are_called() -> None:
    s = policy(trained(4, min_nodes=1), after=3)
    s.died(w(1))
    s(e.NodeLost("n1", "its stream ended"))
    s(e.NodeJoined("n1-2", "host-n1", 1, "n1-2:1"))
    assert not s.state.quarantined
    effects = s(e.NodeLost("n1-2", "no heartbeat for 1.6 s"))
    (line,) = records(effects, "node_quarantined")
    assert "killed by SIGKILL" in line["why"]
    assert "no heartbeat for 1.6 s" in line["why"]
    assert isinstance(s(e.NodeJoined("n1-3", "host-n1", 1, "n1-3:1"))[-1], e.RefuseNode)


def test_troubles_of_long_ago_do_not_count() -> None:
    s = policy(trained(3, min_nodes=1), after=2, within_s=10.0)
    s(slow("n1", 1))
    tick(s, 11.0)
    assert not records(s(slow("n1", 1)), "node_quarantined")


@pytest.mark.parametrize("min_nodes", [1, 2, 3])
def test_the_job_keeps_what_it_needs(min_nodes: int) -> None:
    """All three hosts are sick: as many of them stay as the job needs."""
    s = policy(trained(3, min_nodes=min_nodes), after=1)
    for number in range(3):
        s(slow(f"n{number}", number))
    assert len(s.state.quarantined) == 3
    for _ in range(5):
        tick(s)
        if s.state.join is not None:
            s(e.WorkerSwitched(w(min(s.state.join.layout.ranks)), s.state.generation))
    assert len(s.state.nodes.keys() - s.state.leaving.keys()) == min_nodes
    assert s.state.phase is Phase.RUNNING


def test_a_host_in_quarantine_is_taken_in_where_the_job_needs_it_and_drained_when_it_does_not() -> None:
    s = policy(trained(2, min_nodes=2), after=1)
    s(e.NodeLost("n1", "its stream ended"))
    assert "host-n1" in s.state.quarantined
    s(e.NodeJoined("n1-2", "host-n1", 1, "n1-2:1"))
    assert "n1-2" in s.state.nodes
    s.reported(w(0))
    s(e.WorkerReady(w(1, 1), {"at": "1.1"}, s.job))
    s.committed(w(0), 3)
    assert not records(tick(s), "draining")


def test_who_leaves_for_its_quarantine_stays_when_the_others_are_lost() -> None:
    s = policy(trained(2, min_nodes=1), after=1)
    s(slow("n1", 1))
    assert records(tick(s), "draining")
    s(e.NodeLost("n0", "its stream ended"))
    assert s.state.leaving
    effects = tick(s)
    assert not s.state.leaving
    assert not [effect for effect in effects if isinstance(effect, e.EndJob)]


def test_a_node_that_is_not_fit_is_refused_and_counted() -> None:
    s = policy(trained(3, min_nodes=1), after=2)
    for _ in range(2):
        effects = s(e.NodeUnhealthy("n7", "host-n7", "wrong products", {"product_wrong": 2.0}))
        (line,) = records(effects, "node_unhealthy")
        assert line["health"] == {"product_wrong": 2.0}
        assert e.RefuseNode("n7", "wrong products") in effects
    assert "host-n7" in s.state.quarantined


def test_what_is_remembered_is_bounded_and_stored() -> None:
    s = policy(trained(3, min_nodes=1), after=3)
    for number in range(HOSTS_KEPT + 5):
        s(e.NodeUnhealthy(f"x{number}", f"x{number}", "x" * 1000))
    assert len(s.state.troubles) == HOSTS_KEPT
    assert all(len(known.detail) <= 200 for troubles in s.state.troubles.values() for known in troubles)
    for _ in range(3):
        s(slow("n1", 1))
    again = state_of(s.state.config, changed_rows(None, s.state))
    assert again.troubles == s.state.troubles
    assert again.quarantined == s.state.quarantined


def test_figures_of_a_health_check_are_kept_with_the_node() -> None:
    s = Script(workers=1, min_nodes=2, max_nodes=2)
    effects = s(e.NodeJoined("n0", "h", 1, "n0:1", health={"copy_bytes_per_s": 1e9}))
    assert records(effects, "node_joined")[0]["health"] == {"copy_bytes_per_s": 1e9}
    assert s.state.nodes["n0"].health == {"copy_bytes_per_s": 1e9}


@pytest.mark.parametrize("name", ["3 nodes, leaving", "5 nodes, leaving"])
def test_seeds_with_a_policy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random deaths and losses, with hosts that are kept out for each of them: the simulator's promises hold."""
    strict = functools.partial(Config, quarantine_after=1, quarantine_within_s=10.0, quarantine_s=0.7)
    monkeypatch.setattr(run, "Config", strict)
    logs = [run.simulate(seed, run.SHAPES[name]).log for seed in range(10)]
    assert sum("node_quarantined" in line for log in logs for line in log) > 10
