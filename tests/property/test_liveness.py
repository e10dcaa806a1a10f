"""Properties of the limits for any worker: more signs of life never mean less time, and every wait ends."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from everstep.elastic.protocol.liveness import (
    MOST_DOUBLINGS,
    SHARED,
    Pace,
    Patience,
    Pulse,
    Sign,
    judge,
)

SECONDS = st.floats(0.05, 5000.0)
PATIENCE = st.builds(
    Patience,
    floor_s=st.floats(0.1, 100.0),
    user_s=st.floats(0.5, 5000.0),
    first_s=st.one_of(st.just(0.0), SECONDS),
    shared=st.booleans(),
    doublings=st.integers(0, 20),
)
PACES, SIGNS = st.sampled_from(Pace), st.sampled_from(Sign)
PAUSES = st.one_of(st.just(0.0), SECONDS)


@given(PATIENCE, PACES, PAUSES, SIGNS)
def test_limits_are_at_least_the_users_and_in_order(patience: Patience, pace: Pace, pause_s: float, sign: Sign) -> None:
    limits = patience.limits(pace, pause_s, sign)
    assert patience.floor_s <= limits.silent_s <= limits.still_s
    longest = 2**MOST_DOUBLINGS * SHARED * max(50 * patience.floor_s, 12 * patience.user_s, 50 * pause_s)
    longest = max(longest, 2**MOST_DOUBLINGS * 50 * patience.first_s)
    assert limits.still_s <= longest, "everything ends"


@given(PATIENCE, PACES, PAUSES, SIGNS)
def test_longer_pauses_patience_and_hangs_never_shorten_a_limit(
    patience: Patience, pace: Pace, pause_s: float, sign: Sign
) -> None:
    limits = patience.limits(pace, pause_s, sign)
    for longer in (
        Patience(2 * patience.floor_s, patience.user_s, patience.first_s, patience.shared, patience.doublings),
        Patience(patience.floor_s, 2 * patience.user_s, patience.first_s, patience.shared, patience.doublings),
        Patience(patience.floor_s, patience.user_s, patience.first_s, True, patience.doublings),
        Patience(patience.floor_s, patience.user_s, patience.first_s, patience.shared, patience.doublings + 1),
    ):
        assert longer.limits(pace, pause_s, sign) >= limits


@given(PATIENCE, PACES, PAUSES, st.lists(st.tuples(st.floats(0.01, 50.0), SIGNS), max_size=30))
def test_a_verdict_says_when_it_will_strike(
    patience: Patience, pace: Pace, pause_s: float, looks: list[tuple[float, Sign]]
) -> None:
    """Whatever was seen before: if nothing is seen from now on, it is hung at the stated limit, not before."""
    pulse, now = Pulse(1, 100.0, pace, tuple(pause_s if at is pace else 0.0 for at in Pace)), 100.0
    lived = False
    for after_s, sign in looks:
        now += after_s
        pulse = pulse.seen(sign, now)
        verdict = judge(pulse, now, patience)
        assert 0 <= verdict.silent_s <= verdict.still_s
        lived = lived or sign in (Sign.WORKS, Sign.STORAGE)
        assert verdict.lived == lived
        if verdict.hung:
            return
        if sign in (Sign.WORKS, Sign.STORAGE):
            continue
        assert not judge(pulse, 100.0 + 0.999 * verdict.limit_s, patience).hung or verdict.limit_s < verdict.still_s
        assert judge(pulse, 100.0 + 1.001 * verdict.limit_s + 0.001, patience).hung


@given(PATIENCE, PACES, PAUSES, st.floats(0.01, 5000.0))
def test_a_sign_of_life_never_makes_a_worker_hung(
    patience: Patience, pace: Pace, pause_s: float, still_s: float
) -> None:
    pulse = Pulse(1, 100.0, pace, tuple(pause_s if at is pace else 0.0 for at in Pace))
    now = 100.0 + still_s
    silent = judge(pulse.seen(Sign.NONE, now), now, patience)
    for sign in (Sign.WORKS, Sign.STORAGE):
        assert silent.hung or not judge(pulse.seen(sign, now), now, patience).hung
