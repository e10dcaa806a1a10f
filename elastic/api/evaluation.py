"""`run.evaluate`: the batches of a dataset dealt over the live ranks, each evaluated once, through losses.

A call of all ranks (`calls`) of two exchanges. In the first the ranks say which batches they have results of, and the
others are dealt to them. In the second each gives its results. After a recovery both are made again: survivors keep the
results that they have, and what the lost ranks had is dealt again. Where a sampler chooses the samples, an exchange
before these has all ranks use one choice, which survivors keep, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.stateful import encode
from everstep.elastic.engine.engine import Engine
from everstep.elastic.holding.stack import plain_name
from everstep.elastic.step.devices import generators_kept, seed_generators, to_device
from everstep.elastic.step.evaluation_data import EvaluationData
from everstep.elastic.step.order import derive_seed

from .calls import Calls, Combine
from .full_state import FullState
from .interruptible import Interruptible

CALL = "run.evaluate"
Function = Callable[[Any], Any]


class EvaluationFailed(Exception):
    """The script's function raised for a batch; its own exception is the cause of this one."""


class Evaluation:
    """One evaluation, on one rank."""

    def __init__(
        self,
        engine: Engine,
        parts: Interruptible,
        data: EvaluationData,
        function: Function,
        full: FullState,
        *,
        average: bool,
    ) -> None:
        """With `average`, the moving averages take the place of the parameters' values meanwhile."""
        self._engine = engine
        self._parts = parts
        self._data = data
        self._function = function
        self._full = full
        self._average = average
        self._version = engine.version
        self._drawn = data.draw(self._version) if data.has_choice else []
        self._results: dict[int, Any] = {}  # batch -> its result, of those that were evaluated here

    def run(self, calls: Calls) -> list[Any]:
        """The results of all batches, in their order, on every rank."""
        found: list[Any] = calls.carry_out(CALL, self._attempt)
        return found

    def _attempt(self, exchange: Callable[[Any, Combine], Any]) -> Any:
        self._reach_version()
        if self._data.has_choice:
            here = self._data.chosen is not None
            choice = self._data.chosen if here else self._drawn
            self._data.choose(exchange([here, choice], _choice))
        dealt = exchange([self._data.count, sorted(self._results)], _dealt)
        self._evaluate(dealt[str(self._engine.rank)])
        return exchange({str(number): result for number, result in self._results.items()}, _joined)

    def _reach_version(self) -> None:
        """The version that the script has seen is whole here, and protected from the loss of nodes. Raises Aborted."""
        engine = self._engine
        if engine.version < self._version:  # more was lost than is protected
            self._parts.compute_again()
        engine.pause()
        engine.progress.leave()

    def _evaluate(self, numbers: list[int]) -> None:
        """Evaluate these batches, with the layers of other stages too. Raises Aborted between two of them."""
        if not numbers:
            return
        engine, stack = self._engine, self._engine.stack
        averages = self._full.read(recovers=False)["average"] if self._average else {}
        with contextlib.ExitStack() as meanwhile:
            meanwhile.enter_context(generators_kept())
            meanwhile.enter_context(_for_evaluation(stack.model))
            meanwhile.enter_context(stack.whole(self._full.values))
            meanwhile.enter_context(_in_place(stack.model, averages))
            batches = meanwhile.enter_context(contextlib.closing(self._data.batches(numbers)))
            for number, batch in batches:
                self._results[number] = self._result(number, batch)
                engine.progress.tick()
                engine.comm.ready(())

    def _result(self, number: int, batch: Any) -> Any:
        engine = self._engine
        seed_generators(derive_seed("evaluation", engine.settings.seed, number))
        try:
            result = self._function(to_device(batch, engine.stack.device))
        except Exception as error:
            samples = self._data.indices(number)
            named = f"{samples[0]} to {samples[-1]}" if isinstance(samples, range) else ", ".join(map(str, samples))
            raise EvaluationFailed(
                f"the function of run.evaluate raised {type(error).__name__} for batch {number} (samples {named}): "
                f"{error}"
            ) from error
        return encode(result, f"the result of run.evaluate's function for batch {number}")


@contextlib.contextmanager
def _for_evaluation(model: nn.Module) -> Iterator[None]:
    """No gradients, and all modules in evaluation mode; afterwards each is in the mode in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _in_place(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Put these values in the place of the parameters'; afterwards the parameters have their own again."""
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    replaced = {name: parameter for name, parameter in parameters.items() if name in values}
    kept = [(parameter, parameter.data.clone()) for parameter in replaced.values()]
    for name, parameter in replaced.items():
        parameter.data.copy_(values[name])
    try:
        yield
    finally:
        for parameter, value in kept:
            parameter.data.copy_(value)


def _choice(offered: Mapping[int, Any]) -> list[int]:
    """The choice that ranks use since an earlier attempt; else that of the lowest rank."""
    used = [samples for here, samples in offered.values() if here]
    chosen: list[int] = used[0] if used else offered[min(offered)][1]
    return chosen


def _dealt(held: Mapping[int, Any]) -> dict[str, list[int]]:
    """Rank -> the batches that it is to evaluate: those of which no rank has the result, in turn."""
    first, *others = sorted(held)
    count = held[first][0]
    for rank in others:
        if held[rank][0] != count:
            raise UsageError(
                f"run.evaluate: rank {first} has {count} batches, and rank {rank} {held[rank][0]}: give every rank the "
                "same data"
            )
    done = {number for _, numbers in held.values() for number in numbers}
    left = [number for number in range(count) if number not in done]
    return {str(rank): left[at :: len(held)] for at, rank in enumerate(sorted(held))}


def _joined(tables: Mapping[int, Any]) -> list[Any]:
    """The results in the order of their batches, each of which one rank has."""
    results = {int(number): result for table in tables.values() for number, result in table.items()}
    return [results[number] for number in range(len(results))]
