"""What the user's code has left behind, by version, in a loop that goes back."""

from __future__ import annotations

import json
from typing import Any

from everstep.elastic.engine.large_values import LargeValues
from everstep.elastic.engine.registered import Registered
from everstep.elastic.engine.user_turns import UserTurns


class Kept:
    """A registered object, and the settings as well: one value."""

    def __init__(self, *, between_steps: bool = False) -> None:
        self.value = 0
        self.between_steps = between_steps

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]

    def terms(self) -> dict[str, Any]:
        return {}

    def hyper_parameters(self) -> int:
        return self.value

    def set(self, after: dict[str, Any]) -> None:
        self.value = after["groups"]


class Loop:
    """A loop that sets a rate, counts, and shares a value between steps."""

    def __init__(self) -> None:
        self.rate, self.count, self.shared, self.driven = Kept(), Kept(), Kept(between_steps=True), Kept()
        self.registered = Registered(
            {"count": self.count, "shared": self.shared, "driven": self.driven}, LargeValues(None)
        )
        self.registered.driven.add("driven")
        settings: Any = self.rate
        self.turns = UserTurns(self.registered, settings, settings)

    def set(self, value: int) -> None:
        for item in (self.rate, self.count, self.shared, self.driven):
            item.value = value

    @property
    def values(self) -> list[int]:
        return [item.value for item in (self.rate, self.count, self.shared, self.driven)]

    def run(self, versions: int) -> None:
        """The user's code in front of the steps of versions 0, 1, ..., each of which has two turns that change it."""
        for version in range(versions):
            self.turns.enter(version)
            self.set(10 * version)
            for turn in (1, 2):
                self.begin(version)
                assert self.values == [10 * version + turn - 1] * 4, "what a turn has left stays in its step"
                self.set(10 * version + turn)

    def begin(self, version: int) -> None:
        """A turn begins."""
        self.turns.record()
        self.turns.pass_by(version)


def test_repeated_steps_begin_with_what_they_began_with() -> None:
    loop = Loop()
    loop.run(5)
    loop.turns.go_back(2, {})
    assert loop.values == [42] * 4, "the rest of the user's turn still has it"
    for version in (2, 3, 4):
        loop.begin(version)
        assert loop.values[:3] == [10 * version] * 3
        loop.set(99)
        loop.begin(version)
        assert loop.values[:3] == [99] * 3
    loop.turns.enter(5)
    loop.begin(5)
    assert loop.values[:3] == [99] * 3, "a new step begins with what the last one has left"


def test_functions_that_run_when_the_job_goes_back_finish_first() -> None:
    loop = Loop()
    loop.run(5)
    loop.turns.enter(5)
    loop.turns.go_back(3, {})
    loop.set(50)
    for version in (3, 4, 5):
        loop.begin(version)
        assert loop.values[:3] == [10 * version] * 3


def test_steps_are_repeated_in_the_midst_of_the_users_code() -> None:
    loop = Loop()
    loop.run(5)
    loop.turns.enter(5)
    loop.set(47)
    loop.turns.go_back(3, {})
    for version in (3, 4):
        loop.turns.interrupt()
        loop.begin(version)
        assert loop.values[:3] == [10 * version] * 3
    loop.begin(5)
    assert loop.values[:3] == [47] * 3
    loop.set(50)
    loop.begin(5)
    loop.turns.go_back(4, {})
    loop.begin(4)
    loop.begin(5)
    assert loop.values[:3] == [50] * 3


def test_a_rank_that_joins_takes_what_others_know() -> None:
    loop, joined = Loop(), Loop()
    loop.run(5)
    records = json.loads(json.dumps(loop.turns.records()))
    assert len(records["values"]) == 5, "the number of each version, once"
    joined.turns.take_records(records)
    joined.turns.enter(5)
    joined.set(50)
    joined.begin(5)
    assert joined.turns.unknown(1) == 1
    joined.turns.go_back(1, {})
    for version in (1, 2, 3, 4, 5):
        joined.begin(version)
        assert joined.values[:3] == [10 * version] * 3


def test_a_rank_that_knows_nothing_of_a_step_takes_what_was_agreed() -> None:
    loop = Loop()
    told = loop.turns.present()
    assert set(told["users"]) == {"count", "shared"}
    loop.turns.enter(4)
    loop.set(7)
    loop.begin(4)
    assert loop.turns.unknown(2) == 4
    loop.turns.go_back(2, told)
    loop.begin(2)
    assert loop.values == [0, 0, 0, 7], "not what the runtime steps"
    loop.begin(3)
    loop.begin(4)
    assert loop.values == [7] * 4
    loop.turns.forget(5)
    assert loop.turns.unknown(2) == 4, "nothing is known of older versions any more"


def test_what_is_not_registered_yet_waits() -> None:
    loop = Loop()
    loop.turns.adopt({"users": {"later": {"value": 3}}})
    item = Kept()
    loop.registered.claim("later", item)
    assert item.value == 3
