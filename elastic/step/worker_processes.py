"""The worker processes of a script's DataLoader, for keys instead of samples, and the loss of one."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.notices import Notice, WarningChannel, warn
from everstep.elastic.contract.signals import outlive_first_signal

Key = tuple[int, int]  # (step, micro-batch)
Upcoming = Callable[[], Iterable[Key]]  # gives the micro-batches that this rank will need, in their order
BROKEN_OFF = (RuntimeError, OSError, EOFError, pickle.UnpicklingError)  # what a killed worker process may raise in us
DEATH_SEEN_S = 0.5
WORKER_DEATHS = 5  # in a row, without a micro-batch between them


class Lost:
    """The losses of worker processes in a row."""

    def __init__(self, channel: WarningChannel) -> None:
        self._channel = channel
        self._deaths = 0

    def note(self, error: Exception, running: object) -> None:
        """Fetching has failed: the processes are ended, with a warning if one was killed; else the error is raised."""
        died = _names_dead_worker(error) or _has_dead_worker(running)
        shut(running)
        if not died:
            raise error
        self._deaths += 1
        if self._deaths >= WORKER_DEATHS:
            raise error
        text = f"a worker process of the DataLoader was lost, and its samples are fetched again: {error}"
        warn(self._channel, Notice.DATA_WORKER_LOST, text)

    def forget(self) -> None:
        """Something was fetched."""
        self._deaths = 0


def shut(running: object) -> None:
    """End the worker processes of an iterator, if it has some."""
    shuts = getattr(running, "_shutdown_workers", None)
    if shuts is not None:
        shuts()


def _names_dead_worker(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, RuntimeError) and "DataLoader worker" in text and ("killed" in text or "exited" in text)


def _has_dead_worker(running: object) -> bool:
    """Whether a worker process of this iterator has ended, or ends within a moment.

    One that is killed while it sends closes its sockets before it can be seen to be dead; torch looks only once.
    """
    sentinels = [process.sentinel for process in getattr(running, "_workers", ())]
    return bool(sentinels) and bool(multiprocessing.connection.wait(sentinels, DEATH_SEEN_S))


def begin(loader: DataLoader[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    """Start the worker processes, and have the loss of one raise only where their items are received.

    Torch's handler for SIGCHLD, whether one of ours or of the script's DataLoaders installed it, raises wherever the
    main thread is, even in the middle of a commit, when a process that it knows is lost. This function makes it forget
    these processes; the iterator itself checks them every few seconds while it waits.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Got pickle error")  # the error below says it
            running = iter(loader)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        if (method := start_method(loader)) == "fork":
            raise
        raise UsageError(
            f"the worker processes of the DataLoader are started by {method!r}, and its dataset, collate_fn and "
            f"worker_init_fn have to be pickled for them: {error}"
        ) from error
    if getattr(running, "_worker_pids_set", False):
        torch._C._remove_worker_pids(id(running))
        running._worker_pids_set = False  # type: ignore[attr-defined]  # the iterator shall not repeat it
    return running


def start_method(loader: DataLoader[Any]) -> str:
    """How the worker processes of a loader are started: "fork", "spawn" or "forkserver"."""
    context = loader.multiprocessing_context
    if context is not None:
        return str(context.get_start_method())
    return multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]


class _Keyed(Dataset[Any]):
    """The dataset of the worker processes: an item per key."""

    def __init__(self, load: Callable[[Any], Any], dataset: Any) -> None:
        self._load = load
        self.dataset = dataset  # the script's, from which `load` gets samples

    def __getitem__(self, key: Any) -> tuple[Any, Any]:
        return key, self._load(key)


class _Keys:
    """A lazy sampler of these keys: torch requests as many as its workers prefetch."""

    def __init__(self, keys: Iterable[Any]) -> None:
        self._keys = keys

    def __iter__(self) -> Iterator[Any]:
        return iter(self._keys)


def worker_loader(
    like: DataLoader[Any], load: Callable[[Any], Any], keys: Iterable[Any], workers: int = 0
) -> DataLoader[Any]:
    """A DataLoader with the worker settings of another one, for keys instead of samples: yields (key, item)."""
    with warnings.catch_warnings():
        # Torch has shown its warnings about these settings when the script created the loader.
        warnings.simplefilter("ignore")
        return _loader_like(like, load, keys, workers)


def _loader_like(
    like: DataLoader[Any], load: Callable[[Any], Any], keys: Iterable[Any], workers: int
) -> DataLoader[Any]:
    return DataLoader(
        _Keyed(load, like.dataset),
        batch_size=None,
        sampler=_Keys(keys),
        num_workers=workers or like.num_workers,
        collate_fn=_unchanged,
        pin_memory=like.pin_memory,
        timeout=like.timeout,
        worker_init_fn=partial(_begin_worker, like.worker_init_fn),
        multiprocessing_context=like.multiprocessing_context,
        prefetch_factor=like.prefetch_factor,
        generator=torch.Generator(),  # otherwise torch draws a seed from the generator that the script uses
    )


def _begin_worker(users: Callable[[int], Any] | None, number: int) -> None:
    outlive_first_signal()
    info = torch.utils.data.get_worker_info()
    if info is not None and isinstance(info.dataset, _Keyed):  # the script changes its own dataset there
        object.__setattr__(info, "dataset", info.dataset.dataset)  # it refuses an ordinary assignment
    if users is not None:
        users(number)


def _unchanged(item: Any) -> Any:
    return item
