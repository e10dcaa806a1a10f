"""What every place has in common that a shard's state may be read from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from everstep.checkpointing.memory.record import ShardState


class Found(NamedTuple):
    """A shard's state, as a source has it. The tensors may share the source's memory until the next is taken.

    `gradient`, of one dimension: the state is that of the version before, and one step of the optimizer with it leads
    to the version that was asked for.
    """

    shard: int
    state: ShardState
    gradient: Tensor | None = None


class ShardSource(Protocol):
    """A place that shards may be read from."""

    def read(self, shards: Sequence[int], version: int) -> Iterator[Found]:
        """What there is of `shards` at `version`, each once, checked against its checksum; what is missing is left out.

        A source of live values blocks until they come, and raises Aborted when the generation ends.
        """
        ...
