"""When a wait is reported: after some seconds, and then each time that its duration has doubled. Without a clock.

One rule for ranks, nodes and commands. The caller writes the message: which process waits, for what, for which process.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

FIRST_S = 10.0  # a shorter wait is not reported
FACTOR = 2.0


@dataclass
class Spoken:
    """What was reported of one wait, or of several in sequence."""

    first_s: float = FIRST_S
    _wait: Hashable = None
    _next_s: float = 0.0

    def due(self, waited_s: float, wait: Hashable = None) -> bool:
        """Whether to report that this wait has taken so long; the caller reports it then."""
        if wait != self._wait or not self._next_s:
            self._wait, self._next_s = wait, self.first_s
        if waited_s < self._next_s:
            return False
        while self._next_s <= waited_s:
            self._next_s *= FACTOR
        return True


@dataclass
class SpokenOf:
    """The same for several concurrent waits, each with a name."""

    _known: dict[Hashable, Spoken] = field(default_factory=dict)

    def due(self, name: Hashable, waited_s: float, first_s: float = FIRST_S) -> bool:
        """See `Spoken.due`. `first_s`: when a wait that is new here is reported first."""
        return self._known.setdefault(name, Spoken(first_s)).due(waited_s)

    def keep(self, names: set[Hashable]) -> None:
        """Forget all other waits: they are over."""
        self._known = {name: spoken for name, spoken in self._known.items() if name in names}
