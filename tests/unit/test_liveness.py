"""When a progress counter that stands still means a hang."""

from __future__ import annotations

import pytest
from everstep.elastic.protocol.liveness import FACTOR, FLOOR_S, GRACE_S, Pulse


def read_regularly(pulse: Pulse, times: int, every_s: float) -> Pulse:
    for _ in range(times):
        pulse = pulse.read(pulse.counter + 1, pulse.changed_s + every_s, training=True)
    return pulse


def test_a_counter_that_moves_is_alive() -> None:
    pulse = read_regularly(Pulse(0, 0.0), 100, 0.05)
    assert not pulse.hung(pulse.changed_s + 1.9, FLOOR_S, training=True)
    assert pulse.hung(pulse.changed_s + 2.1, FLOOR_S, training=True)


def test_reading_the_same_counter_changes_nothing() -> None:
    pulse = Pulse(3, 1.0, 0.2)
    assert pulse.read(3, 50.0, training=True) is pulse


def test_long_pauses_seen_before_are_waited_out() -> None:
    pulse = read_regularly(Pulse(0, 0.0), 1, 3.0)
    assert pulse.timeout_s(FLOOR_S, training=True) == pytest.approx(FACTOR * 3.0)
    assert not pulse.hung(pulse.changed_s + 29.0, FLOOR_S, training=True)


def test_old_long_pauses_are_slowly_forgotten() -> None:
    slow = read_regularly(Pulse(0, 0.0), 1, 3.0)
    later = read_regularly(slow, 3000, 0.05)
    assert later.timeout_s(FLOOR_S, training=True) < slow.timeout_s(FLOOR_S, training=True) / 2


def test_before_training_there_is_a_grace() -> None:
    pulse = Pulse(0, 0.0).read(1, 40.0, training=False)
    assert pulse.longest_s == 0.0, "a pause before training says nothing about a step"
    assert not pulse.hung(40.0 + GRACE_S - 1, FLOOR_S, training=False)
    assert pulse.hung(40.0 + GRACE_S + 1, FLOOR_S, training=False)


@pytest.mark.parametrize("training", [True, False])
def test_the_floor_is_the_users(training: bool) -> None:
    pulse = Pulse(1, 0.0)
    assert pulse.timeout_s(10 * GRACE_S, training=training) == 10 * GRACE_S
