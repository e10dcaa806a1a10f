"""Simulated storage for checkpoints: parts that savers write; a checkpoint is whole when it has every shard."""

from __future__ import annotations

import random
from collections.abc import Mapping

from everstep.elastic.protocol.events import Saved

from .values import ShardState


class Storage:
    """The checkpoints of a job. Some of those that are saved turn out to be damaged when they are read."""

    def __init__(self, shards: int, damaged: float, seed: int) -> None:
        self._shards = shards
        self._damaged = damaged  # probability of damage
        self._random = random.Random(seed)
        self._parts: dict[str, dict[int, ShardState]] = {}
        self._whole: dict[str, Mapping[int, ShardState]] = {}

    def begin_with(self, saved: Saved, states: Mapping[int, ShardState]) -> None:
        """A checkpoint that exists when the job begins, and is intact."""
        self._whole[saved.name] = states

    def put(self, saved: Saved, states: Mapping[int, ShardState]) -> bool:
        """Write a rank's part; whether that makes the checkpoint whole."""
        parts = self._parts.setdefault(saved.name, {})
        for shard, state in states.items():
            if parts.setdefault(shard, state) != state:
                raise AssertionError(f"shard {shard} of {saved.name} is saved in two states")
        if len(parts) < self._shards or saved.name in self._whole:
            return False
        self._whole[saved.name] = parts if self._random.random() >= self._damaged else {}
        return True

    def read(self, name: str) -> Mapping[int, ShardState] | None:
        """The states in a checkpoint; None if it is damaged."""
        return self._whole[name] or None
