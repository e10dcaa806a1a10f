"""`run.epochs()`: the loop over epochs around a loop over the prepared batches, which ends with each of them."""

from __future__ import annotations

from collections.abc import Iterator

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.engine.engine import Engine

from .course import Course
from .interruptible import Interruptible


class Epochs:
    """The epochs of a job, from the one that it is in.

    A worker that joins begins with the epoch of the first step that its script has not seen: in the middle of it, or
    behind its batches if the other ranks are there.
    """

    def __init__(self, engine: Engine, parts: Interruptible, course: Course, count: int) -> None:
        self._engine = engine
        self._parts = parts
        self._course = course
        self._count = count
        self._steps = engine.data.order.epoch_steps

    def __iter__(self) -> Iterator[int]:
        engine, course = self._engine, self._course
        epoch = (engine.version - len(engine.user_loop.unseen)) // self._steps
        try:
            while epoch < self._count and not self._left_by_others():
                if course.stops_here():  # it may be with the last step of an epoch
                    break
                course.begin_epoch(epoch, end=(epoch + 1) * self._steps)
                yield epoch
                if course.stopped:
                    break
                if not course.epoch_ended:
                    with self._parts.refusing():
                        raise UsageError(
                            f"the loop over the batches of epoch {epoch} was left before its end, and run.epochs went "
                            "on: leave that loop, too (break), or end training by run.stop(...), which ends both"
                        )
                epoch += 1
        except GeneratorExit:
            course.end()
            raise
        finally:
            course.leave_epochs()
        if not course.stopped:
            self._parts.until_whole()
        course.end()

    def _left_by_others(self) -> bool:
        """Whether this rank joined when the others had left both loops in the middle of an epoch, by `break`.

        No batch is left to it, so it takes the script past both, too.
        """
        engine = self._engine
        if engine.leave_at is None or engine.leave_at % self._steps == 0:
            return False  # behind the batches of an epoch, its own code leaves the loop as theirs did
        self._course.begin()
        while engine.user_loop.unseen:
            self._course.show()
        engine.user_loop.end_turn()
        return True
