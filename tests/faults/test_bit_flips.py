"""A thousand bits flip, one by one, in keepers' memory and in parity: each is noticed or harmless, and healed.

Real keepers, real segments and sockets; only the processes are one. Frames between ranks have their own test
(tests/conformance/test_corruption.py).
"""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from everstep.checkpointing.access.client import KeeperLink
from everstep.checkpointing.access.restore import Keepers
from everstep.checkpointing.keeper.keeper import Keeper
from everstep.checkpointing.keeper.service import KeeperServer
from everstep.checkpointing.memory.segment import Segment
from everstep.resharding.placement import Placement, place
from tests.jobs import wait_until

NODES = ("a", "b", "c", "d")
SHARDS = 12
TOKEN = "a job's token"
VERSION = 7
FLIPS = 1000


@dataclass
class Node:
    server: KeeperServer
    link: KeeperLink
    segment: Segment


def content(shard: int, version: int) -> bytes:
    return random.Random(shard * 1000 + version).randbytes(700 + 37 * shard)


def write(segment: Segment, shard: int, version: int) -> None:
    data = content(shard, version)
    slot = segment.free_slot(shard, (version - 1,))
    start = segment.open_slot(shard, slot, len(data))
    segment.memory[start : start + len(data)] = data
    segment.seal_slot(shard, slot, version, len(data))


class Cluster:
    """Keepers on four nodes, which own three shards each, with two versions; stripes of 2 + `losses`."""

    def __init__(self, losses: int) -> None:
        self.nodes: dict[str, Node] = {}
        owners = [NODES[shard % len(NODES)] for shard in range(SHARDS)]
        self.placement: Placement = place(owners, [2000] * SHARDS, NODES, losses=losses, width=2, generation=1)
        for number, name in enumerate(NODES):
            unix = f"everstep-test-{uuid.uuid4().hex}"
            server = KeeperServer(Keeper(name), unix, "127.0.0.1", 0, TOKEN)
            threading.Thread(target=server.serve, daemon=True).start()
            mine = [shard for shard in range(SHARDS) if owners[shard] == name]
            segment = Segment.create([(shard, 2000, 100) for shard in mine], states=3)
            link = KeeperLink(unix, TOKEN, number, 0)
            link.register(segment)
            self.nodes[name] = Node(server, link, segment)
        self.addresses = {name: f"127.0.0.1:{node.server.port}" for name, node in self.nodes.items()}
        for version in (VERSION - 1, VERSION):
            self.protect(version)

    def protect(self, version: int, generation: int = 1) -> None:
        """Write a version everywhere and wait until it is whole."""
        for node in self.nodes.values():
            node.link.enter(generation, self.placement.to_json(), self.addresses, [2000] * len(self.placement.stripes))
        for node in self.nodes.values():
            for shard in node.segment.entries:
                write(node.segment, shard, version)
            node.link.sealed(generation, version, version - 1, protect=True)
        for node in self.nodes.values():

            def whole(link: KeeperLink = node.link) -> bool:
                return (link.state() or {})["complete"][1] >= version

            wait_until(whole, 10, f"version {version} is whole")

    def fetch(self, lost: set[str] = frozenset()) -> tuple[dict[int, bytes], list[dict[str, object]]]:
        """Every shard that is available without these nodes, and the damage that was found."""
        alive = {name: address for name, address in self.addresses.items() if name not in lost}
        keepers = Keepers(alive, TOKEN, lambda: None)
        found = keepers.records(range(SHARDS), VERSION)
        keepers.close()
        return found, keepers.damage

    def close(self) -> None:
        for node in self.nodes.values():
            node.link.close()
            node.server.close()
            node.segment.close()


@pytest.fixture(params=[1, 2])
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    made = Cluster(request.param)
    yield made
    made.close()


def test_a_flipped_bit_is_found_and_healed(cluster: Cluster) -> None:
    """In any segment or parity block, with all nodes there or with one lost (where two are protected, one flipped)."""
    rng = random.Random(5)
    noticed = 0
    for _ in range(FLIPS // 2):
        name = rng.choice(NODES)
        node = cluster.nodes[name]
        blocks = [b for b in node.server.store.covering(range(SHARDS), VERSION) if b.length]
        memory = node.segment.memory if rng.random() < 0.6 or not blocks else rng.choice(blocks).memory
        at, bit = rng.randrange(len(memory)), 1 << rng.randrange(8)
        lost = {rng.choice([n for n in NODES if n != name])} if cluster.placement.losses > 1 else set()
        if memory is not node.segment.memory and rng.random() < 0.7:
            at = rng.randrange(700)  # where parity surely is
            lost = lost or {rng.choice([n for n in NODES if n != name])}
        memory[at] ^= bit
        found, damage = cluster.fetch(lost)
        memory[at] ^= bit
        wrong = [shard for shard, data in found.items() if data != content(shard, VERSION)]
        assert not wrong, f"byte {at}, bit {bit} on {name}: shards {wrong} came back wrong"
        noticed += bool(damage)
        assert all(item["node"] in NODES and item["shard"] in range(SHARDS) for item in damage)
        enough = cluster.placement.losses > len(lost)
        assert len(found) == SHARDS or (damage and not enough), f"byte {at}, bit {bit} on {name}: not healed"
    print(f"{noticed} of {FLIPS // 2} flips hit bytes that were used")
    assert noticed > FLIPS // 10


def test_parity_is_not_made_of_damaged_bytes(cluster: Cluster) -> None:
    """A record that is damaged before its parity is encoded: reported, and never whole; the next version is."""
    victim = cluster.nodes["b"]
    shard = next(iter(victim.segment.entries))
    for node in cluster.nodes.values():
        for own in node.segment.entries:
            write(node.segment, own, VERSION + 1)
    stored = victim.segment.find(shard, VERSION + 1)
    assert stored is not None
    victim.segment.memory[stored.offset + 5] ^= 4
    for node in cluster.nodes.values():
        node.link.sealed(1, VERSION + 1, VERSION, protect=True)
    incidents: list[dict[str, object]] = []

    def reported() -> bool:
        for node in cluster.nodes.values():
            incidents.extend((node.link.state() or {})["incidents"])
        return bool(incidents)

    wait_until(reported, 10, "the damage is reported")
    assert {(item["node"], item["shard"]) for item in incidents} == {("b", shard)}
    states = [(node.link.state() or {})["complete"][1] for node in cluster.nodes.values()]
    assert min(states) == VERSION, "a damaged version is not whole"
    cluster.protect(VERSION + 2)
    found, damage = cluster.fetch({"c"})
    assert not damage
    assert all(found[i] == content(i, VERSION) for i in found)
