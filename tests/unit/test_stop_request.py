"""When a script's request to stop counts."""

from __future__ import annotations

from everstep.elastic.contract.membership import Solo
from everstep.elastic.guard.stop_request import WHY_CHARACTERS, StopRequest


def test_a_step_that_is_computed_again_does_not_end_training_earlier() -> None:
    request = StopRequest(Solo())
    assert request.at(5) == ""
    request.ask(5, "first")
    request.ask(7, "second")
    assert [request.at(step) for step in (3, 4, 5, 6, 7)] == ["", "", "first", "first", "first"]


def test_the_reason_stays_within_the_limit_of_an_agreement() -> None:
    request = StopRequest(Solo())
    request.ask(0, "x" * 5000)
    assert request.at(0) == "x" * WHY_CHARACTERS
