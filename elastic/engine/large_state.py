"""When a rank hands large values of the script to its keeper, and when it gets them from there.

Before a step is agreed on, the keeper of every node has what the states of that step refer to. What the user's code
makes of them behind a step is in a keeper before the coordinator, or a rank that joins, hears of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from everstep.checkpointing.access.client import KeeperLink
from everstep.elastic.protocol.terms import Terms
from everstep.elastic.step.stream_states import STREAM_STATE
from everstep.resharding.layout import Layout

from .large_values import LargeValues, Read

if TYPE_CHECKING:
    from .engine import Engine

WAITS_FOR = "its keeper to hold large tensors of the script"
FETCHES = "large tensors of the script in the keepers"


class LargeState:
    """The large values in the registered states of one engine."""

    def __init__(self, engine: Engine, link: KeeperLink | None, token: str) -> None:
        self.values = LargeValues(link)
        self._engine = engine
        self._token = token
        self._at_leaving: dict[str, bytes] = {}  # when the user's code left the loop
        self._midst: dict[str, bytes] = {}  # where it was interrupted, to compute steps again

    def agree(self, registered: Mapping[str, Any], step: int) -> None:
        """These states are about to be agreed on. Raises UsageError for a value that changed unseen."""
        self.values.check(step)
        self.protect(registered, step + 1, begins=True)

    def carry(self, step: int, carried: Mapping[str, Any], registered: dict[str, Any]) -> None:
        """Gather what micro-batches carry on: the keeper of each rank that gets further has it. Raises Aborted."""
        engine = self._engine
        engine.stream_states.share(step, carried, registered, engine.agreeing, self.values.keep)
        self.tell(registered, step + 1)

    def pass_by(self, version: int) -> None:
        """The user's code has done what it does in front of the step of `version`, which may be a repeated one."""
        turns = self._engine.turns
        turns.record()
        if due := turns.due(version):
            self.values.hold_pieces(self._midst)
            self._fetch(self._engine.registered.differing(due["users"]), on_wait=self._engine.progress.tick)
        turns.pass_by(version)
        if not turns.interrupted:
            self._midst = {}
        self.release()
        self.protect(turns.began_at(version).get("users"), version)

    def interrupt(self) -> None:
        """Steps are to be computed again in the midst of the user's code, which then finds its values as they are."""
        if (left := self._engine.turns.interrupt()) is not None:
            self._midst = self.values.copies(left)

    def release(self) -> None:
        """What was fetched has been put into place, unless the next step begins with it."""
        if not self._engine.turns.due(self._engine.version):
            self.values.release()

    def protect(self, states: Any, version: int, layout: Layout | None = None, *, begins: bool = False) -> None:
        """Have this node's keeper hold what `states` of `version` refer to, where this rank speaks for the node."""
        layout = layout or self._engine.current()[0]
        orders = self._engine.orders.get(layout.generation)
        node_of = orders.nodes.get if orders is not None else lambda rank: rank
        mine = [rank for rank in layout.ranks if node_of(rank) == node_of(self._engine.rank)]
        if self._engine.rank == min(mine):
            self.tell(states, version, begins=begins)

    def tell(self, states: Any, version: int, *, begins: bool = False) -> None:
        """The same on any rank. Raises ConnectionError where this node has had no keeper for long."""
        with self._engine.progress.waiting(WAITS_FOR):
            oldest = min(version - 2, self.oldest())  # the coordinator may not know of the last one
            self.values.protect(states, version, oldest, self._engine.progress.tick, begins=begins)

    def oldest(self) -> int:
        """The oldest version to which the job may return; a checkpoint has large values itself."""
        engine = self._engine
        if engine.snapshots.protected >= 0:
            return engine.snapshots.protected
        return 0 if engine.protection.nodes else engine.version

    def tell_place(self, agreement: str, after: Mapping[str, Any], version: int) -> None:
        """This rank is about to tell newcomers of these states."""
        agreed = Terms.of(agreement).registered if agreement else {}
        self.tell([agreed, after], version)

    def fetch_told(self, agreement: str, after: Mapping[str, Any]) -> None:
        """Get what the position of the job refers to that this rank was told. Raises Aborted."""
        self._fetch([Terms.of(agreement).registered if agreement else {}, after])

    def fetch_ahead(self, agreement: str) -> None:
        """This rank is to commit a step that others have agreed on: get what they have gathered. Raises Aborted."""
        registered = Terms.of(agreement).registered
        self._fetch(registered.get(STREAM_STATE))
        self._engine.stream_states.foresee(registered, self.values.give)

    def fetch_left(self, after: Mapping[str, Any]) -> None:
        """Get what another rank's user code has left. Raises Aborted."""
        self._fetch([after])

    def fetch_agreed(self, agreement: str, version: int, saved: Read | None) -> None:
        """Get what a rank needs that goes to `version`, behind this agreement: a new one, or one that goes back.

        `saved` reads a checkpoint. Raises Aborted, and what `saved` raises.
        """
        engine = self._engine
        terms = Terms.of(agreement) if agreement else None
        agreed = terms.registered if terms is not None else engine.birth["registered"]
        left = (terms and terms.after) or {}
        if not engine.worker.state.fresh and (began := engine.turns.began_at(version)):
            agreed, left = {name: agreed[name] for name in agreed.keys() & engine.registered.driven}, began
        self._fetch([agreed, left], saved)

    def _fetch(self, states: Any, saved: Read | None = None, on_wait: Callable[[], None] | None = None) -> None:
        engine = self._engine
        keepers = engine.orders[engine.comm.generation].keepers
        nearest = dict(sorted(keepers.items(), key=lambda item: item[0] != engine.loader.node))
        with engine.progress.waiting(FETCHES):
            self.values.fetch(states, nearest, self._token, on_wait or engine.patient, saved)

    # ------------------------------------------------------------ checkpoints

    def after(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """How the user's code has left things, and the pieces of large values of it: those on the lowest rank alone."""
        engine = self._engine
        if engine.after_leaving is not None:
            return engine.after_leaving, self._at_leaving
        after = engine.turns.present()
        return after, self.values.copies([after, self._driven()]) if engine.rank == min(engine.comm.members) else {}

    def _driven(self) -> dict[str, Any]:
        """What the last step has agreed on of states that the runtime itself changes."""
        engine = self._engine
        states = Terms.of(engine.agreement).registered if engine.agreement else {}
        return {name: state for name, state in states.items() if name in engine.registered.driven}

    def leave(self) -> None:
        """The user's code has left the loop, and may change all values."""
        if self._engine.checkpoints.active:
            self._at_leaving = self.values.copies([self._engine.after_leaving, self._driven()])
