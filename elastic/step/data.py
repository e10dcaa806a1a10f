"""The samples of a micro-batch: from the user's dataset or stream, or from a DataLoader, with workers and collation.

A DataLoader's worker processes prefetch what this rank will compute next, keyed by (step, micro-batch). A change of the
membership discards only what was prefetched: the samples of a micro-batch, and the random numbers of its augmentation,
are a function of (seed, step, micro-batch), whichever process fetches them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from torch.utils.data import (
    DataLoader,
    IterableDataset,
    SequentialSampler,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

from everstep.elastic.contract.digest import content_digest
from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.notices import Notice, WarningChannel, warn
from everstep.elastic.contract.settings import Settings
from everstep.elastic.contract.stateful import decode, encode
from everstep.elastic.protocol.liveness import Pace

from .attributes import PLAIN
from .devices import generators_kept, seed_generators
from .order import DataOrder, derive_seed
from .sampled import SampledOrder, has_fixed_batches, is_permutation
from .stream_readers import StreamReaders
from .streams import STREAM, StreamPlace, Streams
from .taking_turns import ONE_EACH, TakingTurns
from .worker_processes import BROKEN_OFF, Key, Lost, Upcoming, begin, shut, start_method, worker_loader

Collate = Callable[[list[Any]], Any]
Request = tuple[Key, list[int] | None]  # and the samples, where a sampler chooses them
PROBE = -1  # in the place of a step: the key requests one sample


class DataSource:
    """The samples of a job, by micro-batch.

    `samples` is the number that is trained on: `known` where the job has begun with fewer than the dataset has now; 0
    for a stream.
    """

    def __init__(
        self,
        given: Any,
        settings: Settings,
        collate_fn: Collate | None,
        channel: WarningChannel,
        place: StreamPlace,
        known: int = 0,
        turns: TakingTurns = ONE_EACH,
    ) -> None:
        """`turns`: of several optimizers. Raises UsageError for data that cannot be divided."""
        self._loader = given if isinstance(given, DataLoader) else None
        dataset = given.dataset if self._loader is not None else given
        if self._loader is not None:
            _check_loader(self._loader, settings, collate_fn)
            collate_fn = self._loader.collate_fn
        is_stream = isinstance(dataset, IterableDataset)
        if is_stream and turns.alternates:
            raise UsageError(
                f"{type(dataset).__name__} is a stream, and alternating updates of several optimizers need each batch "
                "several times: use a dataset with a length, or run.prepare(..., updates='simultaneous')"
            )
        (_check_stream if is_stream else _check_dataset)(dataset, settings)
        self.dataset = dataset
        self._collate = collate_fn or default_collate
        self._channel = channel
        self._seed = settings.seed
        self._skips = settings.skip_bad_samples
        self._bad: dict[int, str] = {}  # sample -> why it cannot be read, in this process
        self._skipped: set[int] = set()  # those that were in this rank's micro-batches
        self._place = place
        self._readers: StreamReaders | None = None
        self.streams = self._begin_streams(settings) if is_stream else None
        self.samples = 0 if is_stream else len(dataset)
        shuffle, sampler = (False, None) if is_stream else _order_of(self._loader)
        self.sampled: SampledOrder | None = None
        if sampler is not None:
            self.sampled = SampledOrder(sampler, self.samples, settings.global_batch_size, settings.seed, channel)
            self.samples, known = self.sampled.samples, 0
        if known and self.samples > known:
            warn(
                channel,
                Notice.DATA_GREW,
                f"the dataset of a replacement has {self.samples} samples, and the job began with {known}: only the "
                f"first {known} are used",
            )
            self.samples = known
        self._readable = self.samples if self.sampled is None else len(dataset)  # of the dataset
        self.order = DataOrder(
            samples=self.samples,
            global_batch_size=settings.global_batch_size,
            micro_batch_size=settings.micro_batch_size,
            seed=settings.seed,
            shuffle=shuffle,
            sampled=self.sampled.sample if self.sampled is not None else None,
            by_epoch=settings.epochs > 0,
            last_batch=settings.last_batch,
            turns=turns,
        )
        self._ahead: _Ahead | None = None
        self._forked: dict[str, Any] | None = None  # what the dataset had when worker processes were started
        self._epoch: int | None = None  # the epoch whose batches the script has begun, in run.epochs

    def __getstate__(self) -> dict[str, Any]:
        """What `load` needs in a worker process that is not forked: with a sampler, requests have its indices."""
        order = replace(self.order, sampled=None)
        dropped = dict.fromkeys(("_loader", "_channel", "_place", "sampled", "_ahead"))
        return {**self.__dict__, **dropped, "order": order}

    def _begin_streams(self, settings: Settings) -> Streams:
        """The streams of all micro-batches of a step. Raises UsageError for one without a sample."""
        loader, size = self._loader, settings.micro_batch_size
        if loader is not None and loader.batch_size is None:  # its items are micro-batches
            collate, size = self._collate, 1
            # A copy, since the script may change a batch, and the item is kept for a step that is computed again.
            self._collate = lambda items: collate(copy.deepcopy(items[0]))
        streams = Streams(self.dataset, size, settings.micro_batches, settings.seed, self._place)
        if streams.first is None:
            raise UsageError(_ended(self.dataset, 0, 0))
        if loader is not None and loader.num_workers:
            if (method := start_method(loader)) != "fork":
                raise UsageError(
                    f"the worker processes of the DataLoader are started by {method!r}, and those that read a stream "
                    "have to be forked: give the DataLoader multiprocessing_context='fork', or num_workers=0"
                )
            self._readers = StreamReaders(loader, streams, self._stream_item, self._channel)
            if loader.num_workers > 1 and not streams.divided:
                text = (
                    f"the DataLoader has num_workers={loader.num_workers}, and one process reads its stream ahead: "
                    "several would each read all of it; a dataset that divides itself by run.stream_index is read by "
                    "all of them"
                )
                warn(self._channel, Notice.SETTING_IGNORED, text)
        return streams

    def begin_epoch(self, epoch: int) -> None:
        """The script begins the batches of an epoch: what it has changed of the data before holds from here on.

        So worker processes, which have the dataset as it was when they were started, are started again.
        """
        self._epoch = epoch
        self.close()

    def upcoming(self, micro_batches: Sequence[int], first: int, steps: int) -> Iterator[Key]:
        """The keys of these micro-batches in the steps from `first` on, of `steps` in all.

        In run.epochs they end with the epoch: before the next one, the script may change the dataset and its sampler.
        """
        for step in range(first, steps if micro_batches else 0):
            if self._epoch is not None and self.order.epoch_of(step) > self._epoch:
                return
            filled = self.order.size(step).micro_batches
            yield from ((step, micro_batch) for micro_batch in micro_batches if micro_batch < filled)

    def request(self, key: Key) -> Request:
        """What `load` is to be given for a key. A sampler's order is worked out here, not in worker processes."""
        return key, self.order.indices(*key) if self.sampled is not None else None

    def load(self, request: Request) -> Any:
        """The item of a key, fetched in this process. The key seeds random augmentation."""
        (step, number), indices = request
        seed_generators(derive_seed("data", self._seed, self.order.batch_of(step), number))
        if step == PROBE:
            return self._sample(number)
        if indices is None:
            indices = self.order.indices(step, number)
        return self._collate([self._sample(i) for i in indices])

    def _stream_item(self, key: Key) -> tuple[Any] | None:
        """The item of a key, of a stream; None if the stream has ended before it."""
        assert self.streams is not None
        samples = self.streams.samples(*key)
        if samples is None:
            return None
        seed_generators(derive_seed("data", self._seed, *key))
        return (self._collate(samples),)

    def _sample(self, index: int) -> Any:
        """A sample of the dataset; an exception of the user's says which one it is.

        In place of one that may be skipped comes the next that can be read: the same on every rank that reads it.
        """
        number, tried = index, 0
        while True:
            try:
                return self.dataset[number]
            except Exception as error:
                if tried == self._skips:
                    error.add_note(f"everstep: this is sample {number} of the dataset ({type(self.dataset).__name__})")
                    raise
                self._bad[number] = f"{type(error).__name__}: {error}"
            number, tried = (number + 1) % self._readable, tried + 1

    def fetch(self, step: int, micro_batch: int, upcoming: Upcoming = tuple) -> Any:
        """The samples of a micro-batch, collated. `upcoming`: what worker processes fetch ahead, from this one on."""
        if self.streams is not None:
            key = step, micro_batch
            found = self._stream_item(key) if self._readers is None else self._readers.take(key, upcoming)
            if found is None:
                raise UsageError(_ended(self.dataset, step, micro_batch))
            return found[0]
        if self._loader is None or not self._loader.num_workers:
            item, bad = self._load_noting(self.request((step, micro_batch)))
        else:
            if self._ahead is None:
                self._ahead = _Ahead(self._loader, self.request, self._load_noting, upcoming, self._channel)
                self._forked = plain_attributes(self.dataset)
            self._check_unchanged()
            item, bad = self._ahead.take((step, micro_batch))
        for number, why in bad.items():
            self._skip(number, why)
        return item

    def _load_noting(self, request: Request) -> tuple[Any, dict[int, str]]:
        """The item of a key, and which samples could not be read for it."""
        self._bad = {}
        return self.load(request), self._bad

    def _skip(self, number: int, why: str) -> None:
        if number in self._skipped:
            return
        self._skipped.add(number)
        dataset = f"the dataset ({type(self.dataset).__name__})"
        if len(self._skipped) > self._skips:
            raise UsageError(
                f"skip_bad_samples={self._skips}: {len(self._skipped)} samples of {dataset} could not be read on this "
                f"rank, the last of them sample {number}: {why}"
            )
        text = f"sample {number} of {dataset} cannot be read, and the next one takes its place: {why}"
        warn(self._channel, Notice.SAMPLE_SKIPPED, text, sample=number)

    def ends(self, step: int, upcoming: Upcoming) -> str:
        """Why no step can follow this one: a stream lacks samples for one of the `upcoming` micro-batches. Or empty."""
        if self.streams is None:
            return ""
        with generators_kept(), self._place.progress.within(Pace.FETCH):
            for following, number in _until(step + 1, upcoming):
                if following == step + 1 and not self._has((following, number), upcoming):
                    text = f"the stream has ended, and training ends after step {step}, in front of the last of the job"
                    warn(self._channel, Notice.STREAM_ENDED, text)
                    return "the stream has ended"
        return ""

    def _has(self, key: Key, upcoming: Upcoming) -> bool:
        assert self.streams is not None
        return self.streams.samples(*key) is not None if self._readers is None else self._readers.has(key, upcoming)

    def share_states(
        self,
        step: int,
        registered: dict[str, Any],
        exchange: Callable[[str], Mapping[int, str]],
        upcoming: Upcoming,
    ) -> None:
        """Every few steps, agree on the states of streams with all ranks, and have them among the registered states."""
        if self.streams is None or not self.streams.shares(step):
            return
        mine = [number for following, number in _until(step + 1, upcoming) if following == step + 1]
        readers = self._readers
        own = self.streams.states(step, mine) if readers is None else readers.states(step, mine, upcoming)
        texts = exchange(json.dumps(encode(own, "the states of streams")))
        found = {index: state for text in texts.values() for index, state in decode(json.loads(text)).items()}
        self.streams.agree(step, dict(sorted(found.items())))
        registered[STREAM] = encode(self.streams.state_dict(), STREAM)

    def digests(self) -> tuple[str, ...]:
        """Digests of the first, the middle and the last sample; empty if they differ when fetched again.

        Of a stream, of the samples of its first micro-batch; it is begun twice for that.

        The worker processes of a DataLoader fetch them: what a dataset opens at its first use, such as a file, must not
        be shared with processes that are forked later.
        """
        keys = [(PROBE, index) for index in sorted({0, self._readable // 2, self._readable - 1})]
        twice = [*keys, *keys]
        if self.streams is not None:
            found = [content_digest(samples) for samples in (self.streams.first, self.streams.again())]
        elif self._loader is None or not self._loader.num_workers:
            found = [self._digest(key) for key in twice]
        else:
            probes = begin(worker_loader(self._loader, self._digest, twice, workers=1))
            found = [digest for _, digest in probes]
        half = len(found) // 2
        if found[:half] == found[half:]:
            order = [content_digest(self.sampled.first)] if self.sampled is not None else []
            return (*found[:half], *order)
        warn(
            self._channel,
            Notice.DATA_NOT_REPEATABLE,
            "the dataset gives another sample when the same one is fetched again: a micro-batch that is computed "
            "again after a loss will differ; draw random numbers from torch's, NumPy's and Python's global generators, "
            "which are seeded for each micro-batch",
        )
        return ()

    def _digest(self, key: Key) -> str:
        return content_digest(self.load((key, None)))

    def described(self) -> dict[str, Any]:
        """The description of the data in a checkpoint, which ranks also compare; see `digests`."""
        last = self.order.last_batch if self.order.by_epoch else "none"
        described = {"samples": self.samples, "shuffle": self.order.shuffle, "last_batch": last}
        return {**described, "sample_digests": list(self.digests())}

    def _check_unchanged(self) -> None:
        """Warn once of a change of the dataset that the worker processes do not have."""
        if self._forked is None or (found := plain_attributes(self.dataset)) == self._forked:
            return
        name = min(name for name in found.keys() | self._forked.keys() if found.get(name) != self._forked.get(name))
        text = (
            f"the script has changed {name} of the dataset ({type(self.dataset).__name__}) during training: worker "
            "processes have it as it was when they were started, which is another time on a replacement; change it in "
            "a loop over run.epochs(), in front of the loop over the batches"
        )
        self._forked = None
        warn(self._channel, Notice.DATASET_CHANGED, text)

    def close(self) -> None:
        """End the worker processes."""
        if self._readers is not None:
            self._readers.close()
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


def plain_attributes(dataset: Any) -> dict[str, Any]:
    """The attributes that are numbers or texts, of a dataset and of those that it wraps as `dataset`."""
    found: dict[str, Any] = {}
    path = ""
    layers: list[Any] = []
    while hasattr(dataset, "__dict__") and all(dataset is not layer for layer in layers):
        layers.append(dataset)
        for name, value in vars(dataset).items():
            if type(value) in PLAIN:
                found[path + name] = value
        dataset, path = vars(dataset).get("dataset"), path + "dataset."
    return found


def _until(step: int, upcoming: Upcoming) -> Iterator[Key]:
    return takewhile(lambda key: key[0] <= step, upcoming())


class _Ahead:
    """Takes micro-batches from a DataLoader's worker processes in the order in which they will be needed."""

    def __init__(
        self,
        loader: DataLoader[Any],
        request: Callable[[Key], Request],
        load: Callable[[Request], Any],
        upcoming: Upcoming,
        channel: WarningChannel,
    ) -> None:
        self._loader = loader
        self._request = request
        self._load = load
        self._upcoming = upcoming
        self._running: Iterator[tuple[Request, Any]] | None = None
        self._lost = Lost(channel)

    def take(self, key: Key) -> Any:
        """Return this micro-batch. If another one was expected, prefetching begins again from this one."""
        while True:
            if self._running is None:
                self._running = self._start(key)
            try:
                found, batch = next(self._running, ((None, None), None))
            except BROKEN_OFF as error:
                running, self._running = self._running, None
                self._lost.note(error, running)
                continue
            self._lost.forget()
            if found[0] == key:
                return batch
            self.close()

    def _start(self, key: Key) -> Iterator[tuple[Request, Any]]:
        return begin(worker_loader(self._loader, self._load, map(self._request, _from(key, self._upcoming()))))

    def close(self) -> None:
        running, self._running = self._running, None
        shut(running)


def _from(first: Key, others: Iterable[Key]) -> Iterator[Key]:
    """`first`, then the others."""
    yield first
    yield from (key for key in others if key != first)


def _check_loader(loader: DataLoader[Any], settings: Settings, collate_fn: Collate | None) -> None:
    """Refuse data that cannot be divided into micro-batches."""
    if collate_fn is not None:
        raise UsageError("collate_fn was passed together with a DataLoader, which has its own: leave it out")
    is_stream = isinstance(loader.dataset, IterableDataset)
    if is_stream and loader.batch_size is None:
        return
    if loader.drop_last and settings.epochs and settings.last_batch == "short":
        raise UsageError(
            "the DataLoader has drop_last=True, and the job last_batch='short', which trains on the samples that it "
            "would drop: leave one of them out"
        )
    if not has_fixed_batches(loader):
        raise UsageError(
            "the DataLoader has no fixed batch size, or has its own batch sampler: give it batch_size="
            f"{settings.micro_batch_size} (the job's micro_batch_size)"
        )
    if loader.batch_size not in (settings.micro_batch_size, settings.global_batch_size):
        raise UsageError(
            f"the DataLoader has batch_size={loader.batch_size}, which is neither the job's micro_batch_size "
            f"({settings.micro_batch_size}) nor its global_batch_size ({settings.global_batch_size}): give it one of "
            "them; either way its collate_fn gets the samples of one micro-batch"
        )


def _order_of(loader: DataLoader[Any] | None) -> tuple[bool, Any]:
    """Whether the samples are shuffled; a sampler that gives their order, if there is one of the script's."""
    sampler = loader.sampler if loader is not None else None
    if sampler is None:
        return True, None
    if isinstance(sampler, DistributedSampler):  # the runtime itself assigns samples to ranks
        return bool(sampler.shuffle), None
    if type(sampler) is SequentialSampler:
        return False, None
    return True, None if is_permutation(sampler) else sampler


def _check_dataset(dataset: Any, settings: Settings) -> None:
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise UsageError(
            "the dataset must be map-style (have __len__ and __getitem__) or a torch.utils.data.IterableDataset; got "
            f"{type(dataset).__name__}"
        )
    if len(dataset) < settings.global_batch_size:
        raise UsageError(
            f"the dataset has {len(dataset)} samples, fewer than one batch (global_batch_size = "
            f"{settings.global_batch_size}): use more data or a smaller batch"
        )


def _check_stream(dataset: Any, settings: Settings) -> None:
    if settings.skip_bad_samples:
        raise UsageError(
            f"skip_bad_samples={settings.skip_bad_samples} needs a dataset with a length, and "
            f"{type(dataset).__name__} is a stream, which cannot continue after an exception: catch it in there"
        )
    if settings.epochs:
        raise UsageError(
            f"epochs={settings.epochs} needs a dataset with a length, and {type(dataset).__name__} is a stream: give "
            "steps= in place of epochs="
        )


def _ended(dataset: Any, step: int, micro_batch: int) -> str:
    return (
        f"{type(dataset).__name__} ended before it had the samples of micro-batch {micro_batch} of step {step}: give "
        "the job more data, or fewer steps"
    )
