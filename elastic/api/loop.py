"""The user's own loop: `Batches` hands out micro-batches, `ElasticOptimizer.step` takes their gradients."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from opcode import opmap
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.notices import Notice, warn
from everstep.elastic.contract.progress import StepPhase
from everstep.elastic.contract.telemetry import Spent
from everstep.elastic.engine.engine import Engine
from everstep.elastic.protocol.liveness import Pace
from everstep.elastic.step.devices import to_device
from everstep.elastic.step.gradients import GradientWatch
from everstep.elastic.step.pipeline import tokens_and_samples
from everstep.elastic.step.reduction import whole_count
from everstep.elastic.step.repetition import copied
from everstep.elastic.step.steps import StepState
from everstep.resharding.work import Leg

from .carried import Carried
from .course import Course
from .gathering import BatchEmbeddings
from .interruptible import Interruptible
from .loop_scaler import LoopScaler
from .other_loaders import OtherLoaders
from .schedulers import Schedulers
from .updates import Updates


class _NoLength(UsageError, TypeError):
    """What Python expects of an iterable without a length, in the words of the user's error."""


@dataclass(frozen=True)
class Turns:
    """What has to be in a turn of the user's loop.

    `accumulates`: a turn may end without `optimizer.step()`, since its gradient is accumulated with those that follow.
    """

    gradients: GradientWatch
    schedulers: Schedulers
    scaler: LoopScaler | None
    updates: Updates
    accumulates: bool
    embeddings: BatchEmbeddings | None = None


@dataclass
class _Again:
    """A micro-batch that is due to be handed out a second time, and the script's variables in front of its turn."""

    step: int
    span: Leg
    batch: Any
    carried: Carried
    changed: Sequence[str] = ()  # variables, in its turn


