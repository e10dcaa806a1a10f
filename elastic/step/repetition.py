"""Notices whether a micro-batch, computed a second time, has another gradient.

Which rank computes which micro-batches, and after which others, depends on the number of ranks and on losses. So the
gradient of a micro-batch has to be a function of the parameters, its samples and the generators that are seeded for it,
and not of what the script carries from one turn of its loop to the next: a count of turns, a moving average, a queue, a
teacher that follows, a generator of its own. Nothing in the code tells those apart from what is only logged. So, where
that is asked for, each rank computes its first micro-batch of some steps twice, and compares the gradients; the second
ones are dropped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

from everstep.elastic.holding.stack import LayerStack
from everstep.elastic.holding.watch import content_of

NAMED = 6  # variables in the warning


class Repetition:
    """One rank's comparison of the gradients of a micro-batch. `warn` is called once at most."""

    def __init__(self, stack: LayerStack, warn: Callable[[str], None]) -> None:
        self._stack = stack
        self._warn = warn
        self._found: list[int | None] | None = None  # hashes of the gradients, the first time
        self._warned = False
        self._every = 0

    def repeat(self, every: int) -> None:
        """Compare in steps that are so many apart; 0: in none."""
        self._every = every

    def is_due(self, step: int) -> bool:
        """Not in the first step, in which a script may count what it does only once."""
        return not self._warned and self._every > 0 and step > 0 and step % self._every == 0

    def remember(self) -> None:
        """The first gradients of a micro-batch are in the parameters."""
        self._found = self._gradients()

    def compare(self, variables: Collection[str] = ()) -> None:
        """The second ones are: warn if they differ. `variables`: of the script, which have changed in between."""
        found, self._found = self._found, None
        if found is None or self._gradients() == found:
            return
        self._warned = True
        shown = ", ".join(list(variables)[:NAMED])
        changed = f" (variables that changed meanwhile: {shown})" if shown else ""
        self._warn(
            f"a micro-batch that was computed twice has another gradient the second time{changed}: it depends on what "
            "those before it on this rank have left, which the number of ranks and losses decide. Work it out from "
            "run.step, keep it in run.state and change it in a function of run.on_step, or keep it in run.stream_state "
            "or in a buffer with a rule; draw from the global generators, which are seeded, and use deterministic "
            "kernels"
        )

    def _gradients(self) -> list[int | None]:
        held = [held for number in self._stack.held for held in self._stack.layers[number].parameters]
        gradients = [one.tensor.grad for one in held if one.rule is None]
        return [None if gradient is None else content_of(gradient.to_dense()) for gradient in gradients]


def copied(batch: Any) -> Any:
    """A copy of a batch, which the script may change; None if it cannot be copied."""
    try:
        return copy.deepcopy(batch)
    except Exception:  # what a user's object raises: such a micro-batch is not repeated
        return None
