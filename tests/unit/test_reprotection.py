"""The forecast of how often a job goes back to storage: at the start by assumption, later by what it has measured."""

from __future__ import annotations

import json

import pytest

from everstep.agents.analysis.reprotection import Reprotection
from everstep.agents.monitoring.observer import Observer
from everstep.agents.monitoring.screen import screen
from everstep.agents.monitoring.story import tell
from everstep.elastic.protocol import events as e
from tests.sim.script import Script


def committed(at_s: float, step: int, protected: int) -> dict[str, float]:
    return {"at_s": at_s, "step": step, "protected": protected}


def test_the_time_until_protection_is_whole_again() -> None:
    measured = Reprotection()
    measured.committed(committed(9.0, 4, 4))
    assert measured.longest_s == 0.0, "no node was lost"
    measured.node_lost({"at_s": 10.0})
    measured.committed(committed(10.1, 5, 5))
    measured.recovered({"at_s": 11.0, "step": 6, "nodes": ["n1"]})
    measured.committed(committed(12.0, 7, 6))
    assert measured.longest_s == 0.0, "version 6 was made with the lost node"
    measured.committed(committed(13.0, 8, 7))
    assert measured.longest_s == 3.0
    measured.committed(committed(14.0, 9, 8))
    measured.node_lost({"at_s": 20.0})
    measured.recovered({"at_s": 20.5, "step": 9, "nodes": ["n2"]})
    measured.committed(committed(21.0, 10, 10))
    assert measured.longest_s == 3.0, "the longest counts"


def test_a_second_loss_begins_again() -> None:
    measured = Reprotection()
    measured.node_lost({"at_s": 10.0})
    measured.recovered({"at_s": 11.0, "step": 6, "nodes": ["n1"]})
    measured.node_lost({"at_s": 12.0})
    measured.committed(committed(12.5, 8, 7))
    assert measured.longest_s == 0.0
    measured.recovered({"at_s": 13.0, "step": 7, "nodes": ["n1", "n2"]})
    measured.committed(committed(16.0, 9, 8))
    assert measured.longest_s == 4.0


def started(**config: float) -> tuple[Script, e.Record]:
    script = Script(workers=1, min_nodes=2, max_nodes=2, **config)
    workers = [e.WorkerId(0, 0), e.WorkerId(1, 0)]
    script.node("n0")
    script.node("n1")
    script.elastic(*workers)
    (record,) = [x for x in script.ready(*workers) if isinstance(x, e.Record) and x.event == "protection"]
    return script, record


def test_it_is_said_at_the_start_and_in_status() -> None:
    script, record = started()
    day = 24 * (2 / 6000) * (1 / 60) / 6000
    assert record.fields["day"] == pytest.approx(day, rel=1e-3)
    story = tell({"event": record.event, "at_s": 0.0, **record.fields})
    assert story is not None
    assert story.text.endswith("; a day leads back to storage with probability 2.2e-08")
    observer = Observer("test", lambda: script.state, lambda: 1.0, lambda: 1.0)
    text = "a node fails once in 6000 h and a loss is protected again after 60 s"
    assert [line for line in screen(observer.view()) if text in line and line.endswith("(assumed)")]
    observer.reprotection.longest_s = 6.0
    view = json.loads(json.dumps(observer.view()))
    assert view["survival"]["day"] == pytest.approx(day / 10, rel=1e-3)
    assert [line for line in screen(view) if "protected again after 6 s" in line and line.endswith("(measured)")]


def test_nodes_that_fail_more_often() -> None:
    _, record = started(node_mtbf_h=60.0)
    assert record.fields["day"] == pytest.approx(24 * (2 / 60) * (1 / 60) / 60, rel=1e-2)
