"""Where the user's code is on one rank: the steps that it has seen, and the committed steps that it has yet to see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """A committed step: its index, its global loss (None where the user computes it), the gradient's norm."""

    index: int
    loss: float | None
    gradient_norm: float | None


class UserLoop:
    """The user's loop on one rank. Each committed step is shown to the user's code once.

    `begun`: the loop has begun. `turn`: the step that the user's code is at, None between two steps.
    `unseen`: the steps to show, oldest first. `turned`: in the user's own loop, the version that the last turn left.
    """

    def __init__(self) -> None:
        self.begun = False
        self.turn: Step | None = None
        self.unseen: list[Step] = []
        self.turned = -1
        self._unturned = 0  # on a rank that joined: of the unseen steps, those whose turn has not ended on other ranks
        self._computes = False  # the user's own loop has asked for its first micro-batch
        self._newest = -1  # the last step that was shown, or is in `unseen`

    def begin(self) -> None:
        """The loop begins."""
        self.begun = True

    def compute(self) -> None:
        """The user's own loop asks for a micro-batch."""
        self._computes = True

    def knows(self, step: int) -> bool:
        """Whether `step` was shown to the user's code, or waits to be."""
        return step <= self._newest

    def committed(self, step: Step) -> None:
        """A step is committed that the user's code does not know yet."""
        self.unseen.append(step)
        self._newest = step.index

    def show(self) -> Step:
        """The next unseen step: the user's code is at it until `end_turn`."""
        self.turn = self.unseen.pop(0)
        return self.turn

    def end_turn(self) -> None:
        """The user's code has done what it does after a step."""
        self.turn = None

    def leave_turn(self, version: int) -> None:
        """A turn of the user's own loop is over, at this version."""
        self.turned = version

    def go_back(self, version: int) -> None:
        """Turns behind `version` are repeated."""
        self.turned = min(self.turned, version)

    def join(self, unseen: Sequence[Step], *, open_turn: bool) -> None:
        """This rank joins: its code has these steps to see. `open_turn`: their turn has not ended on other ranks."""
        self.unseen = list(unseen)
        self._unturned = len(unseen) if open_turn else 0

    def joined(self, version: int) -> None:
        """This rank is at the position of the job, `version`: of the steps before, it is shown the unseen ones only."""
        self._newest = max(self._newest, version - 1)

    def seen(self, version: int, *, loops: bool) -> int:
        """Of `version` committed steps, how many a script that joins its own loop (`loops`) finds done."""
        return version - (self._unturned if loops and not self._computes else 0)
