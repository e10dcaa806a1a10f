"""Which versions' parity a keeper holds on to: any that may be the newest that is whole at all keepers."""

from __future__ import annotations

import random

import pytest

from everstep.resharding.parity_versions import ParityVersions


def test_a_switch_does_not_drop_what_slower_keepers_have() -> None:
    """A keeper completes a version that others have not, and is asked for it again in the next generation.

    If a node is lost then, all go back to the version before: the newest that is whole everywhere, which no rank knows
    to outlive nodes yet.
    """
    fast = ParityVersions()
    fast.enter(117, 0)
    for version in (391, 392, 393):
        fast.want(version, version - 2)
        assert fast.done(117, version, whole=True)
    fast.enter(118, 0)
    assert (fast.complete, fast.before) == ((118, -1), (117, 393))
    fast.want(393, 391)
    assert fast.kept() == {391, 392, 393}


def test_what_all_members_know_ends_what_is_older() -> None:
    versions = ParityVersions()
    versions.enter(1, 0)
    for version in range(5):
        versions.want(version, version - 1)
        versions.done(1, version, whole=True)
    assert versions.kept() == {3, 4}
    versions.want(5, 4)
    assert versions.kept() == {4, 5}


def test_another_line_of_history() -> None:
    versions = ParityVersions()
    versions.enter(3, 0)
    versions.want(7, 6)
    assert versions.done(3, 7, whole=True)
    versions.enter(4, 4)
    assert (versions.complete, versions.before) == ((4, -1), (0, -1))
    versions.want(5, -1)
    assert versions.kept() == {-1, 5}


def test_what_is_over() -> None:
    versions = ParityVersions()
    versions.enter(2, 0)
    versions.want(4, 3)
    assert not versions.is_over(2)
    versions.want(5, 3)
    versions.want(6, 3)
    assert versions.is_over(2)
    assert not versions.done(2, 4, whole=False)
    assert versions.wanted == [5, 6]
    versions.enter(3, 0)
    assert versions.is_over(2)
    assert not versions.done(2, 5, whole=True)
    assert versions.complete == (3, -1)


def whole_everywhere(keepers: list[ParityVersions]) -> int:
    """As the coordinator reckons it: by generation, since the placement of parity changes with it."""
    reported = [dict((keeper.before, keeper.complete)) for keeper in keepers]
    generations = {generation for report in reported for generation in report}
    return max(min(report.get(generation, -1) for report in reported) for generation in generations)


@pytest.mark.parametrize("seed", range(20))
def test_the_newest_version_that_is_whole_everywhere_is_kept_everywhere(seed: int) -> None:
    """Keepers of any speed; a step is agreed on when the version before it is whole; generations end anywhere."""
    rng = random.Random(seed)
    keepers = [ParityVersions() for _ in range(3)]
    version, generation, known, moved = 0, 1, -1, 0
    for keeper in keepers:
        keeper.enter(generation, 0)
        keeper.want(version, known)
    for _ in range(400):
        action, keeper = rng.random(), rng.choice(keepers)
        if action < 0.7 and keeper.wanted:
            kept = {one for one in range(version + 1) if one in keeper.kept()}  # as it begins with a version
            assert whole_everywhere(keepers) in {-1, *kept}
            keeper.done(generation, keeper.wanted[0], whole=True)
        elif action < 0.9 and all(one >= version for other in keepers for one in other.wanted):
            known, version, moved = max(known, whole_everywhere(keepers)), version + 1, moved + 1
            for other in keepers:
                other.want(version, known)
        elif action >= 0.9:
            generation += 1
            for other in keepers:
                other.enter(generation, 0)
                other.want(version, known)
        assert all(whole_everywhere(keepers) in {-1, *other.kept()} for other in keepers)
    assert moved > 20
