"""The script changes parameters between two steps: restored, that is harmless; otherwise it is an error by name."""

from __future__ import annotations

from functools import lru_cache

import pytest

from tests.jobs import Result, assert_same_state, run_job

STEPS = 8


@lru_cache(maxsize=2)
def undisturbed(loop: str) -> Result:
    """Nothing is put in."""
    return run_job(nproc=2, steps=STEPS, script="swapping_job.py", loop=loop, how="in_place", left=-1)


@pytest.mark.parametrize("how", ["in_place", "through_data", "other_storage", "state_dict"])
@pytest.mark.parametrize("loop", ["steps", "prepare"])
def test_weights_put_in_for_an_evaluation(loop: str, how: str) -> None:
    """A rank dies while they are in the model: the recovery uses the committed weights."""
    result = run_job(nproc=3, steps=STEPS, script="swapping_job.py", loop=loop, how=how, kill=1)
    assert result.status == 0, result.output
    assert len(result.named("worker_died")) == 1
    assert_same_state(result.state(), undisturbed(loop).state())
    digests = [{e["step"]: e["digest"] for e in r.named("committed")} for r in (result, undisturbed(loop))]
    assert digests[0] == digests[1], "the ledger has what was committed"


def test_the_state_is_asked_for_while_they_are_in() -> None:
    """`full_state_dict` returns the committed version, and another rank dies meanwhile."""
    result = run_job(
        nproc=3, steps=STEPS, script="swapping_job.py", loop="prepare", how="through_data", kill=1, asked=True
    )
    assert result.status == 0, result.output
    assert_same_state(result.state(), undisturbed("prepare").state())


@pytest.mark.parametrize(
    ("loop", "how", "rank", "name", "verb"),
    [
        ("steps", "in_place", 0, "0.weight", "changed"),
        ("prepare", "through_data", 1, "0.weight", "changed"),
        ("steps", "one_row", 0, "2.weight", "changed"),
        ("steps", "one_row", 1, "2.weight", "changed"),
        ("prepare", "replaced", 1, "2.weight", "replaced by another tensor"),
    ],
)
def test_a_change_that_stays(loop: str, how: str, rank: int, name: str, verb: str) -> None:
    """On either rank: the one that owns the parameter, and the one that only reads it."""
    result = run_job(nproc=2, steps=STEPS, script="swapping_job.py", loop=loop, how=how, left=rank)
    assert result.status == 1, result.output
    assert f"parameter {name!r} was {verb} by the script" in result.output
    assert "between steps 3 and 4" in result.output
    assert max(e["step"] for e in result.named("committed")) == 3, "no step is committed that was computed with it"
