"""The user's own loop: `Batches` hands out micro-batches, `ElasticOptimizer.step` takes their gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from torch.optim import Optimizer

from ..resharding.plan import Span
from .devices import to_device
from .engine import Engine
from .errors import UsageError
from .pipeline import tokens_and_samples
from .progress import Phase
from .protocol.liveness import Pace
from .telemetry import Spent

Guard = Callable[..., None]


class _NoLength(UsageError, TypeError):
    """What Python expects of an iterable without a length, in the words of the user's error."""


class Batches:
    """Iterates over this rank's micro-batches until the last step is committed."""

    def __init__(self, engine: Engine, guard: Guard, switch: Callable[[], None]) -> None:
        self._engine = engine
        self._guard = guard
        self._switch = switch
        self._open: Span | None = None  # handed out, gradient not yet taken
        self._handed_out_ns = 0

    def __iter__(self) -> Iterator[Any]:
        engine = self._engine
        while True:
            if self._open is not None:
                raise UsageError(
                    "optimizer.step() was not called for the last micro-batch: call it once for each; gradients are "
                    "accumulated over the step by the runtime"
                )
            engine.results.clear()
            if engine.switch is not None:
                self._guard(self._switch)
            elif engine.ended():
                self._guard(engine.conclude)
                if engine.ended() and engine.switch is None:
                    engine.progress.leave()
                    return
            elif engine.current()[1].todo:
                batch = self._hand_out()
                if batch is not None:
                    yield batch[0]
            else:
                self._guard(engine.complete)

    @property
    def dataset(self) -> Any:
        """The user's dataset."""
        return self._engine.data.dataset

    @property
    def batch_size(self) -> int:
        """Samples of a micro-batch: of one turn of the loop."""
        return self._engine.settings.micro_batch_size

    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        raise _NoLength(
            "len(batches): how many micro-batches a rank computes changes with the membership; the job has run.step of "
            "run.settings.steps steps, and len(batches.dataset) // run.settings.global_batch_size of them are an epoch"
        )

    def _hand_out(self) -> tuple[Any] | None:
        """The next micro-batch, in a tuple; None if the generation ended instead."""
        engine = self._engine
        ready: list[Any] = []

        def fetch() -> None:
            engine.settle()
            engine.comm.ready(())  # raises Aborted
            _, state = engine.current()
            span = state.todo[0]
            engine.progress.mark(Phase.COMPUTE, state.step, finished=len(state.held))
            started_ns = time.monotonic_ns()
            with engine.progress.within(Pace.FETCH):
                ready.append(to_device(engine.data.fetch(state.step, span.micro_batch), engine.stack.device))
            tokens, samples = tokens_and_samples(ready[0])
            engine.progress.telemetry.span(
                Spent.FETCH, started_ns, micro_batch=span.micro_batch, amount=tokens, value=samples
            )
            engine.pipeline.restore_statistics(0)
            engine.pipeline.seed_forward(state.step, span.micro_batch)
            engine.pipeline.forwards.before(0)
            self._open = span
            self._handed_out_ns = time.monotonic_ns()
            engine.progress.enter(Pace.USER)

        self._guard(fetch)
        return (ready[0],) if self._open is not None else None

    def take(self) -> None:
        """Make a leaf of the open micro-batch's gradients, and end the step if it was the last one."""
        engine, span = self._engine, self._open
        if span is None:
            raise UsageError("optimizer.step() was called outside the loop over the prepared batches")
        self._open = None
        _, state = engine.current()
        engine.pipeline.forwards.after(0)
        if span not in state.todo:  # a recovery inside the user's turn gave it to another rank
            engine.pipeline.drop_gradients(span)
            return
        state.todo.remove(span)
        engine.pipeline.harvest(state, span, {0: engine.pipeline.take_statistics(0)})
        engine.progress.telemetry.span(Spent.COMPUTE, self._handed_out_ns, micro_batch=span.micro_batch)
        engine.progress.mark(Phase.COMPUTE, state.step, finished=len(state.held))
        self._guard(self._complete_if_done)
        engine.progress.leave()

    def _complete_if_done(self) -> None:
        engine = self._engine
        engine.comm.ready(())  # raises Aborted
        if not engine.current()[1].todo:
            engine.complete()


class ElasticOptimizer(Optimizer):
    """Stands for the user's optimizer in an ordinary loop. `step` acts once the step's micro-batches are done."""

    def __init__(self, optimizer: Optimizer, batches: Batches) -> None:
        # Not Optimizer.__init__: this is a view of the user's optimizer, with the same groups.
        self.__dict__.update(optimizer.__dict__)
        self.__dict__.pop("step", None)  # a scheduler's patch of the user's instance
        self._batches = batches

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "step":
            raise UsageError(
                "the scheduler was built on the prepared optimizer: build it on your own one before, and pass it on: "
                "run.prepare(model, optimizer, dataset, scheduler=scheduler)"
            )
        super().__setattr__(name, value)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take the micro-batch's gradients; update when they were the last of the step."""
        if closure is not None:
            raise UsageError("optimizer.step(closure) is not supported: call loss.backward() and optimizer.step()")
        self._batches.take()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing is left to clear: `step` takes the gradients out of the parameters."""
