"""Simulated storage for checkpoints: parts that savers write; a checkpoint is whole when it has every shard."""

from __future__ import annotations

import enum
import random
from collections.abc import Mapping

from everstep.elastic.protocol.events import Saved

from .values import ShardState


class NoSpace(Exception):
    """The storage is full."""


class Full(enum.Enum):
    """Where a save fails while the storage is full."""

    PART = "part"  # a rank's part does not fit
    MANIFEST = "manifest"  # the parts fit, and the manifest, which commits them, does not


class Storage:
    """The checkpoints of a job. Some of those that are saved turn out to be damaged when they are read."""

    def __init__(self, shards: int, damaged: float, seed: int) -> None:
        self._shards = shards
        self._damaged = damaged  # probability of damage
        self._random = random.Random(seed)
        self.full: Full | None = None
        self.refused = 0  # saves that failed
        self._parts: dict[str, dict[int, ShardState]] = {}
        self._whole: dict[str, Mapping[int, ShardState]] = {}
        self._versions: set[int] = set()  # of those that are whole

    def begin_with(self, saved: Saved, states: Mapping[int, ShardState]) -> None:
        """A checkpoint that exists when the job begins, and is intact."""
        self._whole[saved.name] = states
        self._versions.add(saved.version)

    def put(self, saved: Saved, states: Mapping[int, ShardState]) -> bool:
        """Write a rank's part; whether that makes the checkpoint whole. Raises NoSpace."""
        if self.full is Full.PART:
            self._refuse(f"a part of {saved.name}")
        parts = self._parts.setdefault(saved.name, {})
        for shard, state in states.items():
            if parts.setdefault(shard, state) != state:
                raise AssertionError(f"shard {shard} of {saved.name} is saved in two states")
        if len(parts) < self._shards or saved.name in self._whole:
            return False
        if self.full is Full.MANIFEST:
            self._refuse(f"the manifest of {saved.name}")
        self._versions.add(saved.version)
        self._whole[saved.name] = parts if self._random.random() >= self._damaged else {}
        return True

    def _refuse(self, what: str) -> None:
        self.refused += 1
        raise NoSpace(f"no space for {what}")

    def is_whole(self, name: str) -> bool:
        """Whether a checkpoint is committed."""
        return name in self._whole

    def has(self, version: int) -> bool:
        """Whether a checkpoint of this version is committed."""
        return version in self._versions

    def write_s(self) -> float:
        """How long a rank takes to write its part of the last checkpoint."""
        return self._random.uniform(0.001, 0.05)

    def read(self, name: str) -> Mapping[int, ShardState] | None:
        """The states in a checkpoint; None if it is damaged."""
        return self._whole[name] or None
