"""Warnings about what a script does, which the engine notices in a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from everstep.elastic.contract.membership import Membership
from everstep.elastic.contract.notices import Notice, warn


class Remarks:
    """Makes them on one rank; training continues. `version`: the number of committed steps."""

    def __init__(self, membership: Membership, version: Callable[[], int]) -> None:
        self._membership = membership
        self._version = version
        self._loss_trusted = True  # no warning was given yet

    def partial(self, step: int, partly: Mapping[str, list[int]]) -> None:
        """Every rank's code runs after every step: a change that only some ranks make is lost with them."""
        name, ranks = next(iter(partly.items()))
        text = (
            f"only rank {', '.join(map(str, ranks))} changed {name}; the change counts on all ranks. Make it on every "
            "rank: a worker that takes the place of a lost one has only what its own code and the others' agree on"
        )
        warn(self._membership, Notice.CHANGED_ON_SOME_RANKS, text, step=step)

    def loss(self, loss: float | None, step: int, *, speaks: bool) -> None:
        """Once, when the loss is not finite, if this rank `speaks` for all."""
        if loss is not None and not math.isfinite(loss) and self._loss_trusted and speaks:
            self._loss_trusted = False
            text = (
                f"the loss is {loss}, and so will be the parameters: look at the learning rate and the data, and "
                "resume from an earlier checkpoint"
            )
            warn(self._membership, Notice.LOSS_NOT_FINITE, text, step=step)

    def script(self, notice: Notice, text: str) -> None:
        """Something that the script does in turns or forwards."""
        warn(self._membership, notice, text, rank=self._membership.worker.rank, step=self._version())
