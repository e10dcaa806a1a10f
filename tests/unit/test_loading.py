"""The loader: sources in order of preference, and a replay that no abort interrupts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from everstep.comms.mesh.communicator import Aborted
from everstep.elastic.engine import loading
from everstep.elastic.engine.loading import Loader
from everstep.elastic.holding.source import Found, ShardSource
from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.terms import Terms
from everstep.resharding.layout import Layout
from everstep.resharding.moves import PROTECTED, SAVED, Move, SourceKind, What
from everstep.resharding.plan import Plan
from tests.terms import agreed

VERSION = 5
WORKER = e.WorkerId(0, 0)
AGREED = agreed(step=4).to_text()
PLAN = Plan(layout=Layout(3, 1, (), (), ()), version=VERSION)


class Fake(ShardSource):
    """A source with some shards; those in `behind` as the version before and a gradient."""

    def __init__(self, asked: list[Any], name: str, shards: Sequence[int], behind: Sequence[int] = ()) -> None:
        self.asked, self.name, self.shards, self.behind = asked, name, list(shards), behind

    def read(self, shards: Sequence[int], version: int) -> Iterator[Found]:
        self.asked.append((self.name, tuple(shards)))
        for shard in shards:
            if shard in self.shards:
                yield Found(shard, {"value": self.name}, torch.ones(1) if shard in self.behind else None)


class Job:
    """A loader with test sources, and a record of all calls of its target and its coordinator."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **sources: tuple[Sequence[int], Sequence[int]]) -> None:
        self.asked: list[Any] = []
        self.happened: list[Any] = []
        self.told: list[Any] = []
        self.aborts_after = 1000  # number of looks at the communicator before it aborts
        self.now = 0.0
        comm = SimpleNamespace(ready=self._ready)
        progress = SimpleNamespace(waiting=lambda what: contextlib.nullcontext(), tick=lambda: None)
        membership = SimpleNamespace(tell=self.told.append, worker=WORKER)
        self.loader = Loader(SimpleNamespace(comm=comm, progress=progress, membership=membership), "", "")  # type: ignore[arg-type]
        self.sources = {SourceKind(name): Fake(self.asked, name, *has) for name, has in sources.items()}
        empty = Fake(self.asked, "empty", ())
        monkeypatch.setattr(self.loader, "_source", lambda plan, kind, *rest: self.sources.get(kind, empty))
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=self._sleep)
        monkeypatch.setattr(loading, "time", clock)

    def _ready(self, wanted: object) -> None:
        self.aborts_after -= 1
        if self.aborts_after < 0:
            raise Aborted(3)

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def load(self, shard: int, state: Any) -> None:
        self.happened.append((shard, state["value"]))

    def update(self, gradients: dict[int, Tensor], terms: Terms) -> None:
        self.happened.append(("update", sorted(gradients), terms.step))

    def carry_out(self, *shards: int, sources: tuple[SourceKind, ...] = PROTECTED) -> None:
        moves = [Move(shard, (0,), What.OWN, sources) for shard in shards]
        self.loader.load(PLAN, self, moves, VERSION, AGREED)


def test_the_next_source_is_asked_for_what_the_one_before_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(monkeypatch, memory=([1], []), replay=([1, 2], []), parity=([1, 2, 3], []))
    job.carry_out(1, 2, 3)
    assert job.happened == [(1, "memory"), (2, "replay"), (3, "parity")]
    assert job.asked == [("memory", (1, 2, 3)), ("replay", (2, 3)), ("parity", (3,))]


def test_only_the_sources_of_a_move_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(monkeypatch, memory=([1], []), storage=([1], []))
    job.carry_out(1, sources=SAVED)
    assert job.asked == [("storage", (1,))]
    job.carry_out()
    assert len(job.asked) == 1, "nothing is missing"


def test_shards_that_are_a_version_behind_are_brought_forward_together(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(monkeypatch, replay=([1, 2, 3], [1, 3]))
    job.carry_out(1, 2, 3)
    assert job.happened == [(2, "replay"), (1, "replay"), (3, "replay"), ("update", [1, 3], 4)]


@pytest.mark.parametrize("looks", range(5))
def test_an_abort_leaves_no_value_of_the_version_before(monkeypatch: pytest.MonkeyPatch, looks: int) -> None:
    """A rank may report values as valid that a replay writes to: so it writes all of them, or none."""
    job = Job(monkeypatch, replay=([1, 2, 3], [1, 3]))
    job.aborts_after = looks
    with contextlib.suppress(Aborted):
        job.carry_out(1, 2, 3)
    behind = [item for item in job.happened if item[0] in (1, 3)]
    assert bool(behind) == (job.happened[-1:] == [("update", [1, 3], 4)])


def test_shards_that_are_nowhere_are_reported_once_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(monkeypatch, memory=([1], []))
    job.aborts_after = 200
    with pytest.raises(Aborted):
        job.carry_out(1, 2, 3)
    assert job.told == [e.WorkerLacking(WORKER, 3, VERSION, (2, 3))]
    assert job.now > loading.ANSWERED_PATIENCE_S
    found = Job(monkeypatch, memory=([1], []), replay=([], []))
    late = found.sources[SourceKind.REPLAY]
    monkeypatch.setattr(loading.time, "sleep", lambda seconds: late.shards.append(2))
    found.carry_out(1, 2)
    assert found.happened == [(1, "memory"), (2, "replay")]
    assert not found.told
