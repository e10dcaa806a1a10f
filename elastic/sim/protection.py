"""A simulated worker's part in protecting versions from lost nodes: the shell around `Protecting`."""

from __future__ import annotations

from collections.abc import Callable

from everstep.elastic.protocol.agreement import Kept
from everstep.elastic.protocol.protecting import Protecting
from everstep.elastic.protocol.terms import Terms
from everstep.resharding.lines import of_this_line
from everstep.resharding.placement import Placement

from .snapshots import Snapshots
from .world import Steps, World

PATIENCE_S = 5.0
POLL_S = 0.003


class Protection:
    """Asks the keeper, and waits. `interval` 0: it changes all the time."""

    def __init__(self, world: World, snapshots: Snapshots, interval: int, *, replay: bool) -> None:
        self._world = world
        self._snapshots = snapshots
        self._interval = interval
        self._state = Protecting(max(1, interval), replay=replay)

    @property
    def nodes(self) -> bool:
        return self._state.nodes

    def enter(self, generation: int, placement: Placement, *, joins: bool) -> None:
        """Enter a new generation."""
        self._look()
        self._state.enter(generation, nodes=bool(placement.stripes), joins=joins)

    def begins(self, version: int, *, anyway: bool = False) -> bool:
        """Whether `version` is to be protected."""
        return self._state.begins(version, anyway=anyway)

    def _look(self) -> None:
        self._state.saw(*self._answers())

    def report(self, version: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(generation, version), in this generation and in the last one that had any, for a report."""
        (now, new), (before, old) = self._answers()
        outlives = self._snapshots.protected
        return (now, Protecting.lasting(new, version, outlives)), (before, Protecting.lasting(old, version, outlives))

    def _answers(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return self._snapshots.protection() if self._state.nodes else ((0, -1), (0, -1))

    def wait(self, step: int, on_wait: Callable[[], None]) -> Steps[None]:
        """Wait, before `step` is agreed on, until earlier versions whose protection has begun are whole here."""
        self._look()
        started = self._world.now
        while self._state.waits(step):
            on_wait()
            yield POLL_S
            self._look()
            if self._world.now - started > PATIENCE_S:
                self._state.give_up()

    def share(self, step: int, rank: int) -> Kept:
        """This rank's contribution to the agreement of a step."""
        every = self._interval or self._world.random.randint(1, 4)
        return self._state.share(step, self._snapshots.protected, rank, every)

    def agreed(self, step: int, merged: Kept) -> dict[str, int]:
        """The meaning of the members' merged shares."""
        return self._state.agreed(step, merged, self._snapshots.protected)

    def adopt(self, agreement: str) -> None:
        """Adopt what was agreed."""
        terms = Terms.of(agreement)
        if of_this_line(self._snapshots.lines, terms.step):
            self._snapshots.outlives(terms.protected)
        self._state.adopt(terms.every)
