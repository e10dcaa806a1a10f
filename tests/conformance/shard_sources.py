"""A small job's state at one version, and each of the places that a shard may be read from, with that state in it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from everstep.checkpointing.access.client import KeeperLink
from everstep.checkpointing.access.restore import Keepers
from everstep.checkpointing.access.snapshot import Snapshots
from everstep.checkpointing.keeper.keeper import Keeper
from everstep.checkpointing.keeper.service import KeeperServer
from everstep.checkpointing.memory.record import ShardState
from everstep.checkpointing.universal.writer import folder_name
from everstep.comms.mesh.in_memory import MemoryCommunicator, MemoryNetwork
from everstep.elastic.contract.membership import Orders, Solo
from everstep.elastic.contract.settings import Settings
from everstep.elastic.engine.prefetcher import Prefetched, Prefetcher
from everstep.elastic.engine.resume import CheckpointStates
from everstep.elastic.engine.sources import KeeperRecords, NeighborLayers, OwnMemory, SavedShards, Stripes
from everstep.elastic.guard.checkpoint_agreement import Checkpoints
from everstep.elastic.holding.hyperparameters import pack
from everstep.elastic.holding.shard_store import ShardStore
from everstep.elastic.holding.source import Found, ShardSource
from everstep.elastic.holding.stack import LayerStack
from everstep.elastic.holding.user_optimizer import UserOptimizer
from everstep.elastic.step.exchange import Exchange
from everstep.resharding.layout import Layout
from everstep.resharding.moves import LIVE, Move, What, ahead, own_moves
from everstep.resharding.placement import Placement, place
from everstep.resharding.plan import Plan
from everstep.resharding.planners import initial_layout
from tests.jobs import wait_until
from tests.terms import agreed

TOKEN = "token of a test"
VERSION = 3
NODES = ("a", "b", "c")
KEEPER = """
import sys
from everstep.checkpointing.keeper.keeper import Keeper
from everstep.checkpointing.keeper.service import KeeperServer
name, unix, token = sys.argv[1:]
server = KeeperServer(Keeper(name), unix, "127.0.0.1", 0, token)
print(server.port, flush=True)
server.serve()
"""


def three_layers() -> nn.Module:
    """Layers of one make, so that they may stand in for each other; several shards each."""
    return nn.Sequential(*(nn.Linear(200, 200) for _ in range(3)))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.1)


class Rank:
    """A rank that owns everything, at VERSION; `before` and `gradients` lead there from the version before."""

    def __init__(
        self,
        make: Callable[[], nn.Module] = three_layers,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adam,
        *,
        whole: bool = False,
        apart: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.make, self.apart = make, apart
        self.model = make()
        self.user = optimizer(self.model)
        self.stack = LayerStack(self.model, cut=True, whole=whole)
        self.spec = self.stack.spec
        self.shards = [shard.index for shard in self.spec.shards]
        self.network = MemoryNetwork()
        self.comm = MemoryCommunicator(0, 0, network=self.network)
        self.exchange = Exchange(self.stack, self.comm)
        self.optimizer = UserOptimizer(self.user, self.stack)
        self.store = ShardStore(self.optimizer, self.stack.view)
        self.store.own(self.spec.shards)
        self.layout: Layout = initial_layout(self.spec, [0], 1, 1)
        layers = {str(n): 1.0 + n for n in range(self.spec.layers)}
        self.terms = agreed(step=VERSION - 1, groups=pack(self.optimizer.hyper_parameters()), layers=layers)
        for _ in range(2):
            self.before = {shard: copied(self.store.state(shard)) for shard in self.shards}
            self.gradients = {s.index: torch.randn(s.elements) for s in self.spec.shards}
            self.store.update(self.gradients, self.terms)
        self.state = {shard: copied(self.store.state(shard)) for shard in self.shards}

    def empty(self, shards: Sequence[int]) -> ShardStore:
        """A store of these shards without state."""
        made = ShardStore(self.optimizer)
        made.own(self.spec.shards[shard] for shard in shards)
        return made

    def restored(self, source: ShardSource, shards: Sequence[int]) -> dict[int, dict[str, Any]]:
        """The states that come out of a source, as a loader puts them in place."""
        target = self.empty(shards)
        behind: dict[int, Tensor] = {}
        came: list[int] = []
        for found in source.read(shards, VERSION):
            came.append(found.shard)
            target.load(found.shard, found.state)
            if found.gradient is not None:
                behind[found.shard] = found.gradient
        if behind:
            target.update(behind, self.terms)
        assert len(set(came)) == len(came), "each shard once"
        assert set(came) <= set(shards), "and no other"
        return {shard: copied(target.state(shard)) for shard in came}


def copied(state: ShardState) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}


def same(one: ShardState, other: ShardState) -> bool:
    """Whether two states are equal in every bit; the shape of a value, which is its target's, does not matter."""
    return one.keys() == other.keys() and all(
        torch.equal(value.reshape(-1), other[name].reshape(-1)) if isinstance(value, Tensor) else value == other[name]
        for name, value in one.items()
    )


