"""Lines of history: which records of a version belong to the run that continues.

A version that is computed again has the same bytes, so any record of it will do. Once shards are approximated this no
longer holds: the versions that follow differ from those computed before, and keepers may hold records of both. So each
record names the generation in which it was written, and a fork says from which generation on records count.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple


class Fork(NamedTuple):
    """Another line begins: records of `version` or newer count only if they are of `generation` or newer."""

    version: int
    generation: int


Lines = tuple[Fork, ...]  # ascending, both versions and generations; empty: nothing was ever approximated


def since(lines: Sequence[Fork], version: int) -> int:
    """The generation in which a record of `version` must have been written, or after it."""
    return max((fork.generation for fork in lines if fork.version <= version), default=0)


def of_this_line(lines: Sequence[Fork], step: int) -> bool:
    """Whether `step` is one that was agreed on since the newest fork: what outlived nodes before it is lost."""
    return not lines or step >= lines[-1].version


def forked(lines: Sequence[Fork], version: int, generation: int) -> Lines:
    """The lines when all ranks continue from `version`, in `generation`, with other bytes than before."""
    return (*(fork for fork in lines if fork.version <= version), Fork(version, generation))


def lines_of(raw: Sequence[Sequence[int]]) -> Lines:
    """The lines in a JSON value."""
    return tuple(Fork(*pair) for pair in raw)


def slot_to_write(held: Sequence[tuple[int, int] | None], keep: Collection[int], lines: Sequence[Fork]) -> int:
    """Which slot of a shard's states to write next, of those that hold (version, generation), or nothing.

    The one with the oldest version, but for one of each version in `keep`. A version may be there twice, when it was
    made again after going back. A record of another line counts as nothing.
    """
    versions = [
        (record[0] if record is not None and record[1] >= since(lines, record[0]) else -1, slot)
        for slot, record in enumerate(held)
    ]
    kept = {version: (version, slot) for version, slot in versions if version in keep and version >= 0}
    return min([item for item in versions if item not in kept.values()] or versions)[1]
