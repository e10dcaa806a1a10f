"""Which slot of a node belongs to which of its ranks: the rank's LOCAL_RANK, log files and GPU.

A node that joins later is assigned whatever ranks are vacant, such as 0 and 3, so a rank does not determine its slot.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class LocalRanks:
    """The slots 0 to `slots` - 1 of one node, assigned to ranks. A rank that is restarted keeps its slot."""

    slots: int
    of: Mapping[int, int] = field(default_factory=dict)  # rank -> slot

    def give(self, starting: Sequence[int], running: Collection[int]) -> LocalRanks:
        """Assign slots to the ranks that start now, next to the `running` ones; all other slots are free.

        Raises ValueError if there are not enough free slots.
        """
        of: dict[int, int] = {}
        if len(starting) < self.slots:  # otherwise the whole node starts: in the order of the ranks, as torchrun does
            of = {rank: slot for rank, slot in self.of.items() if rank in running or rank in starting}
        free = [slot for slot in range(self.slots) if slot not in of.values()]
        new = [rank for rank in sorted(starting) if rank not in of]
        if len(new) > len(free):
            raise ValueError(f"{len(new)} ranks ({new}) are to start in {len(free)} free slots of {self.slots}")
        return replace(self, of={**of, **dict(zip(new, free, strict=False))})

    def __getitem__(self, rank: int) -> int:
        return self.of[rank]

    @property
    def ranks(self) -> dict[int, int]:
        """Slot -> the rank that has it."""
        return {slot: rank for rank, slot in self.of.items()}
