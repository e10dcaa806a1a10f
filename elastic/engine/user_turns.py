"""What the user's code has made of settings and registered objects, by version, on one rank.

In the user's own loop, code behind `optimizer.step()` may change them once the step is committed. So what the agreement
of a step says of them is not yet what the next step begins with. When steps are computed again, turns of the loop are
repeated, and functions that have seen a step are not. So each repeated step begins with what it began with before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from everstep.elastic.holding.adjustments import Adjustments
from everstep.elastic.holding.user_optimizer import UserOptimizer

from .registered import Registered


class UserTurns:
    """`began`: the states of registered objects with which functions for the last committed step began."""

    def __init__(self, registered: Registered, adjustments: Adjustments, optimizer: UserOptimizer) -> None:
        self.began: dict[str, Any] = {}
        self._registered = registered
        self._adjustments = adjustments
        self._optimizer = optimizer
        self._at: dict[int, dict[str, Any]] = {}  # version -> what the first turn behind it began with
        self._passed = -1  # the version of which that was last recorded, or put in force

    def begin(self) -> dict[str, Any]:
        """Functions for the last committed step begin, with these states of registered objects."""
        self.began = self._registered.users()
        return self.began

    def present(self) -> dict[str, Any]:
        """What the user's code may change between steps: settings, and the states of the objects that it registered."""
        users = self._registered.users()
        return {**self._adjustments.terms(), "groups": self._optimizer.hyper_parameters(), "users": users}

    def adopt(self, after: Mapping[str, Any], *, but_between_steps: bool = False) -> None:
        """Put in force how the user's code has left things here earlier, or on another rank.

        `but_between_steps`: leave alone what the script changes between steps only, where it does not run again.
        """
        if "groups" in after:
            self._adjustments.set(after)
        for name, state in after.get("users", {}).items():
            if not (but_between_steps and self._registered.changes_between_steps(name)):
                self._registered.load(name, state)

    def repeated(self, version: int, *, first: bool) -> dict[str, Any]:
        """The states of registered objects that `pass_by` is to put back."""
        if first or version not in self._at or version == self._passed:
            return {}
        users = self._at[version]["users"]
        return {name: state for name, state in users.items() if not self._registered.changes_between_steps(name)}

    def pass_by(self, version: int, *, first: bool) -> None:
        """A turn begins behind `version`. `first`: the script has just seen the step before it; else that may be a
        repeated one."""
        if first or version not in self._at:
            self._at[version] = self.present()
        elif version != self._passed:
            self.adopt(self._at[version], but_between_steps=True)
        self._passed = version

    def began_at(self, version: int) -> dict[str, Any]:
        """What the first turn behind `version` began with; nothing if that is not known."""
        return self._at.get(version, {})

    def go_back(self, version: int, otherwise: Mapping[str, Any]) -> None:
        """Turns behind `version` are repeated. `otherwise`: how things were left, if this rank was not there."""
        self.adopt(self._at.get(version, otherwise), but_between_steps=True)
        self._passed = version

    def forget(self, before: int) -> None:
        """Steps before this one will not be computed again."""
        for version in [version for version in self._at if version < before]:
            del self._at[version]