class Batches:
    """Iterates over this rank's micro-batches until the last step is committed."""

    def __init__(
        self,
        engine: Engine,
        turns: Turns,
        parts: Interruptible,
        course: Course,
        others: OtherLoaders,
    ) -> None:
        self._engine = engine
        self._turns = turns
        self._gradients = turns.gradients
        self._updates = turns.updates
        self._parts = parts
        self.course = course
        self._others = others
        self._passes = 0  # of loops over the batches that have begun
        self._by_next = False  # the script takes the batches of the present one by next()
        self._turn = -1  # the step of the last micro-batch that was handed out; -1: nothing to check of it
        self._open: Leg | None = None  # handed out, gradient not yet collected
        self._skipped = False  # the micro-batch last handed out was
        self._stepped = False  # optimizer.step() was called for it
        self._tokens: int | None = None  # in it, if the script counts them
        self._version = 0  # when it was handed out
        self._handed_out_ns = 0
        self._again: _Again | None = None  # what is handed out a second time
        self._repeats = False  # the micro-batch last handed out was handed out before

    def __iter__(self) -> Iterator[Any]:
        with self._parts.refusing():
            self._parts.check()
            self.course.begin()
            self._note_pass()
            self.course.begin_batches()
            yield from self._batches()

    def _batches(self) -> Iterator[Any]:
        self._turns.schedulers.enter_batches()
        try:
            yield from self._micro_batches()
        except GeneratorExit:
            self._updates.end()
            self._show_all()  # the step that the last turn has ended
            self.course.pass_by()
            self.leave_last_turn()
            self.course.end_batches()
            raise
        finally:
            self._turns.schedulers.leave_batches()

    def _micro_batches(self) -> Iterator[Any]:
        engine, parts, course = self._engine, self._parts, self.course
        while True:
            # The turn before this one first: what it left is part of the state that all below decides on, or switches.
            self._end_turn()
            self._show_all()
            course.pass_by()
            engine.user_loop.compute()
            if course.epoch_over():
                # No loop runs behind the batches that could compute steps again after a loss.
                parts.do(engine.pause)
                if course.epoch_over():  # no recovery has gone back
                    course.share_last_turn()
                    course.end_epoch()
                    return
            elif engine.switch is not None:
                course.go_on()
                parts.switch()
            elif course.stops():
                return
            elif engine.ended():
                parts.do(engine.conclude)
                if engine.ended() and engine.switch is None:
                    course.share_last_turn()
                    course.end_batches()
                    return
            elif engine.current()[1].todo:
                course.go_on()  # before anything is computed: a newcomer's first turn begins with the same states
                batch = self._hand_out()
                if batch is not None:
                    with self._others.turn():
                        yield batch[0]
            else:
                course.go_on()
                parts.do(engine.complete)

    def _note_pass(self) -> None:
        """Warn of a loop over epochs that is the script's own: its first turn has the batches of all steps."""
        self._passes += 1
        self._by_next = not _in_for()
        if self._passes == 2 and self.course.epoch is None and self._engine.ended():
            self._warn(
                Notice.LOOP_WITHOUT_BATCHES,
                "the loop over the prepared batches began again, and has none: the first one had those of all steps. "
                "For a loop over epochs around it: for epoch in run.epochs(), in a job with epochs=",
            )

    def finish(self) -> None:
        """The script has ended."""
        engine, steps = self._engine, self._engine.settings.steps
        if self._by_next and not engine.ended() and not engine.stop_request.agreed(engine.agreement):
            self._warn(
                Notice.BATCHES_LEFT,
                f"the script has ended after {engine.version} of {steps} steps, and takes batches by next(): each is a "
                "micro-batch, and how many a step has on a rank changes with the number of ranks. To train all steps: "
                "for batch in batches, or while run.step < run.settings.steps",
            )
        self.leave_last_turn()

    def _warn(self, notice: Notice, text: str) -> None:
        warn(self._engine.membership, notice, text, rank=self._engine.rank, step=self._engine.version)

    def leave_last_turn(self) -> None:
        """The script leaves the loop by itself, or has left it without its end."""
        if self._turn >= 0:
            self._engine.user_loop.leave_turn(self._engine.version)
        self.course.leave_last_turn()

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
        """Batches of an epoch: its steps, unless several optimizers take turns on each batch."""
        if self._engine.data.order.by_epoch:
            return self._engine.data.order.epoch_batches
        raise _NoLength(
            "len(batches): how many micro-batches a rank computes changes with the membership; the job has run.step of "
            "run.settings.steps steps. With epochs= in place of steps=, it is the number of steps of an epoch"
        )

    def _end_turn(self) -> None:
        """The user's code requests the next micro-batch, so it has finished the last one."""
        self._parts.check()
        if self._turn >= 0:
            self._engine.user_loop.leave_turn(self._engine.version)
        self._updates.end()
        if self._turn >= 0 and not self._skipped:
            self._updates.check_called()
        if self._open is not None and self._turns.accumulates:
            if not self._gradients.found:
                raise UsageError(
                    "a turn of the loop ended without backward(): call it in each one; optimizer.step() may wait for "
                    "every accumulation-th. To leave a micro-batch out, call run.skip(), then continue"
                )
            self._end_micro_batch("the next micro-batch")
        elif self._open is not None:
            raise UsageError(
                "optimizer.step() was not called for the last micro-batch: call it once for each; gradients are "
                "accumulated over the step by the runtime. To leave a micro-batch out, call run.skip(), then continue"
            )
        if self._turn >= 0 and not self._skipped and (self._stepped or not self._turns.accumulates):
            for rate in self._turns.schedulers.left_in_loop:
                rate.check_called(self._turn)
        self._turn = -1

    def _show_all(self) -> None:
        """Tell the user's functions of the steps that were committed since the last turn."""
        while self._engine.user_loop.unseen:
            self.course.show()

    def _hand_out(self) -> tuple[Any] | None:
        """The next micro-batch, in a tuple; None if the generation ended instead."""
        engine = self._engine
        ready: list[Any] = []

        def fetch() -> None:
            engine.settle()
            engine.comm.ready(())  # raises Aborted
            _, state = engine.current()
            again = self._again
            if again is not None and (again.step != state.step or again.span in state.todo):
                again = None  # a recovery came in between
            self._repeats = again is not None
            span = again.span if again is not None else state.todo[0]
            engine.progress.mark(StepPhase.COMPUTE, state.step, finished=len(state.held))
            started_ns = time.monotonic_ns()
            if again is not None:
                found, again.changed = again.batch, again.carried.changed()
            else:
                with engine.progress.within(Pace.FETCH):
                    found = engine.fetch(state.step, span.micro_batch)
                self._again = self._due_again(state, span, found)
                tokens, samples = tokens_and_samples(found)
                engine.progress.telemetry.span(
                    Spent.FETCH, started_ns, micro_batch=span.micro_batch, amount=tokens, value=samples
                )
            ready.append(to_device(found, engine.stack.device))
            engine.pipeline.restore_statistics(0)
            engine.pipeline.seed_forward(engine.data.order.batch_of(state.step), span.micro_batch)
            engine.pipeline.forwards.before(0)
            self._open, self._turn, self._skipped, self._stepped = span, state.step, False, False
            self._tokens, self._version = None, engine.version
            engine.stream_states.enter(state.step, span.micro_batch)
            self._gradients.begin(state.step, first=not state.held)
            self._updates.begin(state.step)
            if not self._updates.several:  # else a parameter gets gradients that are not its optimizer's, too
                engine.pipeline.begin_backward(state, span)
            if self._turns.scaler is not None:
                self._turns.scaler.begin_turn()
            self._handed_out_ns = time.monotonic_ns()
            engine.progress.enter(Pace.USER)

        self._parts.do(fetch)
        return (ready[0],) if self._open is not None else None

    def _due_again(self, state: StepState, span: Leg, batch: Any) -> _Again | None:
        """The rank's first micro-batch of a step, if it is to have a second turn, ahead of the others."""
        engine = self._engine
        due = engine.pipeline.repetition.is_due(state.step)
        if not due or self._updates.several or state.held or len(state.todo) < 2 or (kept := copied(batch)) is None:
            return None
        return _Again(state.step, span, kept, Carried({id(tensor) for tensor in engine.stack.model.parameters()}))

    def take(self, number: int) -> None:
        """Make a leaf of the open micro-batch's gradients, and end the step if it was the last one.

        `number`: of the optimizer whose `step()` was called. Where there are several, one call of the turn does that.
        """
        if self._turn >= 0 and not self._skipped and not self._updates.step(number, self._turn):
            return
        self._stepped = True
        self._end_micro_batch("optimizer.step()")
        self._updates.lend()

    def gather(self, own: Tensor) -> Tensor:
        """The embeddings of the whole batch, with the gradient of the open micro-batch's own. Raises UsageError."""
        embeddings, span = self._turns.embeddings, self._open
        if embeddings is None:
            raise UsageError(
                "run.gather_batch(embeddings): say how many numbers a sample has there, "
                "run.prepare(..., embedding_size=128)"
            )
        if span is None:
            raise UsageError(
                "run.gather_batch(embeddings): call it once in each turn of the loop, before optimizer.step()"
            )
        embeddings.give(own, span.micro_batch)
        whole = embeddings.whole(own, span.micro_batch, given=not self._collects(self._turn))
        self.take(0)
        return whole

    @property
    def is_collecting(self) -> bool:
        """Whether the present turn gives its embeddings, and the loss in it is not yet that of the batch."""
        return self._turn >= 0 and self._collects(self._turn)

    def is_due(self, optimizer: object) -> bool:
        """Whether an optimizer that `prepare` returned steps in the batch of the present turn. Raises UsageError."""
        if not isinstance(optimizer, ElasticOptimizer):
            raise UsageError(f"run.is_due(optimizer) takes what run.prepare returned, got a {type(optimizer).__name__}")
        return self._updates.is_due(optimizer.number)

    def _collects(self, step: int) -> bool:
        """Whether a step puts embeddings together: the first one of each batch, whose turns are over halfway."""
        return self._engine.data.order.collects(step)

    def count_tokens(self, count: Any) -> None:
        """The open micro-batch has so many tokens more."""
        if not self._engine.reduction.counts_tokens:
            raise UsageError(
                "run.count_tokens(n) is for losses that are sums over tokens: give the decorator "
                'loss_reduction="tokens"'
            )
        if self._open is None:
            raise UsageError("run.count_tokens(n): call it in a turn of the loop, before optimizer.step()")
        self._tokens = (self._tokens or 0) + whole_count(count, "run.count_tokens(n)")

    @property
    def is_step_end(self) -> bool:
        """Whether the present turn ends a step here: its micro-batch is the last one, or the step is committed."""
        if self._open is None:
            return self._engine.version > self._version
        return all(span == self._open for span in self._engine.current()[1].todo)

    def skip(self) -> None:
        """Leave the open micro-batch out: its leaf is zero, and the batch-norm statistics stay as they were."""
        if self._updates.several and self._stepped and not self._skipped:
            self._skipped = True  # its gradients are taken, and the rest of the turn has no effect
            return
        self._end_micro_batch("run.skip()")

    def _end_micro_batch(self, call: str) -> None:
        with self._parts.refusing():
            self._take_micro_batch(call)

    def _take_micro_batch(self, call: str) -> None:
        engine, span = self._engine, self._open
        if span is None and self._skipped:
            raise UsageError(f"{call} was called behind run.skip(): after it, continue with the next micro-batch")
        if span is None:
            raise UsageError(
                f"{call} was called outside the loop over the prepared batches: loop over what "
                "run.prepare returned in place of the DataLoader"
            )
        self._open, self._skipped = None, call == "run.skip()"
        engine.stream_states.leave()
        _, state = engine.current()
        engine.pipeline.forwards.after(0)
        again, self._again = self._again, None
        if again is not None and self._repeats and not self._skipped and state.step == self._turn:
            engine.pipeline.repetition.compare(again.changed)
        # This was its second turn, or a recovery inside the turn gave it to another rank.
        if span not in state.todo or state.step != self._turn:
            engine.pipeline.drop_gradients(span)
            self._gradients.forget()
            self._complete_what_is_done()
            return
        if self._skipped:
            engine.pipeline.drop_gradients(span)
            engine.pipeline.restore_statistics(0)
        else:
            self._gradients.check(held.tensor for held in engine.stack.layers[0].parameters)
            if again is not None and len(state.todo) > 1:
                engine.pipeline.repetition.remember()
                self._again = again
            if self._updates.restores_buffers(state.step):
                engine.pipeline.restore_statistics(0)
            if self._turns.scaler is not None and not self._collects(state.step):
                self._turns.scaler.check_called(state.step)
            if engine.reduction.counts_tokens and self._tokens is None:
                raise UsageError(
                    'loss_reduction="tokens": call run.count_tokens(n), with the number of tokens that the loss is a '
                    "sum over, before optimizer.step()"
                )
            state.tokens[span.micro_batch] = self._tokens or 0
        if (self._stepped or not self._turns.accumulates) and not self._collects(state.step):
            engine.adjustments.notice(state.step)
        engine.pipeline.harvest(state, span, {0: engine.pipeline.take_statistics(0, span.micro_batch, state.size)})
        engine.progress.telemetry.span(Spent.COMPUTE, self._handed_out_ns, micro_batch=span.micro_batch)
        engine.progress.mark(StepPhase.COMPUTE, state.step, finished=len(state.held))
        self._complete_what_is_done()

    def _complete_what_is_done(self) -> None:
        """Commit the step, if this rank's part of it is done: so that the user's turn that ended it sees it committed.

        A recovery on the way is followed by another attempt, unless it leaves work to this rank, or goes back.
        """
        engine, version = self._engine, self._engine.version
        while engine.version == version and not engine.current()[1].todo and not engine.ended():
            self._parts.do(self._complete)
        engine.progress.leave()

    def _complete(self) -> None:
        self._engine.comm.ready(())  # raises Aborted
        self._engine.complete()


