"""Which versions' parity a node's keeper makes, which it holds on to, and which it reports as whole.

A version outlives nodes once it is whole at all keepers. Keepers are at most one version apart there: a step is agreed
on only when the version before it is whole everywhere. So when a node is lost, the newest version that is whole at all
others may be the last but one of a keeper that was faster, and none that all members know of yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field

NOTHING = (0, -1)
KEPT_WHOLE = 2  # versions


@dataclass
class ParityVersions:
    """The versions at one keeper. `complete`, `before`: (generation, version), the newest that is whole here.

    In the present generation (version -1: none yet), and in the last one that had any.
    """

    generation: int = 0
    line: int = 0  # the generation in which this line of history began
    complete: tuple[int, int] = NOTHING
    before: tuple[int, int] = NOTHING
    wanted: list[int] = field(default_factory=list)  # to be encoded, oldest first
    _protected: int = -1  # the newest version of which all members know that it outlives nodes
    _whole: list[int] = field(default_factory=list)  # the last ones, in the order in which they became whole

    def enter(self, generation: int, line: int) -> None:
        """Enter a newer generation: requests of the last one are dropped, and workers repeat them."""
        self.wanted.clear()
        if line > self.line:  # nothing that was whole is of this line of history
            self._protected, self.complete, self._whole = -1, NOTHING, []
            self.before = NOTHING
        if self.complete[1] >= 0:
            self.before = self.complete
        self.generation, self.line, self.complete = generation, line, (generation, -1)

    def want(self, version: int, protected: int) -> None:
        """Workers here have sealed `version`; all members know that `protected` outlives nodes."""
        self._protected = max(self._protected, protected)
        if version not in self.wanted and self.complete != (self.generation, version):
            self.wanted.append(version)

    def kept(self) -> set[int]:
        """The versions whose parity is not dropped."""
        return {self._protected, *(one for one in self._whole if one > self._protected), *self.wanted}

    def is_over(self, generation: int) -> bool:
        """Whether a version wanted in a generation is obsolete: another began, or two newer versions are wanted."""
        return self.generation != generation or len(self.wanted) > 2

    def done(self, generation: int, version: int, *, whole: bool) -> bool:
        """A version that was wanted in a generation is whole here, or was given up. Returns whether it is whole."""
        if version not in self.wanted or self.generation != generation:
            return False
        self.wanted.remove(version)
        if whole:
            self.complete = (generation, max(version, self.complete[1]))
            self._whole = [*(one for one in self._whole if one != version), version][-KEPT_WHOLE:]
        return whole
