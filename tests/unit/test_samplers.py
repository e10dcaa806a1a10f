"""The samplers of a DataLoader: their order is a function of (seed, epoch), and each sample is fetched in it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.progress import Progress
from everstep.elastic.contract.settings import Settings
from everstep.elastic.step.data import DataSource
from everstep.elastic.step.evaluation_data import EvaluationData
from everstep.elastic.step.sampled import SampledOrder
from everstep.elastic.step.streams import StreamPlace

SETTINGS = Settings(epochs=3, global_batch_size=8, micro_batch_size=2)
NUMBERS: Any = list(range(100, 140))


class Silent:
    def note(self, what: str, fields: Any) -> None:
        raise AssertionError(fields)


class Heard:
    def note(self, what: str, fields: Any) -> None:
        assert fields["notice"] == "sampler-differs"


def source(sampler: Any, settings: Settings = SETTINGS, workers: int = 0, seed: int = 0) -> DataSource:
    return source_of(
        DataLoader(NUMBERS, batch_size=2, sampler=sampler, num_workers=workers), replace(settings, seed=seed)
    )


def source_of(data: Any, settings: Settings = SETTINGS) -> DataSource:
    return DataSource(data, settings, None, Silent(), StreamPlace(Progress(None, 0, 1, [])))


def epoch(data: DataSource, number: int) -> list[int]:
    """Its samples, in their order."""
    steps = data.order.epoch_steps
    keys = [(step, slot) for step in range(number * steps, (number + 1) * steps) for slot in range(4)]
    return [int(x) for key in keys for x in data.fetch(*key, partial(iter, keys))]


class Own:
    """Draws from Python's generator, and wants to know the epoch."""

    epoch = -1

    def set_epoch(self, number: int) -> None:
        self.epoch = number

    def __len__(self) -> int:
        return 16

    def __iter__(self) -> Iterator[int]:
        yield from (random.randrange(20) + 5 * self.epoch for _ in range(16))