def _in_for() -> bool:
    """Whether the code that asks for a batch is in a `for` statement."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith("everstep."):
        frame = frame.f_back
    return frame.f_lasti < 0 or frame.f_code.co_code[frame.f_lasti] == opmap["FOR_ITER"]


class ElasticOptimizer(Optimizer):
    """Replaces the user's optimizer in an ordinary loop. `step` acts once the step's micro-batches are done."""

    _step_supports_amp_scaling = True  # so that a GradScaler calls `step` in any case, and can be named

    def __init__(self, optimizer: Optimizer, batches: Batches, updates: Updates, number: int) -> None:
        # Not Optimizer.__init__: this is a view of the user's optimizer, with the same groups and hooks.
        self.__dict__.update(optimizer.__dict__)
        self.__dict__.pop("step", None)  # a scheduler's patch of the user's instance
        self._batches = batches
        self._updates = updates
        self.number = number

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take the micro-batch's gradients; update when they were the last of the step."""
        if closure is not None:
            raise UsageError("optimizer.step(closure) is not supported: call loss.backward() and optimizer.step()")
        if "found_inf" in self.__dict__:
            raise UsageError(
                "scaler.step(optimizer): this GradScaler was not handed over, and would adapt its scale to the "
                "micro-batches that this rank happens to have: run.prepare(..., scaler=scaler)"
            )
        self._batches.take(self.number)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing is left to clear, but by the losses of other optimizers: `step` takes the gradients out."""
        self._updates.clear(self.number)
