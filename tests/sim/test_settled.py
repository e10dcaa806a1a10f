"""What a script changes behind a step is told again, and belongs to that step for those who begin from memory."""

from __future__ import annotations

from everstep.elastic.protocol import events as e

from .script import Script, w


def _trained() -> Script:
    """One worker on each of two nodes, at version 3, which both keepers hold."""
    s = Script(workers=1, min_nodes=2, max_nodes=2)
    for number in range(2):
        s.node(f"n{number}")
    s.elastic(w(0))
    s.ready(w(0), w(1))
    for step in range(3):
        s.committed(w(0), step)
    s.whole = {"n0": (2, 3), "n1": (2, 3)}
    return s


def _all_die(s: Script) -> str:
    """The agreement that the replacements of all ranks begin with."""
    s.died(w(0))
    s.died(w(1))
    s.ready(w(0, 1))
    plans = [effect.plan for effect in s.ready(w(1, 1)) if isinstance(effect, e.CarryOut)]
    assert {(plan.version, plan.fresh) for plan in plans} == {(3, (0, 1))}
    return plans[0].agreement


def _settled(s: Script, step: int, *, rank: int = 0) -> None:
    s(e.WorkerCommitted(w(rank), step, f"a{step} settled", generation=1, settled=True))


def test_what_was_told_again_is_what_counts() -> None:
    s = _trained()
    assert _all_die(_trained()) == "a2"
    _settled(s, 2)
    s.committed(w(1), 2)  # late: without it
    assert (s.state.committed, s.state.agreement) == (2, "a2 settled")
    assert _all_die(s) == "a2 settled"


def test_it_comes_late() -> None:
    s = _trained()
    s.committed(w(1), 3)
    _settled(s, 2)
    assert (s.state.agreement, s.state.agreements[2]) == ("a3", "a2 settled")
    _settled(s, 9)
    assert s.state.committed == 3, "a step that was not committed"


def test_a_report_from_before_a_rollback() -> None:
    s = _trained()
    s.state = s.state.__class__(**{**vars(s.state), "rolled_back": 2})
    _settled(s, 2)
    assert s.state.agreements[2] == "a2"