# ---------------------------------------------------------------- the places


class Place:
    """A source with the state of VERSION in it. `damage` flips a bit of what it has of a shard."""

    def __init__(self, rank: Rank, folder: Path) -> None:
        self.rank = rank
        self._ending = contextlib.ExitStack()
        self.source = self.made(folder)

    def made(self, folder: Path) -> ShardSource:
        raise NotImplementedError

    def damage(self, shard: int) -> None:
        raise NotImplementedError

    def expected(self, shard: int) -> ShardState:
        return self.rank.state[shard]

    def close(self) -> None:
        self._ending.close()


def keeper_here(name: str, unix: str, ending: contextlib.ExitStack) -> int:
    """Start a keeper in a thread; returns its port."""
    server = KeeperServer(Keeper(name), unix, "127.0.0.1", 0, TOKEN)
    threading.Thread(target=server.serve, daemon=True).start()
    ending.callback(server.close)
    return server.port


def keeper_apart(name: str, unix: str, ending: contextlib.ExitStack) -> int:
    """Start a keeper in a process of its own, so that what it copies is not counted here; returns its port."""
    command = [sys.executable, "-c", KEEPER, name, unix, TOKEN]
    process = ending.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    ending.callback(process.kill)
    assert process.stdout is not None
    return int(process.stdout.readline())


