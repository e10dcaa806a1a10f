"""Records of another line of history, where shards were approximated, are not taken for those of this one."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator

import pytest
import torch

from everstep.checkpointing.access.client import KeeperLink
from everstep.checkpointing.access.restore import Keepers
from everstep.checkpointing.access.snapshot import Snapshots
from everstep.checkpointing.keeper.keeper import Generation, Keeper
from everstep.checkpointing.keeper.service import KeeperServer
from everstep.checkpointing.memory.record import read_record
from everstep.checkpointing.memory.segment import Segment
from everstep.resharding.layout import Layout, Stage
from everstep.resharding.lines import Fork, Lines, forked, lines_of, of_this_line, since, slot_to_write
from everstep.resharding.placement import Placement, place
from everstep.resharding.plan import Plan
from tests.jobs import wait_until

TOKEN = "token of a test"
NODES = ("a", "b", "c")


def test_a_fork_covers_its_version_and_all_after_it() -> None:
    lines = forked((), 5, 3)
    assert [since(lines, version) for version in (4, 5, 6)] == [0, 3, 3]
    lines = forked(lines, 8, 7)
    assert [since(lines, version) for version in (4, 5, 7, 8, 9)] == [0, 3, 3, 7, 7]
    assert [of_this_line(lines, step) for step in (7, 8)] == [False, True]
    assert forked(lines, 6, 9) == (Fork(5, 3), Fork(6, 9)), "what was gone back behind is over"
    assert of_this_line((), 0)


def test_a_record_of_another_line_is_the_first_to_be_written_over() -> None:
    held = [(5, 1), (6, 1), (4, 1)]
    assert slot_to_write(held, (5,), ()) == 2
    assert slot_to_write(held, (4, 5), ()) == 1
    lines = forked((), 6, 2)
    assert slot_to_write(held, (5,), lines) == 1
    assert slot_to_write([(6, 1), (6, 2), (5, 1)], (5, 6), lines) == 0, "of two records of a version, that of this line"
    assert slot_to_write([(5, 1), None], (5,), lines) == 1


def test_lines_travel_with_a_plan() -> None:
    layout = Layout(generation=7, micro_batches=1, stages=(Stage(0, 1, (0,)),), owners=(0,), home=())
    plan = Plan(layout=layout, version=8, lines=forked(forked((), 5, 3), 8, 7))
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert (again.forks, again.lines_before) == (True, (Fork(5, 3),))
    later = Plan(layout=layout, version=8, lines=lines_of([[5, 3]]))
    assert (later.forks, later.lines_before) == (False, (Fork(5, 3),))


class Nodes:
    """Keepers of three nodes, whose workers own a shard each."""

    def __init__(self) -> None:
        self.addresses: dict[str, str] = {}
        self.keepers: dict[str, Keeper] = {}
        self.links: dict[str, KeeperLink] = {}
        self.snapshots: dict[str, Snapshots] = {}
        self._servers = []
        for number, name in enumerate(NODES):
            unix = f"everstep-test-{uuid.uuid4().hex}"
            server = KeeperServer(Keeper(name), unix, "127.0.0.1", 0, TOKEN)
            threading.Thread(target=server.serve, daemon=True).start()
            self._servers.append(server)
            self.keepers[name] = server.keeper
            self.addresses[name] = f"127.0.0.1:{server.port}"
            self.links[name] = KeeperLink(unix, TOKEN, number, 0)
            self.snapshots[name] = Snapshots(self.links[name], states=3)
            self.snapshots[name].protect([(number, 512, 16)])

    def enter(self, generation: int, lines: Lines = ()) -> None:
        placement: Placement = place(list(NODES), [512] * 3, list(NODES), losses=1, width=2, generation=generation)
        for snapshots in self.snapshots.values():
            snapshots.enter(generation, placement, self.addresses, [512] * 3, lines)

    def write(self, version: int, value: float, *, protect: bool = False, nodes: tuple[str, ...] = NODES) -> None:
        for name in nodes:
            state = {"value": torch.full((4,), value + NODES.index(name))}
            self.snapshots[name].begin(
                version, {NODES.index(name): state}.__getitem__, [NODES.index(name)], protect=protect
            )
        for name in nodes:
            self.snapshots[name].wait()
        for name in nodes if protect else ():
            link = self.links[name]
            wait_until(lambda link=link: (link.state() or {})["complete"][1] >= version, 20, "parity is whole")

    def gradient(self, step: int, value: float) -> None:
        for number, name in enumerate(NODES):
            self.snapshots[name].gradient(number, step, 4, torch.float32).fill_(value)
            self.snapshots[name].seal_gradient(number, step, 4, torch.float32)

    def read(
        self, version: int, lines: Lines = (), *, lost: str = "", replay: bool = False, agreed_in: int = 0
    ) -> dict[int, list[float]]:
        """Shard -> its first value, and that of the gradient if it comes as the version before."""
        addresses = {name: address for name, address in self.addresses.items() if name != lost}
        keepers = Keepers(addresses, TOKEN, lambda: None, lines, agreed_in)
        found = list(keepers.fetch(range(3), version, replay=replay))
        found += keepers.decode([s for s in range(3) if s not in {item.shard for item in found}], version)
        keepers.close()
        assert not keepers.damage
        values = {item.shard: [read_record(item.parts[0])["value"][0].item()] for item in found}
        for item in found:
            if item.version < version:
                values[item.shard].append(torch.frombuffer(item.parts[1], dtype=torch.float32)[0].item())
        return values

    def close(self) -> None:
        for name in NODES:
            self.snapshots[name].close()
        for server in self._servers:
            server.close()


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    yield made
    made.close()


BEFORE, AFTER = {0: [50.0], 1: [51.0], 2: [52.0]}, {0: [60.0], 1: [61.0], 2: [62.0]}
LINES = forked((), 5, 2)


def test_newer_versions_of_the_former_line_are_not_given(nodes: Nodes) -> None:
    nodes.enter(1)
    nodes.write(5, 50.0)
    nodes.gradient(5, 5.0)
    nodes.write(6, 60.0)
    assert nodes.read(6) == AFTER
    nodes.enter(2, LINES)
    assert nodes.read(5) == BEFORE, "by the plan that forks, what it continues from is read"
    assert nodes.read(5, LINES) == {}, "it is not known yet which of these are approximated"
    for number, name in enumerate(NODES):
        assert nodes.snapshots[name].resume(number, 5) is not None
    nodes.write(5, -1.0)
    assert nodes.read(5, LINES) == BEFORE, "what was there is of the new line too, and is not written again"
    assert nodes.read(6, LINES) == {}
    assert nodes.read(6, LINES, replay=True) == {}, "nor is the gradient of the former line used"
    nodes.gradient(5, 7.0)
    assert nodes.read(6, LINES, replay=True) == {shard: [*value, 7.0] for shard, value in BEFORE.items()}
    assert nodes.snapshots["a"].stored(0, 6) is None
    nodes.write(6, 80.0)
    assert nodes.read(6, LINES) == {0: [80.0], 1: [81.0], 2: [82.0]}


def test_a_gradient_of_an_attempt_that_was_given_up_is_not_used(nodes: Nodes) -> None:
    """It may have been computed with damaged values: a step counts as it was agreed."""
    nodes.enter(1)
    nodes.write(5, 50.0)
    nodes.gradient(5, 9.0)
    nodes.enter(2)
    assert nodes.read(6, replay=True, agreed_in=2) == {}
    nodes.gradient(5, 7.0)
    assert nodes.read(6, replay=True, agreed_in=2) == {shard: [*value, 7.0] for shard, value in BEFORE.items()}


def test_an_approximated_shard_is_written_again(nodes: Nodes) -> None:
    nodes.enter(1)
    nodes.write(5, 50.0)
    nodes.enter(2, LINES)
    nodes.snapshots["b"].discard(1)
    nodes.write(5, 70.0)
    assert nodes.read(5, LINES) == {**BEFORE, 1: [71.0]}


def test_a_late_write_of_the_former_line_is_of_the_former_line(nodes: Nodes) -> None:
    """One worker has not heard of the new generation when its keeper has."""
    nodes.enter(1)
    nodes.write(5, 50.0)
    nodes.enter(2, LINES)
    nodes.snapshots["b"].enter(1, Placement(generation=1, width=0, losses=0, wanted=0, stripes=()), {}, [512] * 3)
    nodes.snapshots["b"].protected = 6
    nodes.write(6, 60.0)
    assert nodes.read(6, LINES) == {0: [60.0], 2: [62.0]}
    assert nodes.keepers["b"]._protected == -1, "what outlived nodes then is of another line"


def test_parity_is_of_one_line(nodes: Nodes) -> None:
    nodes.enter(1)
    nodes.write(5, 50.0, protect=True)
    assert nodes.read(5, lost="b") == BEFORE
    nodes.enter(2, LINES)
    complete, before = (nodes.links["a"].state() or {})["complete"], (nodes.links["a"].state() or {})["before"]
    assert (complete, before) == ([2, -1], [0, -1]), "nothing is whole in the new line"
    assert nodes.read(5, LINES, lost="b") == {}
    nodes.snapshots["b"].discard(1)
    nodes.write(5, 70.0, protect=True)
    shards = {0: [70.0], 1: [71.0], 2: [72.0]}  # only that of b was to be written again
    assert nodes.read(5, LINES, lost="b") == {**BEFORE, 1: shards[1]}
    assert nodes.read(5, LINES, lost="a")[0] == BEFORE[0], "it is made of the approximated one, and leads to the others"


def test_newer_versions_of_the_former_line_do_not_make_what_a_dead_worker_left_obsolete() -> None:
    keeper = Keeper("a")
    segments = {rank: Segment.create([(rank, 64, 0)], states=2) for rank in (0, 1)}
    for rank, segment in segments.items():
        entries = list(segment.entries.values())
        keeper.register(rank, 0, 1, os.dup(segment.fd), segment.size, entries, 2, connection=rank)
        version = 5 if rank else 9
        segment.open_slot(rank, 0, 0)
        segment.seal_slot(rank, 0, version, 0, generation=1)
    keeper.left(1, 0, 1)
    nowhere = Placement(generation=2, width=0, losses=0, wanted=0, stripes=())
    keeper.enter(Generation(2, nowhere, {}, (), LINES))
    keeper.sealed(2, -1)
    assert keeper.held()["ranks"] == [0, 1]
    segments[0].seal_slot(0, 1, 9, 0, generation=2)
    keeper.sealed(2, -1)
    assert keeper.held()["ranks"] == [0], "the new line is as far"
    for segment in segments.values():
        segment.close()
