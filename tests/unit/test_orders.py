"""Which orders of an operator a coordinator takes, and what it answers to the others."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from everstep.agents.coordinator.orders import MOST, OperatorOrders, take_text
from everstep.agents.tools.orders import order
from everstep.comms.control import everstep_pb2 as pb
from everstep.elastic.protocol import coordinator
from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.state import Config, Leaving, Node, Phase, Quarantine, State
from tests.sim.script import Script


def job(least: int = 1) -> State:
    """Three nodes on two hosts, one of which is in quarantine."""
    nodes = {name: Node(name, host, 1, "") for name, host in (("n0", "a"), ("n1", "b"), ("n2", "b"))}
    quarantined = {"c": Quarantine(0.0, 100.0, "it burns")}
    state = coordinator.initial_state(Config(min_nodes=least, max_nodes=3), 0.0)
    return replace(state, phase=Phase.RUNNING, nodes=nodes, quarantined=quarantined, elastic=True)


def drain(node: str) -> pb.OrderRequest:
    return pb.OrderRequest(drain=pb.Drain(node=node, why="a fan"))


def test_orders_become_events() -> None:
    orders = OperatorOrders()
    assert orders.poll() is None
    taken = [
        drain("n1"),
        drain("a"),
        pb.OrderRequest(quarantine=pb.Quarantine(host="b", seconds=60.0)),
        pb.OrderRequest(release=pb.Release(host="c")),
    ]
    answers = [orders.take(request, job()) for request in taken]
    assert [answer.refused for answer in answers] == [""] * 4
    assert "n1 hands over" in answers[0].text
    assert "n1 and n2 hand over" in answers[2].text
    assert [orders.poll() for _ in range(5)] == [
        e.DrainRequested("n1", "a fan"),
        e.DrainRequested("n0", "a fan"),
        e.QuarantineOrdered("b", 60.0, "by an operator's order"),
        e.ReleaseOrdered("c"),
        None,
    ]


@pytest.mark.parametrize(
    ("request_", "state", "why"),
    [
        (drain("x"), job(), r"'x' is no node of the job; nodes: n0 \(a\), n1 \(b\), n2 \(b\)"),
        (drain("b"), job(), "'b' names several nodes"),
        (drain("n0"), job(least=3), "cannot spare node n0: it needs 3"),
        (drain("n0"), replace(job(), leaving={"n0": Leaving("SIGTERM")}), "node n0 leaves already: SIGTERM"),
        (drain("n0"), replace(job(), phase=Phase.DONE), "the job is about to end"),
        (pb.OrderRequest(quarantine=pb.Quarantine(host="b", seconds=-1.0)), job(), "a time of more than 0 s"),
        (pb.OrderRequest(quarantine=pb.Quarantine(host="b", seconds=float("nan"))), job(), "a time of more than 0 s"),
        (pb.OrderRequest(quarantine=pb.Quarantine(host="b", seconds=float("inf"))), job(), "a time of more than 0 s"),
        (pb.OrderRequest(quarantine=pb.Quarantine(host="", seconds=1.0)), job(), "name a host"),
        (pb.OrderRequest(release=pb.Release(host="a")), job(), "'a' is not in quarantine; hosts that are: c"),
        (pb.OrderRequest(relayout=pb.Relayout(stages=-1)), job(), "a job has at least one stage"),
        (pb.OrderRequest(relayout=pb.Relayout(stages=2)), job(), "training has not begun: try again when that is over"),
        (pb.OrderRequest(), job(), "no order that this version knows"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_with_the_reason(request_: pb.OrderRequest, state: State, why: str) -> None:
    orders = OperatorOrders()
    answer = orders.take(request_, state)
    assert answer.text == ""
    assert re.search(why, answer.refused), answer.refused
    assert orders.poll() is None


def test_orders_that_nobody_takes_do_not_pile_up() -> None:
    orders = OperatorOrders()
    quarantine = pb.OrderRequest(quarantine=pb.Quarantine(host="b", seconds=60.0))
    for _ in range(MOST):
        assert orders.take(quarantine, job()).text
    assert "too many" in orders.take(quarantine, job()).refused


def test_orders_that_wait_count_for_those_after_them() -> None:
    """Together they would leave the job with too few nodes, which would end it."""
    orders = OperatorOrders()
    assert orders.take(drain("n0"), job(least=2)).text
    assert "leaves already: an operator asked before" in orders.take(drain("n0"), job(least=2)).refused
    assert "cannot spare node n1: it needs 2" in orders.take(drain("n1"), job(least=2)).refused


def test_a_relayout_waits_for_no_other_order() -> None:
    """What an order before it changes is not known yet."""
    script = Script(workers=4, stages=2)
    script.job = replace(script.job, steps=1000)
    script.train()
    orders, relayout = OperatorOrders(), pb.OrderRequest(relayout=pb.Relayout(stages=4))
    assert (
        orders.take(relayout, script.state).text == "the job goes to 4 stage(s) at a step boundary; training continues"
    )
    assert "another order waits: try again" in orders.take(relayout, script.state).refused
    assert orders.poll() == e.RelayoutOrdered(4)
    script(e.RelayoutOrdered(4))
    assert "a relayout to 4 stage(s) is under way" in orders.take(relayout, script.state).refused
    waiting = OperatorOrders()
    assert waiting.take(drain("n1"), job()).text
    assert "another order waits: try again" in waiting.take(relayout, job()).refused


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        (b'{"drain": {"node": "n1", "why": "a hot card"}}', 200, "hands over"),
        (b'{"drain": {"node": "n9"}}', 409, "is no node of the job"),
        (b'{"drain": {"nodes": "n1"}}', 400, "no order: "),
        (b"drain n1", 400, "no order: "),
        (b"\xff", 400, "no order: "),
        (b"{}", 409, "no order that this version knows"),
    ],
)
def test_orders_of_the_page_are_json(text: bytes, status: int, said: str) -> None:
    orders, state = OperatorOrders(), job()
    found = take_text(text, lambda request: orders.take(request, state))
    assert (found[0], said in found[1]) == (status, True), found
    event = orders.poll()
    assert event == (e.DrainRequested("n1", "a hot card") if status == 200 else None)


def test_the_planner_may_choose_the_number_of_stages() -> None:
    script = Script(workers=4, stages=2)
    script.job = replace(script.job, steps=1000)
    script.train()
    orders = OperatorOrders()
    answer = orders.take(pb.OrderRequest(relayout=pb.Relayout(stages=0)), script.state)
    assert answer.text == "the job has as many stages as its planner finds best from now on"
    script(orders.poll())
    assert script.state.plans_stages


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5", str(1 << 31)])
def test_a_number_of_stages_that_is_none_is_refused(text: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        order("relayout", ["127.0.0.1:1", f"--stages={text}"])
    assert ended.value.code == 2
    assert f"--stages {text}: give a whole number of at least 1, or auto" in capsys.readouterr().err
