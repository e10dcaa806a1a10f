"""The order that a DataLoader's sampler gives, as a function of (seed, epoch): each rank works it out for itself.

A copy of the sampler is iterated over with generators that are seeded for the epoch. So the order is the same on all
ranks and after a resume, if the sampler draws from torch's, NumPy's or Python's global generators, or from its own
`generator`, and keeps nothing from one iteration to the next.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from everstep.elastic.contract.errors import UsageError

from .devices import generators_kept, seed_generators
from .order import derive_seed

Indices = np.ndarray[Any, np.dtype[np.int64]]


def has_fixed_batches(loader: DataLoader[Any]) -> bool:
    """Whether a loader cuts batches of one size out of the order of its samples, as torch's and torchdata's do."""
    return loader.batch_size is not None and _is_torchs(loader.batch_sampler, BatchSampler)


def is_permutation(sampler: Any) -> bool:
    """Whether it is what `shuffle=True` gives: every sample once, in a random order."""
    random = _is_torchs(sampler, RandomSampler)
    return random and not sampler.replacement and bool(sampler.num_samples == len(sampler.data_source))


def _is_torchs(found: object, kind: type) -> bool:
    """Whether it is of exactly this class of torch's, or of the one with this name that torchdata's loaders have."""
    own = type(found)
    return own is kind or (own.__name__ == kind.__name__ and own.__module__.startswith("torchdata."))


class SampledOrder:
    """The indices of each epoch by `sampler`, for a dataset of `length` samples. Raises UsageError."""

    def __init__(self, sampler: Any, length: int, batch_size: int, seed: int) -> None:
        self._sampler = sampler
        self._name = type(sampler).__name__
        self._length = length
        self._seed = seed
        self._drawn = lru_cache(maxsize=2)(self._draw)
        self.first = self._drawn(0)  # what ranks compare
        self.samples = len(self.first)
        if self.samples < batch_size:
            raise UsageError(
                f"the DataLoader's sampler ({self._name}) gives {self.samples} samples, fewer than one batch "
                f"(global_batch_size = {batch_size}): let it give more, or choose a smaller batch"
            )
        if not np.array_equal(self.first, self._draw(0)):
            raise UsageError(
                f"the DataLoader's sampler ({self._name}) gives another order when it is iterated over again: draw "
                "random numbers from torch's, NumPy's or Python's global generators, or from its attribute generator, "
                "which are seeded for each epoch, and keep no position in it"
            )

    def sample(self, epoch: int, offset: int) -> int:
        """The index of a sample of an epoch."""
        drawn = self._drawn(epoch)
        if len(drawn) != self.samples:
            raise UsageError(
                f"the DataLoader's sampler ({self._name}) gives {len(drawn)} samples in epoch {epoch}, and "
                f"{self.samples} in the first: let it give as many in each"
            )
        return int(drawn[offset])

    def _draw(self, epoch: int) -> Indices:
        return draw(self._sampler, self._length, derive_seed("sampler", self._seed, epoch), epoch)


def draw(sampler: Any, length: int, seed: int, epoch: int | None = None) -> Indices:
    """The indices that a sampler gives in one iteration with generators of this seed, of `length` samples.

    `epoch`: for the `set_epoch` of one that has it. This process's generators stay as they were. Raises UsageError.
    """
    with generators_kept():
        seed_generators(seed)
        copied = copy.copy(sampler)
        if isinstance(getattr(copied, "generator", None), torch.Generator):
            copied.generator = torch.Generator(copied.generator.device).manual_seed(seed)
        if epoch is not None and callable(getattr(copied, "set_epoch", None)):
            copied.set_epoch(epoch)
        drawn = np.fromiter((int(index) for index in copied), np.int64)
    wrong = drawn[(drawn < 0) | (drawn >= length)]
    if wrong.size:
        raise UsageError(
            f"the DataLoader's sampler ({type(sampler).__name__}) gives index {wrong[0]}, and the dataset has {length} "
            "samples"
        )
    return drawn
