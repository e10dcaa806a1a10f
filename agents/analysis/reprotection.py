"""How long a job takes to be protected again after it lost nodes, from its event log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Reprotection:
    """The longest time so far from a lost node until a version was protected that was made without it."""

    def __init__(self) -> None:
        self.longest_s = 0.0  # 0: not known
        self._lost_s = 0.0  # when the last node was lost that the job is not protected from yet
        self._resumed = -1  # the step with which the job went on without it; -1: it has not

    def node_lost(self, line: Mapping[str, Any]) -> None:
        self._lost_s, self._resumed = line["at_s"], -1

    def recovered(self, line: Mapping[str, Any]) -> None:
        if self._lost_s and line.get("nodes"):
            self._resumed = line["step"]

    def committed(self, line: Mapping[str, Any]) -> None:
        """A step was committed: the newest protected version may be one that was made after the loss."""
        if self._resumed >= 0 and line.get("protected", -1) > self._resumed:
            self.longest_s = max(self.longest_s, line["at_s"] - self._lost_s)
            self._lost_s, self._resumed = 0.0, -1
