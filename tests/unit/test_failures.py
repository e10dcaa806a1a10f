"""Which workers torch's report of a failed job names."""

from __future__ import annotations

from everstep.agents.node.failures import Failures


def test_only_who_was_not_replaced_is_a_cause() -> None:
    failures = Failures("default")
    failures.add(2, 0, 1000, -9, "")
    assert "rank      : 2" in failures.report()
    failures.recovered(2)
    assert failures.report() == ""
    failures.add(3, 1, 1001, 1, "")
    assert "rank      : 3" in failures.report()
    failures.clear()
    assert failures.report() == ""
