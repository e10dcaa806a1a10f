"""When a progress counter that stands still means a hang."""

from __future__ import annotations

import pytest
from everstep.elastic.progress import Phase, Progress, create_page, read_page
from everstep.elastic.protocol.liveness import FACTOR, FLOOR_S, GRACE_S, Hangs, Pace, Pulse

STEADY = Pulse(0, 0.0, Pace.STEADY)


def read_regularly(pulse: Pulse, times: int, every_s: float, pace: Pace = Pace.STEADY) -> Pulse:
    for _ in range(times):
        pulse = pulse.read(pulse.counter + 1, pulse.changed_s + every_s, pace)
    return pulse


def test_a_counter_that_moves_is_alive() -> None:
    pulse = read_regularly(STEADY, 100, 0.05)
    assert not pulse.hung(pulse.changed_s + 1.9, FLOOR_S, 0.0)
    assert pulse.hung(pulse.changed_s + 2.1, FLOOR_S, 0.0)


def test_reading_the_same_counter_changes_nothing() -> None:
    pulse = Pulse(3, 1.0, Pace.STEADY, 0.2)
    assert pulse.read(3, 50.0, Pace.STEADY) is pulse


def test_long_pauses_seen_before_are_waited_out() -> None:
    pulse = read_regularly(STEADY, 1, 3.0)
    assert pulse.timeout_s(FLOOR_S, 0.0) == pytest.approx(FACTOR * 3.0)
    assert not pulse.hung(pulse.changed_s + 29.0, FLOOR_S, 0.0)


def test_old_long_pauses_are_slowly_forgotten() -> None:
    slow = read_regularly(STEADY, 1, 3.0)
    later = read_regularly(slow, 3000, 0.05)
    assert later.timeout_s(FLOOR_S, 0.0) < slow.timeout_s(FLOOR_S, 0.0) / 2


def test_in_the_users_own_code_there_is_a_grace_and_nothing_is_learnt() -> None:
    pulse = STEADY.read(1, 0.05, Pace.FREE)
    assert not pulse.hung(0.05 + GRACE_S - 1, FLOOR_S, 0.1)
    assert pulse.hung(0.05 + GRACE_S + 1, FLOOR_S, 0.1)
    back = pulse.read(2, 60.0, Pace.STEADY)
    assert back.timeout_s(FLOOR_S, 0.0) == FLOOR_S, "a minute of evaluating is no pause in a step"
    assert back.first_s == 0.0


def test_a_first_step_is_judged_by_other_first_steps() -> None:
    pulse = read_regularly(Pulse(0, 0.0), 1, 1.0, Pace.FIRST)
    assert pulse.timeout_s(FLOOR_S, 0.0) == GRACE_S, "none is known"
    assert pulse.timeout_s(FLOOR_S, 20.0) == FACTOR * 20.0
    assert pulse.timeout_s(FLOOR_S, 0.01) == FLOOR_S
    assert pulse.timeout_s(FLOOR_S, GRACE_S) == GRACE_S
    compiled = pulse.read(2, 31.0, Pace.FIRST).read(3, 31.1, Pace.STEADY)
    assert (compiled.first_s, compiled.longest_s) == (30.0, 0.0)


@pytest.mark.parametrize("pace", list(Pace))
def test_the_floor_is_the_users(pace: Pace) -> None:
    assert Pulse(1, 0.0, pace).timeout_s(10 * GRACE_S, 1.0) == 10 * GRACE_S


def test_who_hangs_again_and_again_is_given_longer() -> None:
    hangs = Hangs().read(Pace.STEADY)
    floors = []
    for pace in (Pace.STEADY, Pace.FIRST, Pace.FREE, Pace.FIRST):
        hangs = hangs.read(pace)
        floors.append(hangs.floor_s(FLOOR_S))
        hangs = hangs.again()
    assert floors == [FLOOR_S * factor for factor in (1, 2, 4, 8)]
    assert hangs.read(Pace.STEADY).floor_s(FLOOR_S) == FLOOR_S, "it is past its first step"


def test_the_pace_of_a_worker() -> None:
    """As its agent reads it from the page, through two steps, a pause of the user's, and a recovery."""
    progress = Progress(create_page(), 0, 0, [])

    def pace() -> Pace:
        return read_page(progress._memory).pace

    assert pace() is Pace.FREE, "it imports, and builds its model"
    for step, expected in ((5, Pace.FIRST), (6, Pace.STEADY)):  # 5: it goes on from a checkpoint, or has joined
        for phase in (Phase.COMPUTE, Phase.REDUCE, Phase.AGREE, Phase.UPDATE, Phase.COMMIT):
            progress.mark(phase, step)
            assert pace() is expected
        progress.leave()
        assert pace() is Pace.FREE
    progress.mark(Phase.COMPUTE, 7)
    assert pace() is Pace.STEADY
    for phase in (Phase.RECOVER, Phase.RESTORE, Phase.COMPUTE, Phase.COMMIT):  # other layers, perhaps
        progress.mark(phase, 7)
        assert pace() is Pace.FIRST
    progress.mark(Phase.COMPUTE, 8)
    assert pace() is Pace.STEADY
