"""What both loops do between steps: the script sees each committed step once, and its calls have their places."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.stateful import encode
from everstep.elastic.engine.call_log import Place
from everstep.elastic.engine.engine import Engine
from everstep.elastic.engine.user_loop import Step
from everstep.elastic.step.devices import seed_generators
from everstep.elastic.step.order import derive_seed
from everstep.elastic.step.sampled import Drawn, Trust

from .calls import AFTER, Calls, Exchange
from .interruptible import Interruptible

ORDER = "the order of the samples"  # as a call
LAST_TURN = "what the last turn has left"  # likewise
BEHIND = Place("behind the last turn")


class Course:
    """The course of the user's loop on one rank. `begin` is called when it begins.

    `stopped`: a script has asked for the end, and all ranks agreed on it. `epoch_ended`: the batches of the present
    epoch have been used.
    """

    def __init__(
        self,
        engine: Engine,
        parts: Interruptible,
        calls: Calls,
        functions: list[Callable[[Step], None]],
        begin: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._parts = parts
        self._calls = calls
        self._functions = functions
        self._begin = begin
        self._epoch: tuple[int, int] | None = None  # in run.epochs: the epoch, and the version at which it ends
        self.epoch_ended = False
        self.stopped = False
        self._shared = False  # what the last turn has left

    def begin(self) -> None:
        """The user's loop begins, or the next one over the batches of an epoch does."""
        if self.epoch_ended:
            raise UsageError(
                "the loop over the prepared batches began again behind the batches of its epoch: each turn of "
                "run.epochs has one such loop"
            )
        if not self._engine.user_loop.begun:
            self._begin()
        self._engine.turns.enter()

    def show(self) -> Step:
        """The next step that the script has not seen, after its functions have had it."""
        engine = self._engine
        engine.progress.leave()
        step = engine.user_loop.show()
        self._at(Place(f"after step {step.index}", until=step.index + 1))
        if engine.loops and engine.version == step.index + 1:  # no recovery has gone back since
            engine.turn_over()
        engine.turns.enter(step.index + 1)
        for function in self._functions:
            function(step)
        return step

    def pass_by(self) -> None:
        """The script has done what it does between two steps."""
        self._engine.large.pass_by(self._engine.version)

    def go_on(self) -> None:
        """The script asks for the next step."""
        self._engine.user_loop.end_turn()
        self._calls.away()

    def stops(self) -> bool:
        """Whether a script has asked for the end, and all ranks agreed on it: then the user's loop ends."""
        engine = self._engine
        if not self.stops_here():
            return False
        if self._engine.loops:
            self.share_last_turn()
        if self._epoch is not None:
            self.end_epoch()
        elif engine.loops:
            self.end_batches()
        else:
            self.end()
        return True

    def stops_here(self) -> bool:
        """Whether training ends with the steps that the script has seen, as all ranks agreed."""
        engine = self._engine
        if engine.user_loop.unseen or not self._stop_agreed():
            return False
        self.stopped = True
        return True

    def _stop_agreed(self) -> bool:
        return bool(self._engine.stop_request.agreed(self._engine.agreement))

    # ------------------------------------------------------------ epochs

    def begin_epoch(self, epoch: int, end: int) -> None:
        """The script begins an epoch, which ends at version `end`."""
        self._epoch, self.epoch_ended = (epoch, end), False
        self._at(Place(f"at the beginning of epoch {epoch}", until=end))

    def begin_batches(self) -> None:
        """The batches of an epoch begin: all ranks use one order of its samples, if the script has a sampler."""
        if self._epoch is None:
            return
        engine, (epoch, end) = self._engine, self._epoch
        engine.data.begin_epoch(epoch)
        sampled = engine.data.sampled
        if sampled is None:
            return

        def attempt(exchange: Exchange) -> Any:
            drawn = sampled.draw(epoch)

            def chosen(values: Mapping[int, Any]) -> list[Any]:
                rank = sampled.choose({rank: Drawn(value[0], Trust(value[1])) for rank, value in values.items()}, epoch)
                return [rank, values[rank][0]]

            rank, digest = exchange(list(drawn), chosen)
            own = encode(sampled.own(epoch) if rank == engine.rank else None, ORDER)
            return exchange(own, lambda values: {"digest": digest, "order": values[rank]})

        self._calls.at(Place(f"in front of the batches of epoch {epoch}", until=end))
        sampled.take(epoch, **self._calls.carry_out(ORDER, attempt))

    def epoch_over(self) -> bool:
        """Whether no step of the epoch is left."""
        return self._epoch is not None and self._engine.version >= self._epoch[1]

    def end_epoch(self) -> None:
        """The loop over the epoch's batches is over: the code behind it runs."""
        assert self._epoch is not None
        epoch, end = self._epoch
        self.epoch_ended = True
        self._engine.progress.leave()
        self._at(Place(f"at the end of epoch {epoch}", until=end))

    def leave_epochs(self) -> None:
        """The loop over the epochs is over."""
        self._epoch, self.epoch_ended = None, False

    @property
    def epoch(self) -> int | None:
        """The epoch that the script is in, in run.epochs."""
        return self._epoch[0] if self._epoch is not None else None

    # ------------------------------------------------------------ the end

    def share_last_turn(self) -> None:
        """If no turn of the user's own loop follows: a rank that joined in the last one takes what that has changed.

        A call of all ranks, which remains in the log: so a worker that comes later begins the code behind the loop with
        what the others began it with. If all ranks joined in that turn, its changes are lost.
        """
        if (share := self._last_turn()) is not None:
            share()

    def leave_last_turn(self) -> None:
        """The same where the script leaves its loop by itself, perhaps by an error: this rank must not wait there."""
        if (share := self._last_turn()) is not None:
            self._calls.put_off(share)

    def _last_turn(self) -> Callable[[], None] | None:
        engine = self._engine
        if self._shared or not (engine.version >= engine.settings.steps or self._stop_agreed()):
            return None
        self._shared = True
        if engine.user_loop.turned != engine.version:
            return lambda: self._share(None)
        left = engine.turns.present()
        engine.large.tell(left, engine.version)  # before the script may write to what this refers to
        return lambda: self._share(left)

    def _share(self, left: dict[str, Any] | None) -> None:
        """`left`: what the last turn has left on this rank; None if the rank had no part in it."""
        engine, large = self._engine, self._engine.large

        def attempt(exchange: Exchange) -> Any:
            ranks = exchange(left is not None, lambda values: [rank for rank in values if values[rank]])
            if not ranks:
                return None
            own = json.dumps(left) if engine.rank == ranks[0] else None
            return exchange(own, lambda values: values[ranks[0]])

        text = self._calls.carry_out(LAST_TURN, attempt, at=BEHIND)
        if text is not None and left is None:
            found = json.loads(text)
            self._parts.until_done(lambda: large.fetch_left(found))
            engine.turns.adopt(found)
            large.values.release()
            large.protect(engine.turns.present(), engine.version)

    def end_batches(self) -> None:
        """The loop over the prepared batches is over.

        Unless an epoch continues after it, the script's code for the last step has run in the loop, and has no turn
        there on a worker that joins now: that worker gets what the code has made.
        """
        if self._epoch is None:
            self._engine.user_loop.end_turn()
        self.end()

    def end(self) -> None:
        """The loop is over: the code behind it runs."""
        self._engine.progress.leave()
        self._at(AFTER)

    def _at(self, place: Place) -> None:
        """The script's code comes that all ranks run: what it draws does not depend on the turns that a rank has had.

        Nor on when a replacement came.
        """
        self._calls.at(place)
        seed_generators(derive_seed("between", self._engine.settings.seed, place.name))
