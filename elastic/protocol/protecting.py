"""One rank's view of which versions survive the loss of nodes: which are begun, which are whole, what a step waits for.

A version is *whole here* when this node's keeper holds it and the parity that the node holds for others. It *outlives
nodes* when all members know that it is whole everywhere, which they learn by the agreement of a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .agreement import Kept


@dataclass
class Protecting:
    """The versions that are being protected. `outlives`: the newest version that survives lost nodes, -1 if none."""

    every: int = 1  # the interval of protected versions, in steps
    replay: bool = False  # backups protect each version, before its step is agreed on
    generation: int = 0
    nodes: bool = False  # whether the job has other nodes
    begun: list[int] = field(default_factory=list)
    whole: int = -1
    before: int | None = -1  # whole in the last generation and still valid; None: this rank was not a member
    given_up: bool = False  # a version does not become whole: training continues without it

    def enter(self, generation: int, *, nodes: bool, joins: bool) -> None:
        """Enter a new generation: protection that was in progress begins again.

        What was whole here stays valid if every member reports so (`joins`). Call `saw` first.
        """
        self.before = (self.whole if self.generation else None) if joins else -1
        self.generation = generation
        self.nodes = nodes
        self.begun.clear()
        self.whole = -1
        self.given_up = False

    def adopt(self, every: int) -> None:
        """The members agreed on an interval."""
        self.every = every

    def give_up(self) -> None:
        """Training continues without the version that does not become whole."""
        self.given_up = True

    def begins(self, version: int, *, anyway: bool) -> bool:
        """Whether `version` is to be protected; `anyway`: the first version of a generation always is."""
        if self.replay or not self.nodes or not (anyway or version % self.every == 0):
            return False
        if version not in self.begun:
            self.begun.append(version)
        return True

    def saw(self, *answers: tuple[int, int]) -> None:
        """The keeper reports which versions are whole here: (generation, version)."""
        for generation, version in answers:
            if generation == self.generation and version > self.whole:
                self.whole, self.given_up = version, False
                self.begun = [begun for begun in self.begun if begun > version]

    def waits(self, step: int) -> bool:
        """Whether `step` must not be agreed on yet, because the protection of an earlier version is not whole here.

        So a protected version is never overwritten for the sake of one that is not protected yet.
        """
        return not self.given_up and any(begun < max(1, step) for begun in self.begun)

    @staticmethod
    def lasting(whole: int, version: int, outlives: int) -> int:
        """`whole`, or -1 if workers at `version` may have overwritten it."""
        return whole if whole >= version - 1 or whole <= outlives else -1

    def share(self, step: int, outlives: int, rank: int, every: int) -> Kept:
        """This rank's contribution to the agreement of `step`; `every`: the interval that it proposes."""
        before = None if self.before is None else self.lasting(self.before, step, outlives)
        return Kept(whole=self.lasting(self.whole, step, outlives), before=before, every=(rank, every))

    def agreed(self, step: int, merged: Kept, outlives: int) -> dict[str, Any]:
        """The meaning of the members' merged shares: for the agreement, equal on all ranks."""
        if not self.nodes:
            return {"protected": outlives, "every": self.every}
        if self.replay:
            return {"protected": step, "every": self.every}
        before = -1 if merged.before is None else merged.before
        return {"protected": max(outlives, merged.whole, before), "every": merged.every[1]}
