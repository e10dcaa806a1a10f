"""What the user's code has made of settings and registered objects, `run.state` among them, by version, on one rank.

That code runs between two steps: in functions, in the body of a loop over `run.steps`, and in the user's own loop
behind `optimizer.step()`. So what the agreement of a step says of them is not yet what the next step begins with. When
steps are computed again, the code that has seen them does not run again. So each repeated step begins with what it
began with before, and behind the last one things are again as the user's code had left them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from everstep.elastic.holding.adjustments import Adjustments
from everstep.elastic.holding.user_optimizer import UserOptimizer

from .registered import Registered


class UserTurns:
    """`began`: the states of registered objects with which functions for the last committed step began.

    `version`: the one whose states are in force; a recovery that goes back leaves them until the next step begins.
    """

    def __init__(self, registered: Registered, adjustments: Adjustments, optimizer: UserOptimizer) -> None:
        self.began: dict[str, Any] = {}
        self.version = 0
        self._registered = registered
        self._adjustments = adjustments
        self._optimizer = optimizer
        self._at: dict[int, dict[str, Any]] = {}  # version -> what its step began with
        self._runs = False  # the user's code runs, or has run, since that of `version` was recorded
        # How the user's code has left things in the midst of what it does at a version, to which it comes back.
        self._left: tuple[int, dict[str, Any]] | None = None

    def begin(self) -> dict[str, Any]:
        """Functions for the last committed step begin, with these states of registered objects."""
        self.began = self._registered.users()
        return self.began

    def present(self) -> dict[str, Any]:
        """What the user's code may change between steps: settings, and the states of the objects that it registered."""
        users = self._registered.users()
        return {**self._adjustments.terms(), "groups": self._optimizer.hyper_parameters(), "users": users}

    def adopt(self, after: Mapping[str, Any]) -> None:
        """Put in force how the user's code has left things here earlier, or on another rank."""
        if "groups" in after:
            self._adjustments.set(after)
        users = after.get("users", {})
        for name in self._registered.differing(users):
            self._registered.load(name, users[name])

    # ------------------------------------------------------------ versions

    def enter(self, version: int | None = None) -> None:
        """The user's code begins to run at `version`, with the present states; None: of which these are already."""
        self.version, self._runs = self.version if version is None else version, True

    def record(self) -> None:
        """The user's code has done what it does in front of the step of its version."""
        if self._runs and self._left is None:
            self._at[self.version] = _sharing(self._at.get(self.version - 1, {}), self.present())
            self._runs = False

    def interrupt(self) -> dict[str, Any] | None:
        """Steps are computed again in the midst of the user's code: how it has left things; None if that is known."""
        if self._left is not None:
            return None
        self._left = (self.version, self.present())
        return self._left[1]

    @property
    def interrupted(self) -> bool:
        """Whether steps are computed again in the midst of the user's code."""
        return self._left is not None

    def due(self, version: int) -> dict[str, Any]:
        """What `pass_by` is to put in force; nothing where that is in force, or is not known."""
        if version == self.version:
            return {}
        if self._left is not None and version >= self._left[0]:
            return self._left[1]
        return self._at.get(version, {})

    def pass_by(self, version: int) -> None:
        """The step of `version` begins, for the first time or another one, with what it began with before."""
        self.adopt(self.due(version))
        self.version = version
        if self._left is not None and version >= self._left[0]:
            self._left = None
        elif version not in self._at:
            self._at[version] = self.present()

    def state_at(self, version: int) -> dict[str, Any]:
        """What the step of `version` begins with; how things are now, if that is not known."""
        return self.due(version) or self.present()

    def began_at(self, version: int) -> dict[str, Any]:
        """What the step of `version` began with; nothing if that is not known."""
        return self._at.get(version, {})

    def go_back(self, version: int, otherwise: Mapping[str, Any]) -> None:
        """Steps from `version` on are repeated. `otherwise`: how things were left, if this rank was not there."""
        self._at.setdefault(version, dict(otherwise))

    def unknown(self, version: int) -> int:
        """The first version from `version` on with which a repeated step of this rank begins, and which it knows."""
        while version < self.version and version not in self._at:
            version += 1
        return version

    def forget(self, before: int) -> None:
        """Steps before this one will not be computed again."""
        for version in [version for version in self._at if version < before]:
            del self._at[version]

    # ------------------------------------------------------------ other ranks

    def records(self) -> dict[str, Any]:
        """What is known of versions, for a rank that joins: each value that several have in common once."""
        table: dict[str, int] = {}
        at = {str(version): _numbers(state, table, depth=3) for version, state in self._at.items()}
        return {"values": list(table), "at": at}

    def take_records(self, records: Mapping[str, Any]) -> None:
        """Adopt those, on a rank that joins."""
        values = [json.loads(text) for text in records["values"]]
        self._at = {int(version): _values(numbers, values) for version, numbers in records["at"].items()}


def _numbers(state: Any, table: dict[str, int], depth: int) -> Any:
    """The state with numbers in the table for its values, `depth` names deep."""
    if depth and isinstance(state, dict):
        return {name: _numbers(value, table, depth - 1) for name, value in state.items()}
    return table.setdefault(json.dumps(state), len(table))


def _values(numbers: Any, values: list[Any]) -> Any:
    if isinstance(numbers, dict):
        return {name: _values(number, values) for name, number in numbers.items()}
    return values[numbers]


def _sharing(before: Any, now: Any) -> Any:
    """`now`, with the very objects of `before` where values are equal: so versions share the memory of these."""
    if before == now:
        return before
    if isinstance(before, dict) and isinstance(now, dict):
        return {name: _sharing(before.get(name), value) for name, value in now.items()}
    return now