WEIGHTS = [0.0] * 20 + [1.0] * 19 + [10.0]
SAMPLERS: dict[str, Any] = {
    "weighted": lambda: WeightedRandomSampler(WEIGHTS, 60),
    "weighted, with a generator": lambda: WeightedRandomSampler(WEIGHTS, 60, generator=torch.Generator()),
    "subset": lambda: SubsetRandomSampler(range(3, 27)),
    "again": lambda: RandomSampler(NUMBERS, replacement=True, num_samples=24),
    "own": Own,
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_order_is_a_function_of_seed_and_epoch(name: str) -> None:
    """Whatever the process has drawn and fetched before, and whoever fetches; the script's sampler is left alone."""
    made = SAMPLERS[name]()
    before = random.getstate(), torch.get_rng_state(), made.__dict__.copy()
    first = source(made)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    epochs = [epoch(first, number) for number in range(3)]
    assert made.__dict__ == before[2]
    random.seed(7)
    torch.manual_seed(7)
    again = source(SAMPLERS[name](), workers=1)
    assert [epoch(again, number) for number in (2, 0)] == [epochs[2], epochs[0]]
    again.close()
    assert len({tuple(found) for found in epochs}) == 3
    assert epoch(source(made, seed=1), 0) != epochs[0]
    assert all(len(found) == first.samples // 8 * 8 for found in epochs)
    if name.startswith("weighted"):
        assert min(epochs[0]) >= 120
        assert Counter(epochs[0]).most_common(1)[0][0] == 139
    elif name == "subset":
        assert all(sorted(found) == list(range(103, 127)) for found in epochs)
    elif name == "own":
        assert all(100 + 5 * number <= min(found) for number, found in enumerate(epochs))


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_distributed_sampler_is_taken_apart(shuffle: bool) -> None:
    """Its share of the samples is not this rank's: the runtime deals all of them."""
    found = source(DistributedSampler(NUMBERS, num_replicas=2, rank=1, shuffle=shuffle))
    epochs = [epoch(found, number) for number in range(2)]
    assert [sorted(one) for one in epochs] == [NUMBERS, NUMBERS]
    assert [one == NUMBERS for one in epochs] == [not shuffle, not shuffle]


class Initialised(Dataset[int]):
    """Its samples are what `worker_init_fn` has made of the dataset in a worker process."""

    added = 0

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        return index + self.added


def initialise(number: int) -> None:
    info = torch.utils.data.get_worker_info()
    assert info is not None
    info.dataset.added = 1000


def test_worker_processes_are_initialised() -> None:
    loader = DataLoader(Initialised(), batch_size=2, num_workers=2, prefetch_factor=3, worker_init_fn=initialise)
    found = source_of(loader)
    try:
        assert sorted(epoch(found, 0)) == list(range(1000, 1040))
    finally:
        found.close()


def test_ranks_compare_the_order() -> None:
    digests = [source(WeightedRandomSampler(weights, 60)).digests() for weights in (WEIGHTS, WEIGHTS[::-1])]
    assert digests[0][:3] == digests[1][:3]
    assert digests[0] != digests[1]


class Changing(Own):
    def __init__(self) -> None:
        self.drawn = [0]

    def __iter__(self) -> Iterator[int]:
        self.drawn[0] += 1
        yield from range(self.drawn[0], self.drawn[0] + 16)


class Growing(Own):
    def __iter__(self) -> Iterator[int]:
        yield from range(16 + self.epoch)


@pytest.mark.parametrize(
    ("sampler", "text"),
    [
        (SubsetRandomSampler(range(7)), r"\(SubsetRandomSampler\) gives 7 samples, fewer than one batch"),
        (SubsetRandomSampler(range(30, 41)), r"\(SubsetRandomSampler\) gives index 40, and the dataset has 40 samples"),
        (Changing(), r"\(Changing\) gives another order when it is iterated over again"),
        (Growing(), r"\(Growing\) gives 17 samples in epoch 1, and 16 in the first: let it give as many in each"),
    ],
)
def test_what_cannot_be_is_refused(sampler: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        epoch(source(sampler), 1)


def test_what_torchdatas_loaders_have_is_taken_as_torchs() -> None:
    """Its StatefulDataLoader is a DataLoader with samplers of its own; any other subclass is the script's."""
    shuffled = type("RandomSampler", (RandomSampler,), {"__module__": "torchdata.stateful_dataloader.sampler"})
    batches = type("BatchSampler", (BatchSampler,), {"__module__": "torchdata.stateful_dataloader.sampler"})
    loader = DataLoader(NUMBERS, batch_size=2)
    loader.__dict__ |= {"sampler": shuffled(NUMBERS), "batch_sampler": batches(shuffled(NUMBERS), 2, False)}
    found, expected = source_of(loader), source_of(NUMBERS)
    assert [epoch(found, number) for number in (1, 0)] == [epoch(expected, number) for number in (1, 0)]
    evaluated = EvaluationData(loader, 2, 0)
    assert [batch.tolist() for _, batch in evaluated.batches(range(2))] == [[100, 101], [102, 103]]
    loader.__dict__["batch_sampler"] = type("Own", (BatchSampler,), {})(range(40), 2, False)
    with pytest.raises(UsageError, match="has its own batch sampler"):
        source_of(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluation_of_what_a_sampler_chooses(workers: int) -> None:
    """In its order; another one in another step; and no generator of the process is drawn from."""
    chooses = SubsetRandomSampler([31, 4, 15, 9, 26], generator=torch.Generator())
    loader = DataLoader(NUMBERS, batch_size=2, sampler=chooses, drop_last=True, num_workers=workers)
    before, own = torch.get_rng_state(), chooses.generator.get_state()
    evaluated = EvaluationData(loader, 2, 0)
    orders = [evaluated.draw(version) for version in (7, 7, 8)]
    assert sorted(orders[0]) == [4, 9, 15, 26, 31]
    assert orders[0] == orders[1] != orders[2]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(chooses.generator.get_state(), own)
    evaluated.choose(orders[0])
    assert (evaluated.samples, evaluated.count) == (4, 2)
    found = [batch.tolist() for _, batch in evaluated.batches(range(2))]
    assert found == [[100 + i for i in orders[0][:2]], [100 + i for i in orders[0][2:4]]]
    with pytest.raises(UsageError, match=r"\(SubsetRandomSampler\) gives index 40, and the dataset has 40 samples"):
        EvaluationData(DataLoader(NUMBERS, sampler=SubsetRandomSampler([40])), 2, 0).draw(0)


def test_the_order_of_an_epoch_is_chosen() -> None:
    """Of the ranks whose sampler has given the orders so far; one that joins has to show it, or has theirs."""
    at_first, later = (torch.linspace(1, 9, 20), torch.linspace(9, 1, 20))
    old, new = (changeable(at_first) for _ in range(2))

    def agreed(epoch: int, *orders: SampledOrder) -> int:
        drawn = {rank: order.draw(epoch) for rank, order in enumerate(orders)}
        rank = old.choose(drawn, epoch)
        for order in orders:
            order.take(epoch, drawn[rank].digest, orders[rank].own(epoch))
        assert len({tuple(order.sample(epoch, i) for i in range(20)) for order in orders}) == 1
        return rank

    assert agreed(0, new, old) == 0
    old._sampler.weights = later
    assert agreed(1, old) == 0
    joined = changeable(at_first)
    joined.load_state_dict(old.state_dict())
    assert agreed(2, joined, old) == 1, "what the one that joined gives for epoch 1 is wrong"
    assert agreed(3, joined, old) == 1
    with pytest.raises(UsageError, match="and no rank is left that has that"):
        agreed(4, joined)
    restored = changeable(at_first)
    restored.load_state_dict(old.state_dict())
    restored._sampler.weights = later
    assert agreed(4, restored, joined) == 0, "it has shown that its sampler is right"
    old._sampler.weights = at_first
    with pytest.raises(UsageError, match="gives one order of epoch 5 on rank 0, and another on rank 1"):
        agreed(5, old, restored)


def changeable(weights: torch.Tensor) -> SampledOrder:
    return SampledOrder(WeightedRandomSampler(weights, 20), 20, 4, 7, Heard())


def test_long_orders_are_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everstep.elastic.step.sampled.SENT", 19)
    order = changeable(torch.linspace(1, 9, 20))
    drawn = order.draw(0)
    assert order.own(0) is None
    order.take(0, drawn.digest, None)
    with pytest.raises(UsageError, match="orders of more than 19 samples are not sent"):
        order.take(0, "another", None)


def test_a_change_of_the_dataset_that_worker_processes_do_not_have() -> None:
    """It is warned of once, also in a dataset that another one wraps; in an epoch that begins they have it."""

    class Sized(Dataset[int]):
        size = 3

        def __init__(self) -> None:
            self.size = 7

        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> int:
            return self.size

    heard: list[str] = []

    class Channel:
        def note(self, what: str, fields: Any) -> None:
            heard.append(fields["notice"])

    dataset = Sized()
    loader = DataLoader(Subset(dataset, range(40)), batch_size=2, num_workers=1)
    data = DataSource(loader, SETTINGS, None, Channel(), StreamPlace(Progress(None, 0, 1, [])))
    steps = data.order.epoch_steps
    upcoming = partial(iter, [(step, slot) for step in range(steps) for slot in range(4)])
    try:
        assert data.fetch(0, 0, upcoming).tolist() == [7, 7]
        dataset.size = 9
        for slot in (1, 2):
            assert data.fetch(0, slot, upcoming).tolist() == [7, 7]
            assert heard == ["dataset-changed"]
        data.begin_epoch(0)
        assert data.fetch(0, 3, upcoming).tolist() == [9, 9]
        assert heard == ["dataset-changed"]
    finally:
        data.close()
