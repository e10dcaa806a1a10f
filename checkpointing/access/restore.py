"""Shards back from the keepers of a job: a keeper's copy, the copy before it and a gradient, or the rest of a stripe.

Damaged copies are skipped and reported; shards that no source has are reported as missing, without waiting.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from everstep.checkpointing.memory.checksum import matches
from everstep.checkpointing.memory.contents import digest_of
from everstep.resharding.lines import Lines

from .client import Fetched, KeeperClient, KeeperRefused
from .erasure import Code

SHARDS_PER_FETCH = 16
PIECES_PER_FETCH = 8
_Ask = Callable[[KeeperClient, list[int]], tuple[Iterator[Fetched], list[int]]]


@dataclass
class Keepers:
    """The keepers of a job, as one rank reaches them. `on_wait` is called while it waits, and may raise to give up."""

    addresses: Mapping[str, str]  # node -> host:port; nearest first
    token: str
    on_wait: Callable[[], None]
    lines: Lines = ()  # which records count
    agreed_in: int = 0  # the generation in which the last step was agreed; older gradients do not count
    unreachable: set[str] = field(default_factory=set)
    damage: list[dict[str, Any]] = field(default_factory=list)
    _clients: dict[str, KeeperClient] = field(default_factory=dict)

    def fetch(self, shards: Iterable[int], version: int, *, replay: bool) -> Iterator[Fetched]:
        """The shards that keepers have at `version`, as they come; with `replay`, also the version before it.

        A caller that stops early may ask nothing more.
        """
        lines, agreed_in = self.lines, self.agreed_in
        yield from self._from_all(
            shards,
            lambda client, part: client.fetch(part, version, replay=replay, lines=lines, agreed_in=agreed_in),
            f"version {version}",
        )

    def gradients(self, shards: Iterable[int], step: int, agreed_in: int) -> Iterator[Fetched]:
        """The reduced gradients of a step that was agreed on in this generation, as they come."""
        lines = self.lines
        yield from self._from_all(
            shards,
            lambda client, part: client.gradients(part, step, lines=lines, agreed_in=agreed_in),
            f"the gradient of step {step}",
        )

    def _from_all(self, shards: Iterable[int], ask: _Ask, what: str) -> Iterator[Fetched]:
        """Ask one keeper after the other for what those before it lack."""
        missing = list(shards)
        for node in self.addresses:
            found: set[int] = set()
            for first in range(0, len(missing), SHARDS_PER_FETCH):
                for item in self._ask(node, missing[first : first + SHARDS_PER_FETCH], ask, what):
                    found.add(item.shard)
                    yield item
                self.on_wait()
            missing = [shard for shard in missing if shard not in found]

    def contents(self, digests: Iterable[str]) -> Iterator[tuple[str, bytearray]]:
        """The pieces of large values that keepers have, as they come; each is what its digest says."""
        missing = list(digests)
        for node in self.addresses:
            found: set[str] = set()
            for first in range(0, len(missing), PIECES_PER_FETCH):
                for digest, piece in self._contents(node, missing[first : first + PIECES_PER_FETCH]):
                    found.add(digest)
                    yield digest, piece
                self.on_wait()
            missing = [digest for digest in missing if digest not in found]

    def _contents(self, node: str, digests: list[str]) -> Iterator[tuple[str, bytearray]]:
        client = self._client(node)
        if client is None:
            return
        try:
            for digest, piece in client.contents(digests):
                if digest_of(piece) == digest:
                    yield digest, piece
        except (OSError, ValueError, KeeperRefused):
            self._lose(node)

    def records(self, shards: Sequence[int], version: int) -> dict[int, bytearray]:
        """The available records of the shards at `version`, including those reconstructed from parity."""
        found = {item.shard: item.parts[0] for item in self.fetch(shards, version, replay=False)}
        missing = [shard for shard in shards if shard not in found]
        found.update((item.shard, item.parts[0]) for item in self.decode(missing, version))
        return found

    def _ask(self, node: str, shards: list[int], ask: _Ask, what: str) -> Iterator[Fetched]:
        client = self._client(node)
        if client is None:
            return
        try:
            found, damaged = ask(client, shards)
            for shard in damaged:
                self._found_damage("keeper", node, shard, what)
            yield from found
        except (OSError, ValueError, KeeperRefused):
            self._lose(node)

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

    def decode(self, shards: Sequence[int], version: int) -> Iterator[Fetched]:
        """What can be made again from the other members of its stripe and their parity, at exactly `version`."""
        if not shards:
            return
        stripes: dict[tuple[tuple[int, ...], str], list[tuple[str, dict[str, Any]]]] = {}
        for node in self.addresses:
            for block in self._parity(node, shards, version):
                made_of = json.dumps(block["members"])  # blocks of two lines do not go together
                stripes.setdefault((tuple(block["shards"]), made_of), []).append((node, block))
        made: set[int] = set()  # stripes of several placements may have a shard in common
        for (members, _), blocks in stripes.items():
            lost = [shard for shard in members if shard in shards and shard not in made]
            for item in self._decode_stripe(members, blocks, lost, version) if lost else ():
                made.add(item.shard)
                yield item

    def _parity(self, node: str, shards: Sequence[int], version: int) -> list[dict[str, Any]]:
        client = self._client(node)
        if client is None:
            return []
        try:
            return client.parity(shards, version, self.lines)
        except (OSError, ValueError, KeeperRefused):
            self._lose(node)
            return []

    def _decode_stripe(
        self, members: tuple[int, ...], blocks: list[tuple[str, dict[str, Any]]], lost: list[int], version: int
    ) -> Iterator[Fetched]:
        described = blocks[0][1]["members"]  # (length, checksum) of each member
        others = [shard for shard in members if shard not in lost]
        present = self.fetch(others, version, replay=False)
        available: dict[int, bytearray] = {}
        for item in present:
            member, record = members.index(item.shard), item.parts[0]
            length, checksum = described[member]
            if len(record) == length and matches(record, checksum, item.shard, version):
                available[member] = record
        rows: dict[int, bytearray] = {}
        for node, block in blocks:
            if len(available) + len(rows) >= len(members):
                break
            if block["row"] not in rows:
                data = self._block(node, block["block"], members[0], version)
                if data is not None:
                    rows[block["row"]] = data
        if len(available) + len(rows) < len(members):
            return
        missing = [i for i in range(len(members)) if i not in available]
        out = [bytearray(described[i][0]) for i in missing]
        sources: dict[int, bytearray] = {**available, **{len(members) + row: data for row, data in rows.items()}}
        # Blocks may be of placements with different numbers of rows; a row is the same in all of them.
        Code(len(members), max(block["rows"] for _, block in blocks)).decode(sources, missing, out)
        for i, made in zip(missing, out, strict=True):
            if not matches(made, described[i][1], members[i], version):
                self._found_damage("parity", blocks[0][0], members[i], f"version {version}, after decoding")
            elif members[i] in lost:
                yield Fetched(members[i], version, [made])

    def _block(self, node: str, number: int, shard: int, version: int) -> bytearray | None:
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
