"""What the user's code has left behind, by version, in a loop that goes back."""

from __future__ import annotations

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
        return {"frozen": []}

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


def test_repeated_steps_begin_with_what_they_began_with() -> None:
    loop = Loop()
    for version in range(5):
        loop.set(10 * version)
        loop.turns.pass_by(version, first=version > 0)
        loop.set(10 * version + 1)  # in the first turn
        loop.turns.pass_by(version, first=False)  # the second turn: nothing is put back
        assert loop.values == [10 * version + 1] * 4
    loop.turns.go_back(2, {})
    assert loop.values == [20, 20, 41, 41], "not what changes between steps, nor what the runtime steps"
    for version in (2, 3, 4):
        loop.turns.pass_by(version, first=False)
        assert loop.values[:2] == [10 * version] * 2
        loop.rate.value = loop.count.value = 99
        loop.turns.pass_by(version, first=False)
        assert loop.values[:2] == [99, 99]
    loop.turns.pass_by(5, first=True)
    loop.turns.go_back(5, {})
    assert loop.values[:2] == [99, 99]


def test_a_rank_that_was_not_there_takes_what_it_is_told() -> None:
    loop = Loop()
    told = loop.turns.present()
    assert set(told["users"]) == {"count", "shared"}
    loop.set(7)
    loop.turns.go_back(3, told)
    assert loop.values == [0, 0, 7, 7]
    loop.set(8)
    loop.turns.pass_by(4, first=False)
    loop.set(9)
    loop.turns.forget(5)
    loop.turns.go_back(4, {})
    assert loop.values == [9] * 4, "nothing is known of that version any more"


def test_what_is_not_registered_yet_waits() -> None:
    loop = Loop()
    loop.turns.adopt({"users": {"later": {"value": 3}}})
    item = Kept()
    loop.registered.claim("later", item)
    assert item.value == 3
