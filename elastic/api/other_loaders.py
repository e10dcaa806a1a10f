"""Another DataLoader that the script takes batches of in its turns, as by `zip(batches, unlabelled)`.

Which batches a turn gets of it depends on how many turns its rank has had before, and so on the number of ranks. One
whose iterator begins and ends within a turn, as that of an evaluation, depends on nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import dataloader

from everstep.elastic.contract.membership import Membership
from everstep.elastic.contract.notices import Notice, warn


class OtherLoaders:
    """Warns of one, once."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._in_turn = False
        self._said = False
        self._begun: weakref.WeakSet[Any] = weakref.WeakSet()  # iterators that began in the present turn

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """The script's code has a turn."""
        self._begun.clear()
        self._in_turn = True
        try:
            yield
        finally:
            self._in_turn = False

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Follow what the iterators of torch's DataLoader do: there is no hook for it."""
        kind: Any = dataloader._BaseDataLoaderIter
        originals = {name: getattr(kind, name) for name in ("__init__", "_reset", "__next__")}
        for name, seen in (("__init__", self._begins), ("_reset", self._begins), ("__next__", self._advances)):
            setattr(kind, name, _followed(originals[name], seen))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(kind, name, original)

    def _begins(self, iterator: Any) -> None:
        if self._in_turn:
            self._begun.add(iterator)

    def _advances(self, iterator: Any) -> None:
        if not self._in_turn or self._said or iterator in self._begun:
            return
        self._said = True
        text = (
            "the script takes batches of another DataLoader in its turns (zip, next): which ones a turn gets depends "
            "on how many turns its rank has had, and so a loss that they are part of depends on the number of ranks. "
            "Let one dataset give the samples of both, and prepare a DataLoader of it"
        )
        warn(self._membership, Notice.OTHER_LOADER, text, rank=self._membership.worker.rank)


def _followed(original: Callable[..., Any], seen: Callable[[Any], None]) -> Callable[..., Any]:
    @functools.wraps(original)
    def follow(iterator: Any, *arguments: Any, **named: Any) -> Any:
        seen(iterator)
        return original(iterator, *arguments, **named)

    return follow
