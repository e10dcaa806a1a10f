"""Learning-rate schedulers that the runtime steps once per committed step: passed in, or found in the user's loop."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.stateful import encode

ANOTHER_RHYTHM = (
    "the runtime steps it once for each step of the job, so it has to be called once in each turn of the loop. For one "
    "that steps once per epoch: run.prepare(..., scheduler_every='epoch'), in a job with epochs=. For another rhythm "
    "let the rate depend on the step: LambdaLR(optimizer, lambda step: ...)"
)


class ScheduleState:
    """A scheduler's state.

    `between_steps`: the script's code between two steps changes it, and does not run again for steps that are computed
    again.
    """

    between_steps = False

    def __init__(self, scheduler: LRScheduler) -> None:
        self.scheduler = scheduler

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state, as JSON values."""
        return dict(self.scheduler.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scheduler.load_state_dict(dict(state))


class ScheduledRate(ScheduleState):
    """Takes over a scheduler: `advance` steps it, and the user's own calls of `step()` have no effect any more."""

    def __init__(self, scheduler: LRScheduler, batch_of: Callable[[int], int] = lambda step: step) -> None:
        """`batch_of`: the batch of a step of the job; the scheduler is stepped once for each."""
        super().__init__(scheduler)
        self._step = scheduler.step
        self._batch_of = batch_of
        self.called = False  # by the user's code, since this was last set to False
        optimizer: Any = scheduler.optimizer
        optimizer._opt_called = True  # its shards are stepped instead: suppress torch's warning that it never was
        _replace_step(scheduler, self._already_stepped)

    def advance(self, step: int) -> None:
        """`step` of the job is committed."""
        if self._batch_of(step + 1) != self._batch_of(step):
            self._step()

    def _already_stepped(self, epoch: int | None = None) -> None:
        """The runtime stepped the scheduler when the step was committed."""
        self.called = True

    def check_called(self, step: int) -> None:
        """A turn of the user's loop is over: a scheduler that was found in that loop has to have been called in it."""
        if not self.called:
            raise UsageError(
                f"{type(self.scheduler).__name__} was built on the optimizer, and its step() was not called for a "
                f"micro-batch of step {step}: {ANOTHER_RHYTHM}; or hand it over: run.prepare(..., scheduler=scheduler)"
            )
        self.called = False


class EpochSchedule(ScheduleState):
    """A scheduler that the script steps between the batches of two epochs; `check` gets its name, and may refuse."""

    between_steps = True

    def __init__(self, scheduler: LRScheduler, check: Callable[[str], None]) -> None:
        super().__init__(scheduler)
        step = scheduler.step

        def checked(*arguments: Any, **named: Any) -> None:
            check(type(scheduler).__name__)
            step(*arguments, **named)

        _replace_step(scheduler, checked)


def check_scheduler(scheduler: Any) -> None:
    """Raise UsageError for a scheduler that the runtime cannot step by itself."""
    if isinstance(scheduler, ReduceLROnPlateau):
        raise UsageError(
            "scheduler=ReduceLROnPlateau: it needs a metric, which the runtime does not have. Leave scheduler= out, "
            "and call scheduler.step(step.loss) in the loop over run.steps(...): that loss is equal on all ranks"
        )
    if not isinstance(scheduler, LRScheduler):
        raise UsageError(
            f"scheduler= takes a scheduler of torch.optim.lr_scheduler, got {type(scheduler).__name__}: leave it out, "
            "and set the rates from the step in the loop, such as scheduler.step_update(run.step); what one rank sets "
            "counts on all"
        )


def schedulers_of(optimizers: Sequence[Optimizer]) -> list[LRScheduler]:
    """The schedulers built on these optimizers that no other scheduler contains, in an order equal on all ranks."""
    known = {id(optimizer) for optimizer in optimizers}
    holders = gc.get_referrers(*optimizers)
    attributes = [holder for holder in holders if type(holder) is dict and id(holder.get("optimizer")) in known]
    if attributes:
        holders += gc.get_referrers(*attributes)
    found = {id(h): h for h in holders if issubclass(type(h), LRScheduler) and id(vars(h).get("optimizer")) in known}
    parts = {id(part) for item in found.values() for part in _parts(item)}
    return sorted((item for item in found.values() if id(item) not in parts), key=_described)


def _parts(scheduler: LRScheduler) -> Iterable[LRScheduler]:
    for value in vars(scheduler).values():
        yield from (p for p in (value if isinstance(value, list | tuple) else [value]) if isinstance(p, LRScheduler))


def _described(scheduler: LRScheduler) -> str:
    name = type(scheduler).__name__
    return name + json.dumps(encode(ScheduleState(scheduler).state_dict(), f"the state of {name}"), sort_keys=True)


def refuse(schedulers: Iterable[LRScheduler], why: str) -> None:
    """Make the `step` of these schedulers raise UsageError."""
    for scheduler in schedulers:
        name = type(scheduler).__name__

        def step(*arguments: Any, name: str = name, **named: Any) -> NoReturn:
            raise UsageError(f"{name}.step() was called in the loop over run.prepare's batches: {why}")

        _replace_step(scheduler, step)


def _replace_step(scheduler: LRScheduler, step: Callable[..., None]) -> None:
    """Give a scheduler another `step`. What it saves of itself, which is all its attributes, stays what torch saves."""
    whole = scheduler.state_dict

    def state_dict() -> dict[str, Any]:
        return {name: value for name, value in whole().items() if name not in ("step", "state_dict")}

    scheduler.step = step  # type: ignore[method-assign]
    scheduler.state_dict = state_dict  # type: ignore[method-assign]
