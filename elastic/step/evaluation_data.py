"""The batches of an evaluation, by number: from a dataset, or from a DataLoader with its workers and collation."""

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
from .sampled import has_fixed_batches, is_permutation
from .worker_processes import Key, begin, shut, worker_loader

EVALUATION = -2  # in the place of a step in a key


class EvaluationData:
    """The batches of `given`, in the order of the dataset, whatever order a DataLoader has: a batch is a function of
    its number. A dataset alone is cut into batches of `batch_size` and collated as torch does. Raises UsageError.
    """

    def __init__(self, given: Any, batch_size: int, seed: int) -> None:
        self._loader = given if isinstance(given, DataLoader) else None
        self._dataset = given.dataset if self._loader is not None else given
        self._seed = seed
        self._size, self._collate, drops = batch_size, default_collate, False
        if self._loader is not None:
            self._size, drops = _checked(self._loader)
            self._collate = self._loader.collate_fn
        dataset = self._dataset
        mapped = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if isinstance(dataset, IterableDataset) or not mapped:
            raise UsageError(
                f"run.evaluate: the dataset must be map-style (have __len__ and __getitem__), so that its samples can "
                f"be dealt to ranks; got {type(dataset).__name__}"
            )
        self.samples = len(dataset) - (len(dataset) % self._size if drops else 0)
        self.count = -(-self.samples // self._size)

    def __getstate__(self) -> dict[str, Any]:
        """What `_load` needs in a worker process that is not forked."""
        return {**self.__dict__, "_loader": None}

    def bounds(self, number: int) -> tuple[int, int]:
        """The first sample of a batch, and the one behind its last."""
        return number * self._size, min(self.samples, (number + 1) * self._size)

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
        return self._collate([self._dataset[index] for index in range(*self.bounds(key[1]))])


def _checked(loader: DataLoader[Any]) -> tuple[int, bool]:
    """The size of the loader's batches, and whether it drops a last one that is smaller."""
    if isinstance(loader.dataset, IterableDataset):
        return 1, False  # refused with its name
    if not has_fixed_batches(loader) or loader.batch_size is None:
        raise UsageError(
            "run.evaluate: the DataLoader has no fixed batch size, or has its own batch sampler: give it batch_size="
        )
    sampler = loader.sampler
    if type(sampler) not in (SequentialSampler, DistributedSampler) and not is_permutation(sampler):
        raise UsageError(
            f"run.evaluate: the DataLoader's sampler is a {type(loader.sampler).__name__}: samples are dealt in the "
            "order of the dataset, each once; choose them by a torch.utils.data.Subset"
        )
    return loader.batch_size, bool(loader.drop_last)
