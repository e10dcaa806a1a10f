"""Shards back from wherever they are: a keeper's copy, the copy before it and a gradient, or the rest of their stripe.

What is damaged is passed over and reported; what is missing everywhere is said to be, not waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from everstep.checkpointing.memory.segment import checksum_of

from .client import KeeperClient, KeeperRefused
from .erasure import Code

SHARDS_PER_FETCH = 16
Fetched = tuple[int, list[bytes]]  # version, [state] or [state, gradient that leads to the next]


@dataclass
class Sources:
    """The keepers of a job, as one rank reaches them. `on_wait` is called while it waits, and may raise to give up."""

    addresses: Mapping[str, str]  # node -> host:port; nearest first
    token: str
    on_wait: Callable[[], None]
    unreachable: set[str] = field(default_factory=set)
    damage: list[dict[str, Any]] = field(default_factory=list)
    _clients: dict[str, KeeperClient] = field(default_factory=dict)

    def fetch(self, shards: Iterable[int], version: int, *, replay: bool, decode: bool = True) -> dict[int, Fetched]:
        """The shards that can be had at `version`; with `replay`, also as the version before and its gradient."""
        missing = list(shards)
        found: dict[int, Fetched] = {}
        for node in self.addresses:
            for first in range(0, len(missing), SHARDS_PER_FETCH):
                found.update(self._ask(node, missing[first : first + SHARDS_PER_FETCH], version, replay))
                self.on_wait()
            missing = [shard for shard in missing if shard not in found]
        if missing and decode:
            found.update(self._decode(missing, version))
        return found

    def _ask(self, node: str, shards: list[int], version: int, replay: bool) -> dict[int, Fetched]:
        client = self._client(node)
        if client is None:
            return {}
        try:
            found, damaged = client.fetch(shards, version, replay=replay)
        except (OSError, ValueError, KeeperRefused):
            self._lose(node)
            return {}
        for shard in damaged:
            self._found_damage("keeper", node, shard, f"version {version}")
        return found

    def _client(self, node: str) -> KeeperClient | None:
        client = self._clients.get(node)
        if client is None and node not in self.unreachable:
            try:
                client = self._clients[node] = KeeperClient(self.addresses[node], self.token, self.on_wait)
            except OSError:
                self.unreachable.add(node)
        return client

    def _lose(self, node: str) -> None:
        self.unreachable.add(node)
        client = self._clients.pop(node, None)
        if client is not None:
            client.close()

    def _found_damage(self, where: str, node: str, shard: int, detail: str) -> None:
        self.damage.append({"where": where, "node": node, "shard": shard, "detail": detail})

    # ------------------------------------------------------------ from parity

    def _decode(self, shards: list[int], version: int) -> dict[int, Fetched]:
        """What can be made again from the other members of its stripe and their parity, at exactly `version`."""
        stripes: dict[tuple[int, ...], list[tuple[str, dict[str, Any]]]] = {}
        for node in self.addresses:
            for block in self._parity(node, shards, version):
                stripes.setdefault(tuple(block["shards"]), []).append((node, block))
        found: dict[int, Fetched] = {}
        for members, blocks in stripes.items():
            lost = [shard for shard in members if shard in shards and shard not in found]
            if lost:
                found.update(self._decode_stripe(members, blocks, lost, version))
        return found

    def _parity(self, node: str, shards: list[int], version: int) -> list[dict[str, Any]]:
        client = self._client(node)
        if client is None:
            return []
        try:
            return client.parity(shards, version)
        except (OSError, ValueError, KeeperRefused):
            self._lose(node)
            return []

    def _decode_stripe(
        self, members: tuple[int, ...], blocks: list[tuple[str, dict[str, Any]]], lost: list[int], version: int
    ) -> dict[int, Fetched]:
        described = blocks[0][1]["members"]  # (length, checksum) of each member
        others = [shard for shard in members if shard not in lost]
        present = self.fetch(others, version, replay=False, decode=False)
        available: dict[int, bytes] = {members.index(shard): blobs[0] for shard, (_, blobs) in present.items()}
        rows: dict[int, bytes] = {}
        for node, block in blocks:
            if len(available) + len(rows) >= len(members):
                break
            if block["row"] not in rows:
                data = self._block(node, block["block"], members[0], version)
                if data is not None:
                    rows[block["row"]] = data
        if len(available) + len(rows) < len(members):
            return {}
        missing = [i for i in range(len(members)) if i not in available]
        out = [bytearray(described[i][0]) for i in missing]
        sources: dict[int, bytes] = {**available, **{len(members) + row: data for row, data in rows.items()}}
        # Blocks may be of placements with different numbers of rows; a row is the same in all of them.
        Code(len(members), max(block["rows"] for _, block in blocks)).decode(sources, missing, out)
        found: dict[int, Fetched] = {}
        for i, made in zip(missing, out, strict=True):
            if checksum_of(made, members[i], version) != described[i][1]:
                self._found_damage("parity", blocks[0][0], members[i], f"version {version}, after decoding")
            elif members[i] in lost:
                found[members[i]] = (version, [bytes(made)])
        return found

    def _block(self, node: str, number: int, shard: int, version: int) -> bytes | None:
        client = self._client(node)
        if client is None:
            return None
        try:
            data = client.block(number)
        except (OSError, ValueError, KeeperRefused):
            self._lose(node)
            return None
        if data is None:
            self._found_damage("parity", node, shard, f"version {version}, block {number}")
        return data

    def close(self) -> None:
        """Close every connection."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()
