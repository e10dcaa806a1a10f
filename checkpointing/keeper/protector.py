"""Encodes the parity that a node holds, version after version, from what other nodes' keepers send on request."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from everstep.checkpointing.access.client import KeeperClient, KeeperRefused
from everstep.checkpointing.memory.checksum import matches
from everstep.comms.base.process import let_compute_go_first
from everstep.resharding.parity_versions import ParityVersions

from .keeper import Generation, Keeper
from .parity import ParityBlock, ParityStore

FLOWS = 2  # connections to each other node
RETRY_S = 0.05
WAIT_SLICE_S = 0.1


@dataclass(frozen=True)
class MissingMember:
    """One member that one of our blocks needs."""

    block: ParityBlock
    member: int
    shard: int


class Protector:
    """Makes a node's part of each version survive the loss of other nodes. `state()` returns its progress."""

    def __init__(self, keeper: Keeper, store: ParityStore, token: str) -> None:
        self._keeper = keeper
        self._store = store
        self._token = token
        self._versions = ParityVersions()  # with the keeper's condition
        self._clients: dict[tuple[str, int], KeeperClient] = {}
        self._pool = ThreadPoolExecutor(64, "everstep-parity", initializer=let_compute_go_first)
        threading.Thread(target=self._run, name="everstep-protector", daemon=True).start()

    # ------------------------------------------------------------ requests of workers

    def want(self, generation: int, version: int, protected: int) -> None:
        """Workers here have sealed `version`; everything before `protected` may go."""
        keeper = self._keeper
        with keeper.changed:
            if keeper.membership is None or keeper.membership.generation != generation:
                return
            self._versions.want(version, protected)
            keeper.changed.notify_all()

    def enter(self) -> None:
        """Start a new generation: drop the requests of the last one; workers repeat them."""
        with self._keeper.changed:
            membership = self._keeper.membership
            assert membership is not None
            self._versions.enter(membership.generation, membership.line)
            self._keeper.changed.notify_all()

    def state(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(generation, version): the newest version that is whole here, parity of others included.

        In this generation (-1: none yet), and in the last one that had any.
        """
        with self._keeper.changed:
            return self._versions.complete, self._versions.before

    # ------------------------------------------------------------ the work

    def _run(self) -> None:
        let_compute_go_first()
        while True:
            with self._keeper.changed:
                while not self._versions.wanted:
                    self._keeper.changed.wait()
                membership, version = self._keeper.membership, self._versions.wanted[0]
                kept = self._versions.kept()
            assert membership is not None
            for flow in [flow for flow in self._clients if flow[0] not in membership.addresses]:
                self._forget(flow)  # connections to lost nodes
            self._store.keep(kept)
            whole = self._encode(membership, version) and self._await_own(membership, version)
            with self._keeper.changed:
                self._versions.done(membership.generation, version, whole=whole)

    def _given_up(self, membership: Generation, version: int) -> bool:
        """Whether this version is obsolete: another generation began, or two newer versions are requested."""
        with self._keeper.changed:
            return self._versions.is_over(membership.generation)

    def _encode(self, membership: Generation, version: int) -> bool:
        """Bring our blocks of `version` up; whether all are sealed."""
        capacities = membership.capacities
        blocks: list[tuple[int, ParityBlock]] = []
        for number, row in membership.placement.held_by(self._keeper.node):
            stripe = membership.placement.stripes[number]
            block = self._store.open(version, stripe, row, capacities[number], membership.lines)
            blocks.append((number, block))
        self._store.trim(block.capacity for _, block in blocks)
        by_flow: dict[tuple[str, int], list[MissingMember]] = {}
        for number, block in blocks:
            stripe = membership.placement.stripes[number]
            for member, (shard, node) in enumerate(zip(stripe.shards, stripe.nodes, strict=True)):
                if block.checksum is None and member not in block.members:
                    piece = MissingMember(block, member, shard)
                    by_flow.setdefault((node, number % FLOWS), []).append(piece)
        flows = [self._pool.submit(self._pull, membership, version, *item) for item in by_flow.items()]
        for flow in flows:
            flow.result()
        return all(block.checksum is not None for _, block in blocks)

    def _await_own(self, membership: Generation, version: int) -> bool:
        """Wait until the shards that this node owns are sealed; whether they are."""
        own = [
            shard
            for stripe in membership.placement.stripes
            for shard, node in zip(stripe.shards, stripe.nodes, strict=True)
            if node == self._keeper.node
        ]
        while not self._given_up(membership, version):
            with self._keeper.changed:
                if all(self._keeper.located(shard, version, membership.lines) for shard in own):
                    return True
                self._keeper.changed.wait(WAIT_SLICE_S)
        return False

    def _pull(self, membership: Generation, version: int, flow: tuple[str, int], pieces: list[MissingMember]) -> None:
        """Fetch the pieces that one node holds, over one connection, until all are in or the version is obsolete."""
        staging = bytearray(max(piece.block.capacity for piece in pieces))
        distrusted: dict[int, int] = {}
        while pieces and not self._given_up(membership, version):
            try:
                client = self._client(membership, flow)
                for piece, length, checksum in self._collect(client, membership, version, pieces, staging):
                    started = time.monotonic()
                    with memoryview(staging) as whole, whole[:length] as data:
                        sound = matches(data, checksum, piece.shard, version)
                        if sound:
                            piece.block.add(piece.member, data, checksum)
                    if sound:
                        self._store.encoded(length, time.monotonic() - started)
                    else:
                        distrusted[piece.shard] = distrusted.get(piece.shard, 0) + 1
                        detail = f"version {version}, on its way to the parity on {self._keeper.node}"
                        self._keeper.found_damage("keeper", flow[0], piece.shard, detail)
            except KeeperRefused:
                self._forget(flow)
                return
            except (OSError, ValueError):
                self._forget(flow)
                with self._keeper.changed:
                    self._keeper.changed.wait(RETRY_S)
            pieces = [p for p in pieces if p.member not in p.block.members and distrusted.get(p.shard, 0) < 2]

    def _collect(
        self,
        client: KeeperClient,
        membership: Generation,
        version: int,
        pieces: list[MissingMember],
        staging: bytearray,
    ) -> Iterator[tuple[MissingMember, int, int]]:
        def patient() -> None:
            if self._given_up(membership, version):
                raise KeeperRefused("this version is no longer needed")

        shards = [piece.shard for piece in pieces]
        answers = client.collect(shards, version, membership.generation, staging, patient, membership.lines)
        for piece, (length, checksum) in zip(pieces, answers, strict=True):
            yield piece, length, checksum

    def _client(self, membership: Generation, flow: tuple[str, int]) -> KeeperClient:
        client = self._clients.get(flow)
        address = membership.addresses[flow[0]]
        if client is None or client.address != address or client.closed:
            self._forget(flow)
            client = self._clients[flow] = KeeperClient(address, self._token)
        return client

    def _forget(self, flow: tuple[str, int]) -> None:
        client = self._clients.pop(flow, None)
        if client is not None:
            client.close()
