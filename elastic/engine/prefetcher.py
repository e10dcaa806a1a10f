"""Copies of shards that a rank is to own, made in a thread while it trains: records first, then each step's gradient.

`Copies` decides what is read next. All of it is read from keepers, so no other rank does anything for it. Records are
read half of the time only, so that training has more than half of the links, and of this processor.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from everstep.checkpointing.access.client import Fetched
from everstep.checkpointing.access.restore import Keepers
from everstep.checkpointing.memory.record import read_record
from everstep.elastic.contract.membership import Membership, Orders
from everstep.elastic.contract.notices import Notice, warn
from everstep.elastic.holding.shard_store import ShardStore
from everstep.elastic.holding.source import Found
from everstep.elastic.holding.user_optimizer import UserOptimizer
from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.prefetching import PATIENCE_S, Copies, Copying, Wanted
from everstep.elastic.protocol.terms import Terms
from everstep.elastic.step.devices import make_current
from everstep.elastic.step.exchange import Exchange
from everstep.resharding.layout import Layout
from everstep.resharding.plan import Plan

AGAIN_S = 0.02  # interval at which keepers are asked again for what they lack
LAST_S = 5.0  # how long the switch waits for the gradient of the last step, before all is read again


class _Over(Exception):
    """The copies are of no more use."""


class Prefetcher:
    """The copies of one rank. The thread reads and updates them; all other calls are the main thread's."""

    def __init__(self, optimizer: UserOptimizer, exchange: Exchange, membership: Membership, token: str) -> None:
        self._store = ShardStore(optimizer)
        self._exchange = exchange
        self._membership = membership
        self._token = token  # of the job, for its keepers
        self._changed = threading.Condition()
        self._copies: Copies | None = None
        self._going_on = False  # the thread has not been asked to end
        self._version = 0  # of the rank
        self._terms: dict[int, Terms] = {}  # step -> what was agreed in it
        self._deadline_s = 0.0
        self._error: Exception | None = None
        self.generation = 0  # of the plan that was prefetched for last
        self.bytes = 0  # read for it

    def begin(self, orders: Orders, layout: Layout, rank: int, version: int) -> None:
        """Begin to copy what this rank, at `version`, is to own by a plan, from the nodes of its owners in `layout`."""
        self.end()
        plan, spec = orders.plan, self._exchange.stack.spec
        copies = Copies(plan, rank)
        self.generation, self.bytes, self._version = plan.generation, 0, version
        self._deadline_s = time.monotonic() + PATIENCE_S
        if not copies.versions:
            return
        self._store.own(spec.shards[shard] for shard in copies.versions)
        with self._changed:
            self._copies, self._going_on, self._terms = copies, True, {}
        nodes = {orders.nodes[layout.owners[shard]] for shard in copies.versions}
        addresses = {node: address for node, address in orders.keepers.items() if node in nodes}
        args = (copies, addresses, plan)
        threading.Thread(target=self._run, args=args, name="everstep-prefetch", daemon=True).start()

    def committed(self, terms: Terms) -> None:
        """This rank is at the version after the step of `terms`."""
        with self._changed:
            if self._copies is not None:
                self._version = terms.step + 1
                self._terms[terms.step] = terms
                self._changed.notify_all()

    def waits(self, plan: Plan | None, rank: int) -> bool:
        """Whether this rank is not ready to enter a plan: copies are missing, and the time for them is not over."""
        self._warn_of_failure()
        with self._changed:
            late = time.monotonic() > self._deadline_s
            return Copying(self.generation, self._copies, self._version, late).waits(plan, rank)

    def _warn_of_failure(self) -> None:
        """Copies only save time: where making them fails, training continues without them."""
        with self._changed:
            error = self._error
        if error is not None:
            self.end()
            warn(
                self._membership,
                Notice.PREFETCH_FAILED,
                f"shards could not be copied ahead of a rebalance ({type(error).__name__}: {error}): they are read "
                "when the members switch, and that step takes longer",
            )

    def read(self, shards: Sequence[int], version: int, on_wait: Callable[[], None]) -> Iterator[Found]:
        """The copies at `version`, once those of the version before have the gradient that leads on. The thread ends.

        `on_wait` is called meanwhile, and may raise to give up.
        """
        deadline_s = time.monotonic() + LAST_S
        while self._catches_up(version) and time.monotonic() < deadline_s:
            on_wait()
        with self._changed:
            self._going_on = False
            self._changed.notify_all()
        there = self._copies.versions if self._copies is not None else {}
        for shard in shards:
            if there.get(shard) == version:
                yield Found(shard, self._store.state(shard))

    def _catches_up(self, version: int) -> bool:
        """Whether copies are about to reach `version`; waits a moment for them."""
        with self._changed:
            going_on = self._copies is not None and self._going_on and self._error is None
            catches_up = going_on and self._copies is not None and version - 1 in self._copies.versions.values()
            if catches_up:
                self._changed.wait(AGAIN_S)
            return catches_up

    def end(self) -> None:
        """Drop all copies."""
        with self._changed:
            self._copies, self._going_on, self._error = None, False, None
            self._changed.notify_all()
        self._store.own(())

    # ------------------------------------------------------------ the thread

    def _run(self, copies: Copies, addresses: Mapping[str, str], plan: Plan) -> None:
        keepers = Keepers(addresses, self._token, lambda: self._check(copies), plan.lines)
        try:
            make_current(self._exchange.stack.device)
            while True:
                wanted, version, terms = self._next(copies)
                began_s = time.monotonic()
                if terms is None:
                    for item in keepers.fetch(wanted.shards, wanted.version, replay=False):
                        self._load(copies, wanted, item)
                    time.sleep(time.monotonic() - began_s)
                else:
                    found = list(keepers.gradients(wanted.shards, wanted.version, terms.generation))
                    self._update(copies, wanted, found, terms)
                if not self._got(copies, wanted, version):
                    time.sleep(AGAIN_S)
                    keepers.unreachable.clear()
        except _Over:
            pass
        except Exception as error:
            with self._changed:
                if self._copies is copies:
                    self._error = error
        finally:
            keepers.close()
            for damage in keepers.damage:
                self._membership.tell(e.CorruptionFound(self._membership.worker, plan.generation, **damage))

    def _check(self, copies: Copies) -> None:
        if self._copies is not copies or not self._going_on:
            raise _Over

    def _next(self, copies: Copies) -> tuple[Wanted, int, Terms | None]:
        """What to read next, once there is something, at which version of the rank, and the terms of a gradient."""
        with self._changed:
            while True:
                self._check(copies)
                wanted = copies.wanted(self._version)
                if wanted is not None:
                    return wanted, self._version, self._terms[wanted.version] if wanted.gradient else None
                self._changed.wait()

    def _load(self, copies: Copies, wanted: Wanted, item: Fetched) -> None:
        with self._changed:
            self._check(copies)
            self._store.load(item.shard, read_record(item.parts[0]))
            self._read(copies, wanted, [item])

    def _update(self, copies: Copies, wanted: Wanted, items: Sequence[Fetched], terms: Terms) -> None:
        gradients = {item.shard: self._gradient(item) for item in items}
        with self._changed:
            self._check(copies)
            if gradients:
                self._store.update(gradients, terms)
            self._read(copies, wanted, items)

    def _read(self, copies: Copies, wanted: Wanted, items: Sequence[Fetched]) -> None:
        for item in items:
            copies.read(wanted, item.shard)
            self.bytes += sum(map(len, item.parts))
        self._changed.notify_all()

    def _gradient(self, item: Fetched) -> torch.Tensor:
        dtype = self._exchange.accumulation(self._exchange.stack.spec.shards[item.shard])
        return torch.frombuffer(item.parts[0], dtype=dtype) if item.parts[0] else torch.empty(0, dtype=dtype)

    def _got(self, copies: Copies, wanted: Wanted, version: int) -> bool:
        """Whether all of the wanted was read; notes what was not."""
        with self._changed:
            copies.lacked(wanted, version)
            done = wanted.version + wanted.gradient
            return all(copies.versions[shard] == done for shard in wanted.shards)


@dataclass(frozen=True)
class Prefetched:
    """The copies as a source."""

    prefetch: Prefetcher
    on_wait: Callable[[], None]

    def read(self, shards: Sequence[int], version: int) -> Iterator[Found]:
        return self.prefetch.read(shards, version, self.on_wait)
