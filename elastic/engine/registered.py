"""The objects with a state that a script has registered, on one rank: their states by step, and other ranks'."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from everstep.elastic.contract.stateful import decode, encode, has_names, large_in

from .large_values import LargeValues


class Registered:
    """The registered objects by name (`objects`, which the script may add to), and their states as JSON values.

    `driven`: the names of those that the runtime itself steps. `unclaimed`: states of other ranks' objects that this
    rank has not registered yet.
    """

    def __init__(self, objects: dict[str, Any], large: LargeValues) -> None:
        self.objects = objects
        self.large = large  # values that states refer to
        self.driven: set[str] = set()
        self.unclaimed: dict[str, Any] = {}
        self._at: dict[int, dict[str, Any]] = {}  # step -> the states at its end

    def claim(self, name: str, item: Any) -> None:
        """Register an object; if other ranks had one of that name when this rank joined, it receives its state."""
        self.objects[name] = item
        if name in self.unclaimed:
            item.load_state_dict(decode(self.unclaimed.pop(name), self.large.give))

    def load(self, name: str, state: Any) -> None:
        """An object's state on other ranks or at an earlier time."""
        if name not in self.objects:
            self.unclaimed[name] = state
        elif self._by_name(name, state):
            item, other = self.objects[name], self.differing({name: state}).get(name, {})
            present, found = item.state_dict(), decode(other, self.large.give)
            item.load_state_dict({key: found[key] if key in found else present[key] for key in state})
        else:
            self.objects[name].load_state_dict(decode(state, self.large.give))
            self.large.forget(name)  # an object may write to its tensors in any way

    def differing(self, states: Mapping[str, Any]) -> dict[str, Any]:
        """Those of these states that are not the present ones; of `run.state` the values that are not."""
        found: dict[str, Any] = {}
        for name, state in states.items():
            now: Any = self.state_of(name, self.objects[name]) if name in self.objects else None
            if now != state:
                part = self._by_name(name, state)
                found[name] = {k: v for k, v in state.items() if k not in now or now[k] != v} if part else state
        return found

    def _by_name(self, name: str, state: Any) -> bool:
        """Whether it is the state of an object that holds values by name, each of which can be set by itself."""
        return isinstance(self.objects.get(name), MutableMapping) and has_names(state)

    def states(self) -> dict[str, Any]:
        """The states now."""
        return {name: self.state_of(name, item) for name, item in self.objects.items()}

    def state_of(self, name: str, item: Any) -> Any:
        """The state of one object now. Raises UsageError."""
        return encode(item.state_dict(), name, self.large.keep)

    def compared(self, states: Mapping[str, Any]) -> dict[str, Any]:
        """What has to be equal on all ranks, by names for people: the values that they share, and large ones."""
        found: dict[str, Any] = {}
        for name, state in self.of_users(states).items():
            if self.changes_between_steps(name):
                found |= {f"{name}[{key!r}]": value for key, value in state.items()}
            elif large := list(large_in(state)):
                found[f"register_state({name!r})"] = large
        return found

    def users(self) -> dict[str, Any]:
        """The states now of what the user's code changes."""
        return self.of_users(self.states())

    def of_users(self, states: Mapping[str, Any]) -> dict[str, Any]:
        """The part of `states` that the user's code changes."""
        return {name: state for name, state in states.items() if name not in self.driven}

    def changes_between_steps(self, name: str) -> bool:
        """Whether the script changes an object between steps only: then it has to be equal on all ranks in each."""
        return getattr(self.objects.get(name), "between_steps", False)

    def record(self, step: int, *, again: bool) -> dict[str, Any]:
        """The states at the end of `step`, which are kept, in case it is computed again. `again`: it has been."""
        states = self.states()
        if again:
            states.update(self.of_users(self._at.get(step, {})))
        self._at[step] = states
        return states

    def forget(self, before: int) -> None:
        """Steps before this one will not be computed again."""
        for old in [n for n in self._at if n < before]:
            del self._at[old]
