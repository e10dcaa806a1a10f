"""The contract of every source of shards, and the loader that asks them one after the other."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_sources import PLACES, VERSION, Ahead, InStorage, Place, Rank, same
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from everstep.checkpointing.universal.manifest import CheckpointError
from everstep.elastic.engine.loading import LiveValues
from everstep.elastic.holding.shard_store import ShardStore
from everstep.resharding.moves import SourceKind
from tests.jobs import wait_until

MIB = 1 << 20
NAMES = list(PLACES)
GUARDED = ["memory", "keeper", "replay", "parity"]  # these may lack a shard


def test_every_kind_of_source_is_tested() -> None:
    assert set(NAMES) == {kind.value for kind in SourceKind}


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    made = PLACES[request.param](Rank(), tmp_path)
    yield made
    made.close()


def held(place: Place) -> list[int]:
    """The shards that a place has."""
    return getattr(place, "held", place.rank.shards)


@pytest.mark.parametrize("place", NAMES, indirect=True)
def test_what_is_read_is_the_state_in_every_bit(place: Place) -> None:
    found = place.rank.restored(place.source, held(place))
    assert sorted(found) == held(place)
    for shard, state in found.items():
        assert same(state, place.expected(shard))


@pytest.mark.parametrize("place", NAMES, indirect=True)
def test_shards_are_read_in_any_order_and_again(place: Place) -> None:
    shards = held(place)[::-1][:2]
    first, second = (place.rank.restored(place.source, shards) for _ in range(2))
    assert sorted(first) == sorted(shards)
    assert all(same(first[shard], second[shard]) for shard in shards)


@pytest.mark.parametrize("place", NAMES, indirect=True)
def test_what_was_loaded_is_a_copy(place: Place) -> None:
    """Training modifies it in place, and the source does not change."""
    shard = held(place)[0]
    target = place.rank.empty([shard])
    for found in place.source.read([shard], VERSION):
        target.load(found.shard, found.state)
        before = {n: v.clone() for n, v in found.state.items() if isinstance(v, torch.Tensor)}
        for value in target.state(shard).values():
            if isinstance(value, torch.Tensor):
                value.add_(1)
        assert all(torch.equal(found.state[name], value) for name, value in before.items())


@pytest.mark.parametrize("place", GUARDED, indirect=True)
def test_another_version_is_not_there(place: Place) -> None:
    assert list(place.source.read(held(place), VERSION + 5)) == []


@pytest.mark.parametrize("place", GUARDED, indirect=True)
def test_a_flipped_bit_is_never_loaded(place: Place) -> None:
    shard, *others = held(place)
    place.damage(shard)
    found = place.rank.restored(place.source, [shard, *others])
    assert shard not in found
    assert found, "the others are there"
    assert all(same(state, place.expected(other)) for other, state in found.items())


@pytest.mark.parametrize("place", ["storage"], indirect=True)
def test_a_damaged_checkpoint_says_so(place: InStorage) -> None:
    shard = held(place)[0]
    place.damage(shard)
    with pytest.raises(CheckpointError, match="is damaged"):
        list(place.source.read([s for s in held(place) if same_parameter(place, shard, s)], VERSION))


def same_parameter(place: Place, one: int, other: int) -> bool:
    shards = place.rank.spec.shards
    return shards[one].parameter == shards[other].parameter


# ---------------------------------------------------------------- copies on the way in


class Copied(TorchDispatchMode):
    """Counts the bytes that torch writes: results in new memory, and what is copied into given memory."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func._schema.name.startswith(("aten::empty", "aten::new_empty")):
            inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            fresh = result.untyped_storage().data_ptr() not in inputs
            if fresh or func._schema.name in ("aten::copy_", "aten::fill_"):
                self.bytes += result.numel() * result.element_size()
        return result


