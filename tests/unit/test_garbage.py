"""A burst of new objects is not scanned repeatedly, and yet no garbage stays for good."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from everstep.agents.coordinator import gc_tuning as garbage
from everstep.agents.coordinator.gc_tuning import LongLived


class Knot:
    """An object that refers to itself."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_came_is_set_aside() -> None:
    gc.unfreeze()
    long_lived = LongLived()
    long_lived.look(0)
    assert gc.get_freeze_count() == 0
    kept = [Knot() for _ in range(1000)]
    long_lived.look(1)
    assert gc.get_freeze_count() > len(kept)
    count = gc.get_freeze_count()
    more = [Knot() for _ in range(1000)]
    long_lived.look(1)
    assert gc.get_freeze_count() <= count + 10, "nobody came: what is made meanwhile is looked at"
    del more


def test_garbage_that_was_set_aside_is_found_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    long_lived = LongLived()
    knot = Knot()
    gone = weakref.ref(knot)
    long_lived.look(1)
    del knot
    gc.collect()
    assert gone() is not None, "it was set aside"
    monkeypatch.setattr(garbage, "SWEEP_S", 0.0)
    long_lived.look(1)
    assert gone() is None
