"""One rank's view of which versions outlive the loss of nodes: what is begun, what is whole, what a step waits for.

A version is *whole here* when this node's keeper has it and the parity it holds for others. It *outlives nodes* when
all members know that it is whole everywhere, which the agreement of a step tells.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .agreement import Kept


@dataclass
class Protecting:
    """Versions that are being protected. `outlives`: the newest version that outlives nodes, -1 if none."""

    every: int = 1  # a version of how many is protected
    replay: bool = False  # backups protect each version, before its step is agreed on
    generation: int = 0
    nodes: bool = False  # whether there are other nodes to protect from
    begun: list[int] = field(default_factory=list)
    whole: int = -1
    before: int | None = -1  # what was whole in the last generation, and still counts; None: this rank was not in it
    given_up: bool = False  # a version does not get whole: training goes on without

    def enter(self, generation: int, *, nodes: bool, joins: bool) -> None:
        """A new generation: what was under way begins again.

        What was whole here is still good, should all who say so go along (`joins`). Call `saw` first.
        """
        self.before = (self.whole if self.generation else None) if joins else -1
        self.generation = generation
        self.nodes = nodes
        self.begun.clear()
        self.whole = -1
        self.given_up = False

    def begins(self, version: int, *, anyway: bool) -> bool:
        """Whether `version` is one that is to outlive nodes; `anyway`: the first one of a generation is."""
        if self.replay or not self.nodes or not (anyway or version % self.every == 0):
            return False
        if version not in self.begun:
            self.begun.append(version)
        return True

    def saw(self, *answers: tuple[int, int]) -> None:
        """The keeper says which versions are whole here: (generation, version)."""
        for generation, version in answers:
            if generation == self.generation and version > self.whole:
                self.whole, self.given_up = version, False
                self.begun = [begun for begun in self.begun if begun > version]

    def waits(self, step: int) -> bool:
        """Whether `step` must not be agreed on yet: a version before it is being protected and is not whole here.

        So a version that outlives nodes is never given up for one that does not yet.
        """
        return not self.given_up and any(begun < max(1, step) for begun in self.begun)

    @staticmethod
    def lasting(whole: int, version: int, outlives: int) -> int:
        """`whole`, or -1 if workers that are at `version` may have written over it."""
        return whole if whole >= version - 1 or whole <= outlives else -1

    def share(self, step: int, outlives: int, rank: int, every: int) -> Kept:
        """What this rank adds to the agreement of `step`; `every`: the interval it proposes."""
        before = None if self.before is None else self.lasting(self.before, step, outlives)
        return Kept(whole=self.lasting(self.whole, step, outlives), before=before, every=(rank, every))

    def agreed(self, step: int, merged: Kept, outlives: int) -> dict[str, int]:
        """What the members' shares mean: for the agreement, equal on all."""
        if not self.nodes:
            return {"protected": outlives, "every": self.every}
        if self.replay:
            return {"protected": step, "every": self.every}
        before = -1 if merged.before is None else merged.before
        return {"protected": max(outlives, merged.whole, before), "every": merged.every[1]}
