"""Data order as a function: the samples of micro-batch (step, micro-batch), with no state to save.

Position p of the run (p = step * batch + offset) is sample `permutation(epoch)[p mod n]` of epoch p // n, so that
every sample is used exactly once an epoch through any history of failures. With `by_epoch` each epoch begins with a
batch of its own: the samples that do not fill its last batch are left out, or it is padded from the epoch's first, or
it is shorter: then its micro-batches are filled in their order, and the last ones may have no samples.
The permutation is a keyed bijection (a four-round Feistel network, iterated until the value is below n; Black and
Rogaway, 2002), so no list is stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from .taking_turns import ONE_EACH, TakingTurns

_ROUNDS = 4


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any coordinates, equal on every machine."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@lru_cache(maxsize=64)
def _keys(seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(derive_seed("order", seed, epoch, i) for i in range(_ROUNDS))


def _mix(value: int, key: int, mask: int) -> int:
    mixed = (value * 0x9E3779B97F4A7C15 + key) & 0xFFFFFFFFFFFFFFFF
    mixed ^= mixed >> 29
    mixed = mixed * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    return (mixed >> 31) & mask


def permuted(index: int, size: int, seed: int, epoch: int) -> int:
    """The image of `index` under the seeded permutation of range(size) for `epoch`."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = _keys(seed, epoch)
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            left, right = right, left ^ _mix(right, key, mask)
        index = left << half | right
        if index < size:
            return index


@dataclass(frozen=True)
class StepSize:
    """How many samples a step has in all, and each of its micro-batches, but the last of those that have any."""

    samples: int
    micro_batch_size: int

    @property
    def micro_batches(self) -> int:
        """The micro-batches that have samples; those behind them are not computed."""
        return -(-self.samples // self.micro_batch_size)

    def weight(self, micro_batch: int) -> float:
        """The samples of a micro-batch, relative to those of the first."""
        samples = min(self.micro_batch_size, self.samples - micro_batch * self.micro_batch_size)
        return samples / min(self.micro_batch_size, self.samples)

    @property
    def weights(self) -> float:
        """The sum of the weights of all micro-batches."""
        return self.samples / min(self.micro_batch_size, self.samples)


@dataclass(frozen=True, kw_only=True)
class DataOrder:
    """The samples of every micro-batch of a run."""

    samples: int
    global_batch_size: int
    micro_batch_size: int
    seed: int
    shuffle: bool = True
    by_epoch: bool = False
    last_batch: str = "drop"  # of an epoch: "drop" | "pad" | "short"
    sampled: Callable[[int, int], int] | None = None  # (epoch, offset) -> sample, by a sampler of the script
    turns: TakingTurns = ONE_EACH  # of several optimizers: how many steps in a row use the same batch

    @property
    def micro_batches(self) -> int:
        return self.global_batch_size // self.micro_batch_size

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch, where epochs begin with a batch of their own."""
        return self.turns.steps(self.epoch_batches)

    @property
    def epoch_batches(self) -> int:
        """Global batches of an epoch."""
        full, rest = divmod(self.samples, self.global_batch_size)
        return full + (rest > 0 and self.last_batch != "drop")

    def batch_of(self, step: int) -> int:
        """The number of the global batch that a step uses."""
        return self._place(step)[0]

    def due(self, step: int) -> tuple[tuple[int, ...], int]:
        """The optimizers that step in the batch of a step, and which of the batch's steps it is."""
        batch, place = self._place(step)
        return self.turns.due(batch % self.epoch_batches if self.by_epoch else batch), place

    def collects(self, step: int) -> bool:
        """Whether a step puts values of its batch together, in place of a gradient."""
        return self.turns.collects and self._place(step)[1] == 0

    def ends_batch(self, step: int) -> bool:
        """Whether a step is the last one that uses its batch."""
        due, place = self.due(step)
        return place == len(due) - 1

    def _place(self, step: int) -> tuple[int, int]:
        if not self.by_epoch:
            return self.turns.batch_of(step)
        epoch, within = divmod(step, self.epoch_steps)
        batch, place = self.turns.batch_of(within)
        return epoch * self.epoch_batches + batch, place

    def epoch_of(self, step: int) -> int:
        """The epoch in which a step is; 0 of a stream."""
        if not self.samples:
            return 0
        if self.by_epoch:
            return step // self.epoch_steps
        return self.batch_of(step) * self.global_batch_size // self.samples

    def size(self, step: int) -> StepSize:
        """The size of a step's batch."""
        samples = self.global_batch_size
        if self.by_epoch and self.last_batch == "short":
            samples = min(samples, self.samples - self.batch_of(step) % self.epoch_batches * samples)
        return StepSize(samples, self.micro_batch_size)

    def indices(self, step: int, micro_batch: int) -> list[int]:
        """The dataset indices of a micro-batch, in order."""
        batch = self.batch_of(step)
        epoch, within = divmod(batch, self.epoch_batches) if self.by_epoch else (0, batch)
        first = within * self.global_batch_size + micro_batch * self.micro_batch_size
        positions = range(first, first + self.micro_batch_size)
        if self.by_epoch:
            if self.last_batch == "short":
                positions = range(first, min(positions.stop, self.samples))
            return [self._sample(epoch, position % self.samples) for position in positions]
        return [self._sample(*divmod(position, self.samples)) for position in positions]

    def _sample(self, epoch: int, offset: int) -> int:
        if self.sampled is not None:
            return self.sampled(epoch, offset)
        if not self.shuffle:
            return offset
        return permuted(offset, self.samples, self.seed, epoch)
