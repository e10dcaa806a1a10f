"""Several optimizers in the user's own loop, such as those of a GAN: which gradients each `step()` of a turn takes.

*Alternating*: a step of the job is a step of one optimizer, and the next step uses the same batch for the next one. A
turn of the loop runs the script's body for one micro-batch, and cannot wait in its middle for the other micro-batches
of the step. So the turns of a step take the gradients of its optimizer alone; when all micro-batches are done and its
parameters have their new values, they are handed out again for the next optimizer. A turn therefore depends on its step
and micro-batch alone, never on which other turns its rank had.

*Simultaneous*: a turn takes the gradients of each optimizer at its `step()`, and all of them step together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.settings import Settings
from everstep.elastic.holding.several_optimizers import AnyOptimizer, Collector, SeveralOptimizers
from everstep.elastic.holding.stack import LayerStack
from everstep.elastic.step.gradients import GradientWatch
from everstep.elastic.step.taking_turns import TakingTurns

KINDS = ("alternating", "simultaneous")


def as_one(models: Any, optimizers: Any, updates: str) -> tuple[Any, AnyOptimizer | Any]:
    """Lists of models and optimizers as one each; others as they are. Raises UsageError."""
    if updates not in KINDS:
        raise UsageError(f"updates must be 'alternating' or 'simultaneous', got {updates!r}")
    if not isinstance(models, list | tuple) and not isinstance(optimizers, list | tuple):
        return models, optimizers
    for what, kind, items in (("models", nn.Module, models), ("optimizers", Optimizer, optimizers)):
        if not isinstance(items, list | tuple) or not items:
            raise UsageError(
                "run.prepare([g, d], [opt_g, opt_d], data) takes a list of models and a list of optimizers: the "
                f"{what} are {_described(items)}"
            )
        for number, item in enumerate(items):
            if not isinstance(item, kind):
                raise UsageError(
                    f"{what}[{number}] of run.prepare must be a torch {kind.__name__}, got {_described(item)}"
                )
            if any(item is other for other in items[:number]):
                raise UsageError(f"{what}[{number}] of run.prepare stands in the list twice")
    whose: dict[int, int] = {}
    for number, optimizer in enumerate(optimizers):
        for parameter in parameters_of(optimizer):
            if whose.setdefault(id(parameter), number) != number:
                raise UsageError(
                    f"optimizers[{whose[id(parameter)]}] and optimizers[{number}] of run.prepare both have a parameter "
                    f"of shape {tuple(parameter.shape)}: give each parameter to one of them"
                )
    return nn.ModuleList(models), SeveralOptimizers(optimizers, alternating=updates == "alternating")


def taking_turns(optimizers: Sequence[Optimizer], updates: str, every: Sequence[int] | None) -> TakingTurns:
    """How the optimizers take turns on each batch. Raises UsageError."""
    if every is None:
        each = (1,) * (len(optimizers) if updates == "alternating" else 1)
        return TakingTurns(each, collects=any(isinstance(one, Collector) for one in optimizers))
    users = [one for one in optimizers if not isinstance(one, Collector)]
    if len(users) != len(optimizers) or len(users) < 2 or updates != "alternating":
        raise UsageError(f"every={every!r} is for several optimizers that take turns, updates='alternating'")
    counts: list[Any] = list(every) if isinstance(every, list | tuple) else []
    fits = all(isinstance(count, int) and not isinstance(count, bool) and count > 0 for count in counts)
    if len(counts) != len(users) or not fits or min(counts) != 1:
        raise UsageError(
            f"every={every!r}: it has a whole number for each of the {len(users)} optimizers, in every how many "
            "batches it steps, and one of them steps in each batch (1)"
        )
    return TakingTurns(tuple(counts))


def check_several(settings: Settings, turns: TakingTurns, accumulation: int, *, what: str) -> None:
    """Raise UsageError for what a loop with several optimizers cannot have. `what`: has them, in words."""
    for given, other in (
        (accumulation > 1, f"accumulation={accumulation} (leave it out: the runtime accumulates)"),
        (settings.loss_reduction == "tokens", 'loss_reduction="tokens"'),
    ):
        if given:
            raise UsageError(f"run.prepare with {what} does not take {other}")
    if not settings.epochs and settings.steps % turns.period_steps:
        raise UsageError(
            f"steps={settings.steps} must be a multiple of {turns.period_steps}: with {what} that is how many steps of "
            f"the job it takes for {turns.period} batches"
        )


def _described(item: Any) -> str:
    return "an empty list" if isinstance(item, list | tuple) and not item else f"a {type(item).__name__}"


def parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """The parameters of all groups."""
    for group in optimizer.param_groups:
        yield from group["params"]


class Updates:
    """Which calls of `step()` a turn has had, and what they took. The optimizers' numbers are their places."""

    def __init__(
        self,
        stack: LayerStack,
        optimizers: Sequence[Optimizer],
        gradients: GradientWatch,
        due: Callable[[int], tuple[tuple[int, ...], int]] | None,
    ) -> None:
        """`due`: where they alternate, the optimizers of a step's batch, and which of its steps it is."""
        users = [number for number, one in enumerate(optimizers) if not isinstance(one, Collector)]
        self._calls = [
            f"optimizers[{users.index(number)}].step()" if number in users else "run.gather_batch()"
            for number in range(len(optimizers))
        ]
        self.several = len(optimizers) > 1
        self._parameters = [list(parameters_of(optimizer)) for optimizer in optimizers]
        self._all = [held.tensor for held in stack.layers[0].parameters if held.rule is None]
        self._gradients = gradients
        self._due = due
        self._orders: dict[tuple[int, ...], list[int]] = {}  # of the calls in the turns before, by the optimizers due
        self._wanted: tuple[int, ...] = ()  # the optimizers whose calls this turn has
        self._called: list[int] = []  # in this turn
        self._taken: list[tuple[Tensor, Tensor | None, bool]] = []  # parameter, its gradient, whether it requires one
        buffers = {id(held.tensor): held.tensor for held in stack.layers[0].parameters if held.rule is not None}
        self._buffers = [
            (module, name, buffer)
            for module in stack.model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and id(buffer) in buffers
        ]
        self._lent = False

    def begin(self, step: int) -> None:
        """A turn of a step begins."""
        self._called, self._taken = [], []
        self._wanted = self._due(step)[0] if self._due is not None else tuple(range(len(self._parameters)))

    def is_due(self, number: int) -> bool:
        """Whether an optimizer steps in the batch of the turn."""
        return number in self._wanted

    def step(self, number: int, step: int) -> bool:
        """`optimizers[number].step()` is called in a turn of `step`. Returns whether the turn's gradients are complete.

        They are those of the parameters. Raises UsageError.
        """
        if not self.several:
            return True
        if number in self._called:
            raise UsageError(
                f"{self._calls[number]} was called twice in a turn of the loop: each turn has one call of each"
            )
        if number not in self._wanted:
            self._drop(self._parameters[number])
            return False
        place = len(self._called)
        self._called.append(number)
        if self._due is None:
            return self._take(number)
        order = self._orders.setdefault(self._wanted, [])
        if order[place : place + 1] not in ([], [number]):
            raise UsageError(
                f"{self._calls[number]} came at place {place} of a turn, where {self._calls[order[place]]} was "
                "in the turns before: call them in the same order in each turn"
            )
        order[place:] = order[place:] or [number]
        if place != self.turn_of(step):
            self._drop(self._parameters[number])
            return False
        own = {id(parameter) for parameter in self._parameters[number]}
        self._drop(parameter for parameter in self._all if id(parameter) not in own)
        return True

    def _take(self, number: int) -> bool:
        """Take the gradients of an optimizer; with the last of them, give the parameters all that were taken."""
        parameters = self._parameters[number]
        self._gradients.check(parameters)
        self._taken += [(parameter, parameter.grad, parameter.requires_grad) for parameter in parameters]
        self._drop(parameters)
        if len(self._called) < len(self._parameters):
            return False
        self._drop(self._all)
        self._gradients.forget()
        for parameter, gradient, required in self._taken:
            parameter.grad = gradient
            parameter.requires_grad_(required)
        return True

    def _drop(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            parameter.grad = None

    def clear(self, number: int) -> None:
        """`optimizers[number].zero_grad()`: what other losses have left in its parameters."""
        if self.several:
            self._drop(self._parameters[number])

    def lend(self) -> None:
        """The turn goes on, and its gradients are taken: what its forwards make of buffers does not count."""
        if self.several and len(self._called) < len(self._wanted):
            self._lent = True
            for module, name, buffer in self._buffers:
                module._buffers[name] = buffer.detach().clone()

    def end(self) -> None:
        """The turn is over, or left."""
        if self._lent:
            self._lent = False
            for module, name, buffer in self._buffers:
                module._buffers[name] = buffer

    def check_called(self) -> None:
        """Raise UsageError if an optimizer was not stepped in the turn that is over."""
        missing = [number for number in self._wanted if number not in self._called]
        if self.several and missing:
            raise UsageError(
                f"{self._calls[missing[0]]} was not called in a turn of the loop: each turn has one call of each, or "
                "run.skip() to leave the micro-batch out"
            )

    def turn_of(self, step: int) -> int:
        """Which of the calls in a turn has the step, where they take turns."""
        return self._due(step)[1] if self._due is not None else 0

    def restores_buffers(self, step: int) -> bool:
        """Whether what a step's forwards made of buffers is dropped: those of the turn's last optimizer count."""
        return self.several and self._due is not None and self.turn_of(step) != len(self._wanted) - 1
