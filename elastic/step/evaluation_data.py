"""The batches of an evaluation, by number: from a dataset, or from a DataLoader with its workers and collation.

Where the loader's sampler chooses samples, batches are cut out of what it has chosen. Each rank iterates over it with
the same seed, and the choice of one of them is used by all, so a sampler may draw from wherever it likes.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from torch.utils.data import (
    DataLoader,
    IterableDataset,
    SequentialSampler,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

from everstep.elastic.contract.errors import UsageError

from .devices import seed_generators
from .order import derive_seed
from .sampled import draw, has_fixed_batches, is_permutation
from .worker_processes import Key, begin, shut, worker_loader

EVALUATION = -2  # in the place of a step in a key


class EvaluationData:
    """The batches of `given`, in the order of the dataset, unless a DataLoader's sampler chooses: a batch is a function
    of its number. A dataset alone is cut into batches of `batch_size` and collated as torch does. Raises UsageError.
    """

    def __init__(self, given: Any, batch_size: int, seed: int) -> None:
        self._loader = given if isinstance(given, DataLoader) else None
        self._dataset = given.dataset if self._loader is not None else given
        self._seed = seed
        self._size, self._collate, self._drops = batch_size, default_collate, False
        self._sampler: Any = None
        if self._loader is not None:
            self._size = _checked(self._loader)
            self._drops, self._collate = bool(self._loader.drop_last), self._loader.collate_fn
            self._sampler = None if _gives_all(self._loader.sampler) else self._loader.sampler
        dataset = self._dataset
        mapped = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if isinstance(dataset, IterableDataset) or not mapped:
            raise UsageError(
                f"run.evaluate: the dataset must be map-style (have __len__ and __getitem__), so that its samples can "
                f"be dealt to ranks; got {type(dataset).__name__}"
            )
        self.chosen: list[int] | None = None  # the samples in their order, where a sampler has chosen them
        self._count(len(dataset))

    def _count(self, given: int) -> None:
        self.samples = given - (given % self._size if self._drops else 0)
        self.count = -(-self.samples // self._size)

    @property
    def has_choice(self) -> bool:
        """Whether the samples are those that a sampler chooses."""
        return self._sampler is not None

    def draw(self, version: int) -> list[int]:
        """The samples that the sampler gives, with generators that are seeded for this version. Raises UsageError."""
        seed = derive_seed("evaluation sampler", self._seed, version)
        return [int(index) for index in draw(self._sampler, len(self._dataset), seed)]

    def choose(self, samples: Sequence[int]) -> None:
        """Evaluate these samples, in this order."""
        self.chosen = list(samples)
        self._count(len(self.chosen))

    def __getstate__(self) -> dict[str, Any]:
        """What `_load` needs in a worker process that is not forked."""
        return {**self.__dict__, "_loader": None, "_sampler": None}

    def indices(self, number: int) -> Sequence[int]:
        """The samples of a batch, as the dataset numbers them."""
        first, end = number * self._size, min(self.samples, (number + 1) * self._size)
        return range(first, end) if self.chosen is None else self.chosen[first:end]

    def batches(self, numbers: Sequence[int]) -> Generator[tuple[int, Any], None, None]:
        """(number, batch), in this order; fetched ahead by the DataLoader's worker processes, if it has some."""
        keys = [(EVALUATION, number) for number in numbers]
        if self._loader is None or not self._loader.num_workers or not keys:
            for key in keys:
                yield key[1], self._load(key)
            return
        fetched = begin(worker_loader(self._loader, self._load, keys))
        try:
            for (_, number), batch in fetched:
                yield number, batch
        finally:
            shut(fetched)

    def _load(self, key: Key) -> Any:
        """The batch of a key, fetched in this process. The key seeds what the dataset draws."""
        seed_generators(derive_seed("evaluation", self._seed, key[1]))
        return self._collate([self._dataset[index] for index in self.indices(key[1])])


def _checked(loader: DataLoader[Any]) -> int:
    """The size of the loader's batches."""
    if isinstance(loader.dataset, IterableDataset):
        return 1  # refused with its name
    if not has_fixed_batches(loader) or loader.batch_size is None:
        raise UsageError(
            "run.evaluate: the DataLoader has no fixed batch size, or has its own batch sampler: give it batch_size="
        )
    return loader.batch_size


def _gives_all(sampler: Any) -> bool:
    """Whether it gives every sample once, in whatever order."""
    return type(sampler) in (SequentialSampler, DistributedSampler) or is_permutation(sampler)
