"""Which process waits for which, and when the wait is reported."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from everstep.agents.monitoring.holdups import OLD_S, Holdups
from everstep.comms.control import telemetry_pb2 as pb
from everstep.elastic.protocol.causes import Cause
from everstep.elastic.protocol.coordinator import initial_state, step
from everstep.elastic.protocol.events import Record, WaitNoticed, WorkerId
from everstep.elastic.protocol.state import (
    Config,
    Node,
    Phase,
    RecoveryStory,
    State,
    Status,
    Worker,
)
from everstep.elastic.protocol.waiting import FIRST_S, Spoken


def job(ranks: int = 4, **fields: Any) -> State:
    workers = {rank: Worker(WorkerId(rank, 0), "a", Status.MEMBER) for rank in range(ranks)}
    state = initial_state(Config(min_nodes=2, max_nodes=4), 0.0)
    return replace(state, phase=Phase.RUNNING, elastic=True, workers=workers, **fields)


def does(
    rank: int, *ranks: int, waits_s: float = 12.0, place: str = "reduce of step 17", **fields: Any
) -> pb.RankState:
    waits = {"waits_ranks": ranks, "waits_s": waits_s} if ranks else {}
    return pb.RankState(rank=rank, step=17, place=place, **waits, **fields)


def said(*states: pb.RankState, job: State | None = None, now: float = 100.0) -> list[str]:
    holdups = Holdups()
    holdups.take(states, now)
    return [holdup.text for holdup in holdups.find(job or globals()["job"](), now)]


def test_the_rank_that_all_others_wait_for_is_named_with_where_it_is() -> None:
    slow = does(1, place="the user's code between steps")
    assert said(does(0, 1), does(2, 1), does(3, 1), slow) == [
        "ranks 0,2-3 wait for rank 1 in reduce of step 17; rank 1 is in the user's code between steps"
    ]


def test_a_chain_of_waits_leads_to_its_end() -> None:
    stands = does(3, place="the dataset in step 17", still_s=40.0, limit_s=600.0, sign="storage")
    assert said(does(0, 1), does(1, 2), does(2, 3), stands) == [
        "ranks 0-2 wait for rank 3 in reduce of step 17; rank 3: no progress for 40 s in the dataset in step 17 (it "
        "waits for storage); considered hung after 600 s"
    ]


def test_ranks_that_wait_for_one_another_are_said_so() -> None:
    assert said(does(0, 1), does(1, 0)) == ["ranks 0-1 wait for one another in reduce of step 17"]


def test_what_is_no_rank_is_named_in_words() -> None:
    keeper = does(1, waits_s=9.0, place="agree of step 17", waits_for="its keeper")
    keeper.waits_s = 9.0
    found = said(does(0, 1), keeper)
    assert "rank 1 waits for its keeper" in found
    assert "rank 0 waits for rank 1 in reduce of step 17; rank 1 waits for its keeper" in found


def test_a_rank_that_is_gone_starting_or_silent_is_said_to_be() -> None:
    state = job()
    starting = replace(state.workers[1], id=WorkerId(1, 1), status=Status.STARTING)
    assert said(does(0, 1), does(1), job=replace(state, workers={**state.workers, 1: starting}))[0].endswith(
        "rank 1 is starting on node a"
    )
    assert said(does(0, 9))[0].endswith("rank 9 is gone")
    assert said(does(0, 1))[0].endswith("what rank 1 (node a) does is not known")


def test_what_was_told_long_ago_or_of_another_worker_is_forgotten() -> None:
    holdups = Holdups()
    holdups.take([does(0, 1)], 100.0)
    assert holdups.find(job(), 100.0 + OLD_S + 1) == []
    assert said(does(0, 1, incarnation=3)) == []


def test_it_is_said_after_some_seconds_and_then_ever_more_seldom() -> None:
    holdups, times = Holdups(), []
    for second in range(1, 200):
        holdups.take([does(0, 1, waits_s=float(second)), does(1)], float(second))
        if holdups.poll(job(), float(second), 0.5) is not None:
            times.append(second)
    assert times == [10, 20, 40, 80, 160]


def test_in_long_steps_waits_are_long() -> None:
    for typical_s, is_said in ((30.0, False), (3.0, True)):
        holdups = Holdups()
        holdups.take([does(0, 1, waits_s=50.0), does(1)], 0.0)
        assert (holdups.poll(job(), 0.0, typical_s) is not None) is is_said


def test_a_wait_that_ends_and_begins_again_is_another_one() -> None:
    spoken = Spoken()
    assert [spoken.due(waited) for waited in (9.0, FIRST_S, 11.0, 20.0)] == [False, True, False, True]
    assert not spoken.due(5.0, "another")
    assert spoken.due(FIRST_S, "another")


def waits_of_the_job(state: State) -> list[str]:
    holdups = Holdups()
    holdups.find(state, 0.0)
    notice = holdups.poll(state, 12.0, 0.0)
    return [notice.text] if notice else []


def test_what_the_coordinator_itself_waits_for() -> None:
    node = Node("a", "10.0.0.1", 4, "10.0.0.1:1")
    forming = replace(job(0), phase=Phase.FORMING, nodes={"a": node})
    assert waits_of_the_job(forming)[0].startswith(
        "the job waits for nodes: 1 of at least 2 (--nnodes) have joined (a)"
    )
    state = job()
    starting = {**state.workers, 2: replace(state.workers[2], status=Status.STARTING)}
    launched = replace(state, phase=Phase.LAUNCHED, workers=starting)
    assert waits_of_the_job(launched)[0].startswith("training waits for rank 2 (node a) to call run.prepare(...)")
    assert waits_of_the_job(replace(launched, elastic=False)) == [], "an ordinary script never does"
    assert waits_of_the_job(replace(state, workers=starting))[0].startswith("rank 2 (node a) is starting; training")
    recovery = RecoveryStory(
        generation=2,
        cause=Cause.OTHER,
        why="",
        dead=(),
        step=1,
        phase="",
        lost_micro_batches=0,
        killed_s=0,
        detected_s=0,
        started_s=0,
    )
    awaited = frozenset({WorkerId(1, 0), WorkerId(3, 0)})
    recovering = replace(state, phase=Phase.RECOVERING, recovery=replace(recovery, awaited=awaited))
    assert waits_of_the_job(recovering)[0].startswith(
        "the recovery waits for ranks 1,3 to stop what they do and report"
    )
    assert waits_of_the_job(state) == []


def test_status_says_who_stands_still_before_a_limit_strikes() -> None:
    holdups = Holdups()
    place = "the user's code between steps"
    holdups.take([does(3, place=place, still_s=40.0, limit_s=1800.0, sign="none")], 0.0)
    assert holdups.shown(job(), 0.0) == [
        f"rank 3: no progress for 40 s in {place} (no sign of life); considered hung after 1800 s"
    ]


def test_a_notice_is_a_warning_in_the_log_and_changes_nothing() -> None:
    state = job()
    after, (record,) = step(state, WaitNoticed("rank 0 waits for rank 1", (0,), 17), 1.0)
    assert after == state
    assert record == Record(
        "warning", {"notice": "waiting", "text": "rank 0 waits for rank 1", "ranks": [0], "step": 17}
    )
