"""The learning-rate schedulers of a run: which ones the runtime steps, and which ones the script steps."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.engine.engine import Engine
from everstep.elastic.step.schedule import EpochSchedule, ScheduledRate, ScheduleState, refuse, schedulers_of


class Schedulers:
    """The schedulers that are built on a run's optimizer: `passed` to the runtime, or found.

    `by_epoch`: the script steps them, once per epoch, in front of or behind its batches.
    """

    def __init__(self, engine: Engine, optimizer: Optimizer, passed: LRScheduler | None, *, by_epoch: bool) -> None:
        self._engine = engine
        self._by_epoch = by_epoch
        self._in_batches = False  # the script is in the loop over the batches of an epoch
        self._optimizers = [optimizer]  # the user's optimizer, and its replacement in a loop
        self._known: list[LRScheduler] = []
        self.left_in_loop: list[ScheduledRate] = []  # the scheduler that was found, not passed in
        if passed is not None and not by_epoch:
            self._drive(passed)
        self.take_over()

    def add_optimizer(self, prepared: Optimizer) -> None:
        """Look for schedulers on the optimizer that replaces the user's one in its loop, too."""
        self._optimizers.append(prepared)

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
        if "scheduler" in engine.registered.driven or len(others) > 1:
            refuse(others, "the runtime steps one scheduler: combine them (SequentialLR, ChainedScheduler) into that")
        elif others:
            self.left_in_loop.append(self._drive(others[0]))
            return True
        return False

    def _check_place(self, name: str) -> None:
        """Ranks have different numbers of turns in an epoch, but each comes by behind it once."""
        if self._in_batches:
            raise UsageError(
                f"{name}.step() was called in the loop over the batches of an epoch, with scheduler_every='epoch': "
                "call it behind that loop, or leave scheduler_every out for a scheduler that steps once for each step"
            )

    def _drive(self, scheduler: LRScheduler) -> ScheduledRate:
        """Step the scheduler once per committed step."""
        rate = ScheduledRate(scheduler)
        self._known.append(scheduler)
        self._engine.on_commit.append(rate.advance)
        self._engine.registered.driven.add("scheduler")
        self._engine.claim("scheduler", rate)
        return rate