@contextmanager
def python_peak() -> Iterator[Callable[[], int]]:
    """How many bytes Python objects (bytes, bytearrays, arrays) took at most, beyond those that were there."""
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    try:
        yield lambda: tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def large(*, apart: bool) -> Rank:
    """Two shards, each of 8 MiB of values and as much of momentum."""
    return Rank(
        lambda: nn.Sequential(*(nn.Linear(2048, 1024, bias=False) for _ in range(2))),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        whole=True,
        apart=apart,
    )


@pytest.mark.parametrize(
    ("name", "buffers"),
    # of the shard's size, at one time: none, one that the bytes come into, or all that parity is decoded with
    [("memory", 0), ("keeper", 1), ("replay", 1), ("parity", 3), ("storage", 1), ("peer", 1)],
)
def test_bytes_are_copied_at_most_twice(name: str, buffers: int, tmp_path: Path) -> None:
    """Once into memory of this process, if at all, and once into place.

    A copy from one Python buffer to another needs both at once: where there is one at most, there was none.
    """
    rank = large(apart=name in ("keeper", "replay", "parity"))
    place = PLACES[name](rank, tmp_path)
    shard = held(place)[0]
    target = LiveValues(rank.stack) if name == "peer" else rank.empty([shard])
    length = sum(v.numel() * v.element_size() for v in rank.state[shard].values() if isinstance(v, torch.Tensor))
    if name == "peer":
        length //= 2
    assert length >= 8 * MIB
    with Copied() as copied, python_peak() as peak:
        for found in place.source.read([shard], VERSION):
            target.load(found.shard, found.state)
        most = peak()
    place.close()
    assert copied.bytes <= 1.01 * length, "torch copies it into place, once"
    gradient = length // 2 if name == "replay" else 0
    assert most <= (buffers + 0.05) * length + gradient


# ---------------------------------------------------------------- copies ahead of a switch


def test_what_copies_lack_at_the_switch_is_one_gradient(tmp_path: Path) -> None:
    place = Ahead(Rank(), tmp_path)
    try:
        place.prefetch.end()
        place.begin()
        wait_until(lambda: not place.prefetch.waits(place.plan, 0), 20, "all records are copied")
        source, records = place.source_of_copies(), place.prefetch.bytes
        place.prefetch.committed(place.rank.terms)
        restored = place.rank.restored(source, place.rank.shards)
        assert sorted(restored) == place.rank.shards
        assert all(same(state, place.expected(shard)) for shard, state in restored.items())
        assert place.prefetch.bytes - records == sum(gradient.nbytes for gradient in place.rank.gradients.values())
        assert list(source.read(place.rank.shards, VERSION + 1)) == [], "they are too old for that"
    finally:
        place.close()


def test_a_flipped_bit_is_not_copied_ahead(tmp_path: Path) -> None:
    place = Ahead(Rank(), tmp_path)
    try:
        place.prefetch.end()
        place.damage(place.rank.shards[0])
        place.begin()
        others = place.rank.shards[1:]
        wait_until(lambda: set(others) <= place.copied(), 20, "the others are copied")
        assert place.prefetch.waits(place.plan, 0)
        place.prefetch.committed(place.rank.terms)
        assert sorted(place.rank.restored(place.source_of_copies(), place.rank.shards)) == others
    finally:
        place.close()


def test_copies_that_fail_are_warned_of_and_waited_for_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Training needs no copy: what moves is read at the switch."""
    place = Ahead(Rank(), tmp_path)

    def full(store: ShardStore, *_: object) -> None:
        raise MemoryError("no room for a copy")

    try:
        place.prefetch.end()
        monkeypatch.setattr(ShardStore, "load", full)
        place.begin()
        wait_until(lambda: not place.prefetch.waits(place.plan, 0), 20, "it is not waited for")
        assert list(place.source_of_copies().read(place.rank.shards, VERSION)) == []
    finally:
        place.close()
    assert "copied ahead of a rebalance (MemoryError: no room for a copy)" in capfd.readouterr().err
