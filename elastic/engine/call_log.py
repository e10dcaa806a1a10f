"""The calls of the script that all ranks have made between steps, with their results.

A rank that was interrupted in a call that others have completed takes the result from here, and so does a worker that
comes later: it runs the script from its beginning, and makes calls that the others made long ago.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

FOR_EVER = 1 << 62


class Place(NamedTuple):
    """Where in a script a call is made. A worker that joins at a version above `until` does not come by there."""

    name: str  # as text, behind the name of the call
    until: int = FOR_EVER


@dataclass(frozen=True)
class MadeCall:
    """A call that is complete: the `index`-th at its place, and its result, as JSON."""

    place: str
    index: int
    call: str
    result: str
    until: int


class CallLog:
    """The completed calls that a worker may still ask for. `count` is how many there have been, equal on all ranks."""

    def __init__(self) -> None:
        self.count = 0
        self._made: dict[tuple[str, int], MadeCall] = {}

    def find(self, place: Place, index: int) -> MadeCall | None:
        """The call that was made there, if it is complete."""
        return self._made.get((place.name, index))

    def add(self, made: MadeCall) -> None:
        """A call is complete."""
        self._made[made.place, made.index] = made
        self.count += 1

    def forget(self, version: int) -> None:
        """No worker will join at a version below this one."""
        for name in [name for name, made in self._made.items() if made.until < version]:
            del self._made[name]

    def records(self) -> dict[str, Any]:
        """All of it as JSON values, for a rank that lacks some."""
        return {"count": self.count, "made": [list(vars(made).values()) for made in self._made.values()]}

    def take(self, records: Mapping[str, Any]) -> None:
        """Take what another rank has."""
        self.count = max(self.count, records["count"])
        known: Iterable[list[Any]] = records["made"]
        for made in (MadeCall(*fields) for fields in known):
            self._made[made.place, made.index] = made
