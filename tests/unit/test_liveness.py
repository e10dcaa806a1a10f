"""When a progress counter that stands still means a hang: the rules, and the pages and pauses they are applied to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from everstep.elastic.contract.progress import (
    Progress,
    StepPhase,
    create_page,
    read_page,
)
from everstep.elastic.protocol.liveness import (
    FLOOR_S,
    MOST_DOUBLINGS,
    RULES,
    SHARED,
    USER_S,
    Hangs,
    Pace,
    Patience,
    Pulse,
    Sign,
    Verdict,
    judge,
    stalled_together,
    table,
)

DOCS = Path(__file__).parents[2] / "docs"
LOOK_S = 0.5


def stand(pulse: Pulse, sign: Sign, seconds: float, patience: Patience | None = None) -> Verdict:
    """The verdict on a worker that stands still for so long, and shows this sign at every look until it is hung."""
    patience, now = patience or Patience(), pulse.changed_s
    while True:
        now += LOOK_S
        pulse = pulse.seen(sign, now)
        verdict = judge(pulse, now, patience)
        if verdict.hung or now - pulse.changed_s >= seconds:
            return verdict


def struck_s(pace: Pace, sign: Sign, patience: Patience | None = None, pause_s: float = 0.0) -> float:
    """The time after which a worker counts as hung."""
    pauses = tuple(pause_s if at is pace else 0.0 for at in Pace)
    verdict = stand(Pulse(1, 100.0, pace, pauses), sign, 1e6, patience)
    assert verdict.hung
    return verdict.still_s - LOOK_S


def read_regularly(pulse: Pulse, times: int, every_s: float, pace: Pace = Pace.STEADY) -> Pulse:
    """The pulse after a counter has moved this often."""
    now = pulse.changed_s
    for _ in range(times):
        now += every_s
        pulse = pulse.read(pulse.counter + 1, now, pace)
    return pulse


def test_a_counter_that_stands_still_changes_nothing() -> None:
    pulse = Pulse(3, 1.0, Pace.STEADY)
    assert pulse.read(3, 50.0, Pace.STEADY) is pulse


def test_a_dead_lock_in_a_step_is_found_in_seconds_and_an_endless_loop_soon() -> None:
    assert struck_s(Pace.STEADY, Sign.NONE) == FLOOR_S
    assert struck_s(Pace.STEADY, Sign.WORKS) == 5 * FLOOR_S


def test_a_worker_of_long_steps_has_longer() -> None:
    assert struck_s(Pace.STEADY, Sign.NONE, pause_s=3.0) == 30.0
    assert struck_s(Pace.STEADY, Sign.WORKS, pause_s=3.0) == 150.0


@pytest.mark.parametrize("pace", [Pace.FETCH, Pace.USER])
def test_the_users_code_in_a_step_may_stand_still_for_minutes(pace: Pace) -> None:
    """Shared storage that fails over takes 90 s; even a client that only waits for a lock meanwhile."""
    assert struck_s(pace, Sign.NONE) == 120.0
    assert struck_s(pace, Sign.STORAGE) >= USER_S
    assert struck_s(pace, Sign.WORKS) >= USER_S


def test_an_evaluation_may_take_longer_than_ten_minutes() -> None:
    assert struck_s(Pace.FREE, Sign.NONE) == 1800.0
    assert struck_s(Pace.FREE, Sign.WORKS) == 7200.0


def test_a_wait_for_storage_in_a_step_is_no_hang() -> None:
    """Weights or samples that are memory-mapped, not read."""
    assert struck_s(Pace.STEADY, Sign.STORAGE) == USER_S


def test_a_first_step_is_compared_with_others() -> None:
    assert struck_s(Pace.FIRST, Sign.NONE) == USER_S
    assert struck_s(Pace.FIRST, Sign.WORKS) == 3 * USER_S, "a compiler is at work"
    assert struck_s(Pace.FIRST, Sign.NONE, Patience(first_s=5.0)) == 50.0
    assert struck_s(Pace.FIRST, Sign.NONE, Patience(first_s=500.0)) == USER_S


def test_a_first_forward_of_the_users_own_may_compile() -> None:
    assert struck_s(Pace.USER, Sign.WORKS) == 3 * USER_S
    assert struck_s(Pace.USER, Sign.WORKS, pause_s=1.0) == USER_S


def test_a_stopped_worker_is_waited_for_as_one_in_a_step() -> None:
    assert struck_s(Pace.FETCH, Sign.STOPPED) == FLOOR_S
    assert struck_s(Pace.FREE, Sign.STOPPED) == 1800.0, "between steps nobody waits for it before long"


def test_a_usual_pause_needs_no_look_and_a_look_comes_long_before_the_limit() -> None:
    for pace in Pace:
        for pause_s in (0.0, 0.3, 2.0, 60.0, 3600.0):
            pauses = tuple(pause_s if at is pace else 0.0 for at in Pace)
            pulse = Pulse(1, 0.0, pace, pauses)
            usual_s = Patience().usual_s(pulse, 1.2)
            assert usual_s <= 1.2 * pause_s
            assert 4 * usual_s <= Patience().limits(pace, pause_s, Sign.NONE).silent_s
    steady = Pulse(1, 0.0, Pace.STEADY, tuple(2.0 if at is Pace.STEADY else 0.0 for at in Pace))
    assert Patience().usual_s(steady, 1.2) > 2.0


def test_silence_counts_from_the_last_sign_of_life() -> None:
    """It read for 100 s, then it hung."""
    pulse = Pulse(1, 0.0, Pace.FETCH).seen(Sign.STORAGE, 100.0).seen(Sign.NONE, 100.5)
    verdict = judge(pulse, 219.0, Patience())
    assert (verdict.hung, verdict.lived, verdict.silent_s, verdict.limit_s) == (False, True, 119.0, 220.0)
    assert judge(pulse, 221.0, Patience()).hung


def test_what_stands_still_for_all_ranks_is_given_longer() -> None:
    assert struck_s(Pace.FETCH, Sign.NONE, Patience(shared=True)) == SHARED * USER_S
    assert struck_s(Pace.STEADY, Sign.NONE, Patience(shared=True)) == FLOOR_S
    assert stalled_together([Pace.FETCH, Pace.FETCH], others_wait=True)
    assert not stalled_together([Pace.FETCH], others_wait=True), "one rank alone"
    assert not stalled_together([Pace.FETCH, Pace.FETCH], others_wait=False), "another one reads"
    assert not stalled_together([Pace.FETCH, Pace.STEADY], others_wait=True)


@pytest.mark.parametrize("sign", list(Sign))
@pytest.mark.parametrize("pace", list(Pace))
def test_the_least_time_is_the_users(pace: Pace, sign: Sign) -> None:
    assert struck_s(pace, sign, Patience(floor_s=20_000.0)) >= 20_000.0


def test_time_that_nobody_could_look_does_not_count() -> None:
    pulse = Pulse(1, 10.0, Pace.STEADY).seen(Sign.WORKS, 11.0).slept(30.0)
    assert judge(pulse, 41.5, Patience()).silent_s == 0.5
    assert judge(Pulse(1, 10.0, Pace.STEADY).slept(30.0), 41.5, Patience()).silent_s == 1.5


def test_who_hangs_again_and_again_is_given_longer() -> None:
    hangs, limits = Hangs(), []
    for pace in (Pace.STEADY, Pace.FIRST, Pace.FREE, Pace.FETCH, Pace.STEADY):
        hangs = hangs.read(7, pace)
        limits.append(struck_s(Pace.STEADY, Sign.NONE, Patience(doublings=hangs.times)))
        hangs = hangs.again(7)
    assert limits == [FLOOR_S * factor for factor in (1, 2, 4, 8, 16)]
    assert hangs.read(8, Pace.FIRST) == hangs, "its first step there may be the one in question"
    assert hangs.read(8, Pace.STEADY) == Hangs(), "it came further"
    assert struck_s(Pace.STEADY, Sign.NONE, Patience(doublings=1000)) == FLOOR_S * 2**MOST_DOUBLINGS


def test_pauses_count_for_the_pace_they_began_in() -> None:
    """A worker that returns from the user's code was not slow in a step."""
    pulse = read_regularly(Pulse(0, 0.0, Pace.STEADY), 1, 0.5)
    pulse = pulse.read(2, 0.6, Pace.FREE).read(3, 60.0, Pace.STEADY)
    assert 0.4 < pulse.pauses[Pace.STEADY] <= 0.5
    assert pulse.pauses[Pace.FREE] > 59
    later = read_regularly(pulse, 3000, 0.01)
    assert later.pauses[Pace.STEADY] < 0.05, "slowly forgotten"


