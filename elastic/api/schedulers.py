"""The learning-rate schedulers of a run: which ones the runtime steps, and which ones the script steps."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.engine.engine import Engine
from everstep.elastic.step.schedule import (
    EpochSchedule,
    ScheduledRate,
    ScheduleState,
    check_scheduler,
    refuse,
    schedulers_of,
)


def checked(passed: LRScheduler | Sequence[LRScheduler] | None, *, by_epoch: bool) -> list[LRScheduler]:
    """The schedulers that a script passes. Raises UsageError for one that the runtime is to step and cannot."""
    found = [] if passed is None else list(passed) if isinstance(passed, Sequence) else [passed]
    for scheduler in () if by_epoch else found:
        check_scheduler(scheduler)
    return found


class Schedulers:
    """The schedulers that are built on a run's optimizers: `passed` to the runtime, or found.

    `by_epoch`: the script steps them, once per epoch, in front of or behind its batches.
    """

    def __init__(
        self, engine: Engine, optimizers: Sequence[Optimizer], passed: Sequence[LRScheduler], *, by_epoch: bool
    ) -> None:
        self._engine = engine
        self._by_epoch = by_epoch
        self._in_batches = False  # the script is in the loop over the batches of an epoch
        self._optimizers = list(optimizers)  # the user's optimizers, and their replacements in a loop
        self._count = len(optimizers)
        self._known: list[LRScheduler] = []
        self._driven: set[int] = set()  # the optimizers, by number, whose scheduler the runtime steps
        self.left_in_loop: list[ScheduledRate] = []  # the schedulers that were found, not passed in
        for scheduler in () if by_epoch else passed:
            self._drive(scheduler)
        self.take_over()

    def add_optimizers(self, prepared: Sequence[Optimizer]) -> None:
        """Look for schedulers on the optimizers that replace the user's ones in their loop, too."""
        self._optimizers += prepared

    def _number(self, scheduler: LRScheduler) -> int:
        """The number of the optimizer on which a scheduler was built."""
        own = [place for place, optimizer in enumerate(self._optimizers) if optimizer is scheduler.optimizer]
        return own[0] % self._count if own else 0

    def enter_batches(self) -> None:
        """The script enters the loop over the batches of an epoch."""
        self._in_batches = True

    def leave_batches(self) -> None:
        """The script leaves it."""
        self._in_batches = False

    def take_over_late(self) -> bool:
        """Take over schedulers that were built after `prepare` or `steps`. Returns whether the runtime steps one."""
        # A scheduler wraps its optimizer's `step`.
        return any("step" in vars(optimizer) for optimizer in self._optimizers) and self.take_over()

    def take_over(self) -> bool:
        """Find schedulers that were built on the optimizer and not passed in. Returns whether the runtime steps one.

        In the user's own loop the runtime steps the found scheduler once a step. With `steps` or by epoch the user's
        code steps it, at the same steps on all ranks: its state is registered, and the ranks agree on the learning
        rates anyway.
        """
        engine = self._engine
        known = {id(item) for item in self._known}
        found = [item for item in schedulers_of(self._optimizers) if id(item) not in known]
        self._known += found
        plateaus = [item for item in found if isinstance(item, ReduceLROnPlateau)]
        others = [item for item in found if item not in plateaus]
        if not engine.loops or self._by_epoch:
            for item in found:
                names = engine.registered.objects
                name = "scheduler" if "scheduler" not in names else f"scheduler {len(names)}"
                item.optimizer._opt_called = True  # type: ignore[attr-defined]
                engine.claim(name, EpochSchedule(item, self._check_place) if self._by_epoch else ScheduleState(item))
            return False
        refuse(plateaus, "the loss of a micro-batch differs between ranks. Use run.steps(...), and step.loss there")
        drives = False
        for number in sorted({self._number(item) for item in others}):
            own = [item for item in others if self._number(item) == number]
            if number in self._driven or len(own) > 1:
                why = "the runtime steps one scheduler of an optimizer: combine them (SequentialLR, ChainedScheduler)"
                refuse(own, why)
            else:
                self.left_in_loop.append(self._drive(own[0]))
                drives = True
        return drives

    def _check_place(self, name: str) -> None:
        """Ranks have different numbers of turns in an epoch, but each comes by behind it once."""
        if self._in_batches:
            raise UsageError(
                f"{name}.step() was called in the loop over the batches of an epoch, with scheduler_every='epoch': "
                "call it behind that loop, or leave scheduler_every out for a scheduler that steps once for each step"
            )

    def _drive(self, scheduler: LRScheduler) -> ScheduledRate:
        """Step the scheduler once per committed step; where optimizers take turns, once for each batch."""
        engine, number = self._engine, self._number(scheduler)
        rate = ScheduledRate(scheduler, engine.data.order.batch_of)
        name = f"scheduler {number}" if number else "scheduler"
        self._known.append(scheduler)
        self._driven.add(number)
        engine.on_commit.append(rate.advance)
        engine.drive(name, rate)
        return rate