class Nodes:
    """Keepers, each with its worker's snapshots, which hold some of a rank's shards."""

    def __init__(self, rank: Rank, owners: Sequence[str], placement: Placement, ending: contextlib.ExitStack) -> None:
        self.owners, self.placement = owners, placement
        self.addresses: dict[str, str] = {}
        self.snapshots: dict[str, Snapshots] = {}
        self.links: dict[str, KeeperLink] = {}
        for number, name in enumerate(sorted(set(owners) | {n for s in placement.stripes for n in s.parity})):
            unix = f"everstep-test-{uuid.uuid4().hex}"
            start = keeper_apart if rank.apart else keeper_here
            self.addresses[name] = f"127.0.0.1:{start(name, unix, ending)}"
            self.links[name] = KeeperLink(unix, TOKEN, number, 0)
            self.snapshots[name] = Snapshots(self.links[name], states=3)
            ending.callback(self.snapshots[name].close)
        sizes = [rank.optimizer.state_bytes(shard) for shard in rank.spec.shards]
        for name, snapshots in self.snapshots.items():
            snapshots.enter(1, placement, self.addresses, sizes)
            mine = [shard for shard in rank.shards if owners[shard] == name]
            snapshots.protect((i, sizes[i], rank.spec.shards[i].elements * 4) for i in mine)

    def write(self, version: int, states: dict[int, dict[str, Any]], *, protect: bool = False) -> None:
        """Have the keepers hold a version of every shard."""
        for name, snapshots in self.snapshots.items():
            mine = [shard for shard in states if self.owners[shard] == name]
            snapshots.begin(version, states.__getitem__, mine, protect=protect)
        for snapshots in self.snapshots.values():
            snapshots.wait()
        for link in self.links.values() if protect else ():
            wait_until(lambda link=link: (link.state() or {})["complete"][1] >= version, 20, "parity is whole")

    def flip(self, shard: int) -> None:
        """Damage every slot of a shard."""
        _, segment = self.snapshots[self.owners[shard]]._home[shard]
        for slot in range(segment.states):
            stored = segment.stored(shard, slot)
            if stored is not None:
                segment.memory[stored.offset + stored.length // 2] ^= 4


def on_one_node(rank: Rank, ending: contextlib.ExitStack) -> Nodes:
    nowhere = Placement(generation=1, width=0, losses=0, wanted=0, stripes=())
    return Nodes(rank, ["a"] * len(rank.shards), nowhere, ending)


class InMemory(Place):
    def made(self, folder: Path) -> ShardSource:
        self.nodes = on_one_node(self.rank, self._ending)
        self.nodes.write(VERSION, self.rank.state)
        return OwnMemory(self.nodes.snapshots["a"])

    def damage(self, shard: int) -> None:
        self.nodes.flip(shard)


class InKeeper(InMemory):
    replay = False

    def made(self, folder: Path) -> ShardSource:
        super().made(folder)
        return self._keepers()

    def _keepers(self) -> ShardSource:
        keepers = Keepers(self.nodes.addresses, TOKEN, lambda: None)
        self._ending.callback(keepers.close)
        return KeeperRecords(keepers, self.rank.exchange, replay=self.replay)


class AsGradient(InKeeper):
    """A keeper has the version before, and the gradient."""

    replay = True

    def made(self, folder: Path) -> ShardSource:
        self.nodes = on_one_node(self.rank, self._ending)
        self.nodes.write(VERSION - 1, self.rank.before)
        snapshots = self.nodes.snapshots["a"]
        for shard, gradient in self.rank.gradients.items():
            snapshots.gradient(shard, VERSION - 1, len(gradient), gradient.dtype).copy_(gradient)
            snapshots.seal_gradient(shard, VERSION - 1, len(gradient), gradient.dtype)
        return self._keepers()


class Ahead(AsGradient):
    """This rank has copied the version before from a keeper, and brought the copies up to date with the gradients."""

    def made(self, folder: Path) -> ShardSource:
        super().made(folder)
        self.begin()
        wait_until(lambda: not self.prefetch.waits(self.plan, 0), 20, "all records are copied")
        self.prefetch.committed(self.rank.terms)
        wait_until(lambda: not self.prefetch.waits(self.plan, 0), 20, "copies are up to date")
        return self.source_of_copies()

    def begin(self) -> None:
        """Begin to copy, at the version before."""
        rank = self.rank
        layout = replace(rank.layout, generation=2, owners=(0,) * len(rank.shards))
        self.plan = Plan(layout=layout, version=None, moves=ahead(own_moves(layout, rank.shards)))
        orders = Orders(self.plan, {}, self.nodes.addresses, self.nodes.placement, {1: "a"})
        self.prefetch = Prefetcher(rank.optimizer, rank.exchange, Solo(), TOKEN)
        self._ending.callback(self.prefetch.end)
        assert self.prefetch.waits(self.plan, 0), "it has not begun"
        self.prefetch.begin(orders, replace(layout, owners=(1,) * len(rank.shards)), 0, VERSION - 1)

    def copied(self) -> set[int]:
        """The shards of which there is a copy."""
        assert self.prefetch._copies is not None
        return {shard for shard, version in self.prefetch._copies.versions.items() if version >= 0}

    def source_of_copies(self) -> ShardSource:
        """What was copied."""
        return Prefetched(self.prefetch, lambda: None)


class InParity(Place):
    """The node that held the shards is lost."""

    def made(self, folder: Path) -> ShardSource:
        rank = self.rank
        owners = [("a", "b")[shard % 2] for shard in rank.shards]
        sizes = [rank.optimizer.state_bytes(shard) for shard in rank.spec.shards]
        placement = place(owners, sizes, NODES, losses=1, width=2, generation=1)
        self.nodes = Nodes(rank, owners, placement, self._ending)
        self.nodes.write(VERSION, rank.state, protect=True)
        left = {name: address for name, address in self.nodes.addresses.items() if name != "a"}
        self.held = [shard for shard in rank.shards if owners[shard] == "a"]
        self.stripe = {shard: stripe.shards for stripe in placement.stripes for shard in stripe.shards}
        keepers = Keepers(left, TOKEN, lambda: None)
        self._ending.callback(keepers.close)
        return Stripes(keepers)

    def damage(self, shard: int) -> None:
        for other in self.stripe[shard]:
            if other != shard:
                self.nodes.flip(other)


class InStorage(Place):
    def made(self, folder: Path) -> ShardSource:
        rank, settings = self.rank, Settings(steps=9, global_batch_size=1, micro_batch_size=1, checkpoint=str(folder))
        whose = {"optimizer": type(rank.user).__name__, "data": {"samples": 1, "sample_digests": []}}
        whose |= {"settings": rank.terms.groups, "dtypes": rank.optimizer.masters()}
        saving = Checkpoints(settings, rank.stack, Snapshots(None), Solo(), whose)
        name = folder_name(VERSION, 0.0, "0" * 8)
        saving.begin_alone(replace(rank.terms, save=name), rank.layout, rank.store.state)
        saving.settle({"groups": rank.terms.groups, "users": {}})
        saving.conclude(lambda: None)
        assert saving.newest == VERSION
        self.folder = folder / name
        return SavedShards(CheckpointStates(settings, rank.stack, name), rank.stack)

    def damage(self, shard: int) -> None:
        parameter = self.rank.spec.parameters[self.rank.spec.shards[shard].parameter].name
        chunk = max((self.folder / "params" / parameter / "c").rglob("*"), key=lambda path: path.is_file())
        data = bytearray(chunk.read_bytes())
        data[len(data) // 2] ^= 4
        chunk.write_bytes(data)


class InNeighbors(Place):
    """The middle layer is gone; the layers beside it are in memory."""

    def made(self, folder: Path) -> ShardSource:
        rank = self.rank
        self.held = [s.index for s in rank.spec.shards if rank.spec.home(s) == 1]

        def load(store: ShardStore, shards: Sequence[int]) -> None:
            for shard in shards:
                store.load(shard, rank.state[shard])

        return NeighborLayers(rank.optimizer, self.held, rank.terms.layers, load)

    def expected(self, shard: int) -> ShardState:
        count = len(self.held)
        before, after = (self.rank.state[shard + step]["value"].double() for step in (-count, count))
        value = (before * 1.0 + after * 3.0) / 4.0
        return {"value": value.float()}


class OnPeer(Place):
    """Another rank, with a model of its own, owns the shards, and sends their values."""

    def made(self, folder: Path) -> ShardSource:
        self.other = MemoryCommunicator(1, 0, network=self.rank.network)
        peers = {comm.rank: comm.peer for comm in (self.rank.comm, self.other)}
        layout = initial_layout(self.rank.spec, [0, 1], 1, 2)
        everything = Layout(2, 2, layout.stages, (1,) * len(self.rank.shards), layout.home)
        for comm in (self.rank.comm, self.other):
            comm.edit(2, peers)
            self._ending.callback(comm.close)
        theirs = LayerStack(self.rank.make(), cut=True, whole=self.rank.spec.whole)
        for shard in self.rank.spec.shards:
            theirs.view(shard).copy_(self.rank.state[shard.index]["value"].reshape(-1))
        exchange = Exchange(theirs, self.other)
        source = self.rank.exchange.live_values(everything)

        class Sent:
            """Sends what is read."""

            @staticmethod
            def read(shards: Sequence[int], version: int) -> Iterator[Found]:
                moves = [Move(shard, (0,), What.VALUE, LIVE) for shard in shards]
                exchange.send_values(version, everything, moves)
                return source.read(shards, version)

        return Sent()

    def expected(self, shard: int) -> ShardState:
        return {"value": self.rank.state[shard]["value"]}


PLACES: dict[str, type[Place]] = {
    "memory": InMemory,
    "keeper": InKeeper,
    "replay": AsGradient,
    "prefetched": Ahead,
    "parity": InParity,
    "storage": InStorage,
    "neighbors": InNeighbors,
    "peer": OnPeer,
}