def test_the_table_in_the_docs_is_that_of_the_code() -> None:
    text = (DOCS / "guarantees.md").read_text()
    assert len(RULES) == len(Pace)
    for place, silent, still in table():
        assert f"| {place} | {silent} | {still} |" in text, f"| {place} | {silent} | {still} |"
    assert re.search(rf"{SHARED:g} times as long", text)


def test_the_pace_of_a_worker() -> None:
    """As the agent reads it from the page, through two steps, the user's code in and between them, and a recovery."""
    progress = Progress(create_page(), 0, 0, [])

    def pace() -> Pace:
        return read_page(progress._memory).pace

    assert pace() is Pace.FREE, "it imports, and builds its model"
    for step, expected in ((5, Pace.FIRST), (6, Pace.STEADY)):  # 5: it resumes from a checkpoint, or has joined
        progress.mark(StepPhase.COMPUTE, step)
        with progress.within(Pace.FETCH):
            assert pace() is Pace.FETCH
            progress.tick()
            assert pace() is Pace.FETCH, "a heartbeat changes nothing but the time"
        for phase in (StepPhase.COMPUTE, StepPhase.REDUCE, StepPhase.AGREE, StepPhase.UPDATE, StepPhase.COMMIT):
            progress.mark(phase, step)
            assert pace() is expected
        progress.leave()
        assert pace() is Pace.FREE
    progress.mark(StepPhase.COMPUTE, 7)
    assert pace() is Pace.STEADY
    progress.enter(Pace.USER)
    assert pace() is Pace.USER
    for phase in (StepPhase.RECOVER, StepPhase.RESTORE, StepPhase.COMPUTE, StepPhase.COMMIT):  # other layers, perhaps
        progress.mark(phase, 7)
        assert pace() is Pace.FIRST
    progress.mark(StepPhase.COMPUTE, 8)
    assert pace() is Pace.STEADY
    progress.leave()
    with progress.called():
        progress.mark(StepPhase.RECOVER, 8)
    assert pace() is Pace.FREE, "the user's code continues"


def test_what_a_worker_waits_for_is_on_its_page() -> None:
    progress = Progress(create_page(), 0, 0, [])
    with progress.waiting("a köeper"):
        assert read_page(progress._memory).waits is None, "nothing is written before it has taken long"
        progress.tick()
        waits = read_page(progress._memory).waits
        assert waits is not None
        assert (waits.what, waits.ranks) == ("a köeper", ())
    assert read_page(progress._memory).waits is None
    with progress.waiting("a keeper"):
        progress.tick()
        progress.mark(StepPhase.COMPUTE, 3)
        assert read_page(progress._memory).waits is None, "it works"
