"""The interface of every place from which a shard's state may be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from everstep.checkpointing.memory.record import ShardState


class Found(NamedTuple):
    """A shard's state, as a source holds it. The tensors may share the source's memory until the next one is requested.

    `gradient`, one-dimensional: the state is that of the version before, and one optimizer step with it leads to the
    requested version.
    """

    shard: int
    state: ShardState
    gradient: Tensor | None = None


class ShardSource(Protocol):
    """A place from which shards may be read."""

    def read(self, shards: Sequence[int], version: int) -> Iterator[Found]:
        """The available ones of `shards` at `version`, each once, verified by checksum; missing ones are left out.

        A source of live values blocks until they arrive, and raises Aborted when the generation ends.
        """
        ...
