"""Which of a node's slots each of its ranks has: its LOCAL_RANK, its log files, its GPU.

A node that comes later gets whatever ranks are vacant, 0 and 3 say: a slot cannot be worked out from a rank.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence


class LocalRanks:
    """The slots 0 to `slots` - 1 of one node, given to ranks. A rank that is started again keeps its slot."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._of: dict[int, int] = {}  # rank -> slot

    def give(self, starting: Sequence[int], running: Collection[int]) -> None:
        """Give slots to the ranks that start now, beside those that are `running`; the others' are free.

        Raises ValueError if there are not enough.
        """
        if len(starting) >= self._slots:  # the whole node: in the order of the ranks, as torchrun does
            self._of = {}
        self._of = {rank: slot for rank, slot in self._of.items() if rank in running or rank in starting}
        free = [slot for slot in range(self._slots) if slot not in self._of.values()]
        new = [rank for rank in sorted(starting) if rank not in self._of]
        if len(new) > len(free):
            raise ValueError(f"{len(new)} ranks ({new}) are to start in {len(free)} free slots of {self._slots}")
        self._of |= dict(zip(new, free, strict=False))

    def __getitem__(self, rank: int) -> int:
        return self._of[rank]

    @property
    def ranks(self) -> dict[int, int]:
        """Slot -> the rank that has it."""
        return {slot: rank for rank, slot in self._of.items()}
