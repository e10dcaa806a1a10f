"""A step's agreement between ranks that run as threads: equal shares, differing shares, and replicas that differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from everstep import UsageError
from everstep.checkpointing.access.snapshot import Snapshots
from everstep.comms.mesh.communicator import Key
from everstep.comms.mesh.in_memory import MemoryCommunicator, MemoryNetwork
from everstep.elastic.contract.membership import Solo
from everstep.elastic.contract.settings import Settings
from everstep.elastic.contract.stateful import encode as encode_state
from everstep.elastic.guard.agreeing import Agreeing, Own, Settled, _state_differs
from everstep.elastic.guard.backups import Backups
from everstep.elastic.guard.checkpoint_agreement import Checkpoints
from everstep.elastic.guard.protection import Protection
from everstep.elastic.guard.replicas import Replicas, digest
from everstep.elastic.holding.adjustments import Adjustments
from everstep.elastic.holding.shard_store import ShardStore
from everstep.elastic.holding.stack import LayerStack
from everstep.elastic.holding.user_optimizer import UserOptimizer
from everstep.elastic.protocol.agreement import SHARE_BYTES
from everstep.elastic.protocol.replicas import Digests, Odd, Truth, decide, disputed, odd_ones
from everstep.elastic.step.exchange import Exchange
from everstep.resharding.planners import initial_layout
from tests.ranks import at_once

SETTINGS = Settings(steps=10, global_batch_size=8, micro_batch_size=1, verify_every=1)
STEP = 3


class CountingCommunicator(MemoryCommunicator):
    """Records the sizes of its messages, by exchange."""

    sent: list[tuple[int, int]]

    def send(self, to: int, key: Key, payload: Any) -> None:
        self.sent.append((key.index, sum(tensor.nbytes for tensor in payload)))
        super().send(to, key, payload)


class Rank:
    """A rank's model, and everything that it agrees with."""

    def __init__(self, rank: int, network: MemoryNetwork, settings: Settings) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(40, 500), nn.Linear(500, 40))
        groups = [{"params": self.model[0].parameters()}, {"params": self.model[1].parameters(), "lr": 0.2}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.1)
        self.stack = LayerStack(self.model, cut=True)
        self.comm = CountingCommunicator(rank, 0, network=network)
        self.comm.sent = []
        sharded, snapshots = UserOptimizer(self.optimizer, self.stack), Snapshots(None)
        exchange = Exchange(self.stack, self.comm)
        self.backups = Backups(sharded, self.comm, snapshots, exchange)
        self.replicas = Replicas(
            ShardStore(sharded, self.stack.view), snapshots, self.backups, exchange, settings.verify_every
        )
        self.adjustments = Adjustments(sharded, self.stack)
        self.checkpoints = Checkpoints(settings, self.stack, snapshots, Solo(), {})
        protection = Protection(settings, snapshots, Solo())
        guards = (protection, self.checkpoints, self.replicas)
        self.agreeing = Agreeing(self.stack, self.comm, self.adjustments, *guards)
        trained = {i for layer in self.agreeing.trained for i in layer}
        self.own = Own(
            step=STEP,
            norms={},
            losses={},
            summed=trained,
            touched=trained,
            idle_before=(),
            digest=1 << rank,
            skip_nonfinite=False,
            join=0,
            suspects={},
        )


class Job:
    """Some ranks of one stage."""

    def __init__(self, size: int, settings: Settings = SETTINGS) -> None:
        network = MemoryNetwork()
        self.ranks = [Rank(rank, network, settings) for rank in range(size)]
        self.spec = self.ranks[0].stack.spec
        self.layout = initial_layout(self.spec, range(size), 1, 8)
        peers = {rank.comm.rank: rank.comm.peer for rank in self.ranks}
        for rank in self.ranks:
            rank.comm.edit(1, peers)
            owned = self.layout.index(self.spec).owned(rank.comm.rank)
            norms = {shard.index: 0.1 + 10.0**-shard.index for shard in owned}
            losses = {m: 1 / (m + 1) for m in range(8) if m % size == rank.comm.rank}
            rank.own = replace(rank.own, norms=norms, losses=losses)

    def each(self, act: Callable[[Rank], Any]) -> list[Any]:
        return at_once(self.ranks, act)

    def settled(self) -> list[Settled]:
        def act(rank: Rank) -> Settled:
            merged, replicas = rank.agreeing.begin(rank.own, self.layout)
            assert not disputed(replicas)
            return rank.agreeing.settle(rank.own, merged)

        return self.each(act)

    def exchanges(self) -> int:
        """The number of exchanges, equal on all ranks."""
        (count,) = {rank.agreeing._exchanges for rank in self.ranks}
        return count

    def squares(self) -> list[float]:
        return [norm * norm for rank in self.ranks for norm in rank.own.norms.values()]

    def close(self) -> None:
        for rank in self.ranks:
            rank.comm.close()


@pytest.fixture
def job() -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def make(*arguments: Any) -> Job:
        jobs.append(Job(*arguments))
        return jobs[-1]

    yield make
    for one in jobs:
        one.close()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_ranks_that_say_the_same(job: Callable[..., Job], size: int) -> None:
    """One exchange of small messages; sums are the exact ones under any ownership."""
    found = job(size)
    results = found.settled()
    assert all(result == results[0] for result in results)
    assert found.exchanges() == 1
    assert all(bytes_ <= SHARE_BYTES for rank in found.ranks for _, bytes_ in rank.comm.sent)
    share = results[0].share
    assert (share.ranks, share.losses) == (size, 8)
    assert share.norm.rounded() == math.fsum(found.squares())
    assert share.loss.rounded() == math.fsum(1 / (m + 1) for m in range(8))
    assert share.digest == (1 << size) - 1
    assert (results[0].partly, results[0].idle) == ({}, ())
    assert results[0].settings["groups"]["settings"]["lr"] == [[1, 0.1], [1, 0.2]]


def test_a_rate_that_all_change_alike_does_not_travel(job: Callable[..., Job]) -> None:
    found = job(4)
    for rank in found.ranks:
        rank.optimizer.param_groups[0]["lr"] = 0.05
    results = found.settled()
    assert found.exchanges() == 1
    assert all(r.settings["groups"]["settings"]["lr"] == [[1, 0.05], [1, 0.2]] and r.partly == {} for r in results)


def test_a_rate_that_one_rank_changes_counts_on_all(job: Callable[..., Job]) -> None:
    found = job(4)
    found.ranks[2].optimizer.param_groups[0]["lr"] = 0.05
    results = found.settled()
    assert all(result == results[0] for result in results)
    assert results[0].settings["groups"]["settings"]["lr"] == [[1, 0.05], [1, 0.2]]
    assert results[0].partly == {"lr of parameter group 0": [2]}


def test_rates_that_contradict_each_other(job: Callable[..., Job]) -> None:
    found = job(3)
    found.ranks[0].optimizer.param_groups[1]["lr"] = 0.5
    found.ranks[2].optimizer.param_groups[1]["lr"] = 0.25
    with pytest.raises(UsageError, match=r"rank 0 set lr of parameter group 1 to 0\.5 and rank 2 to 0\.25"):
        found.settled()


def test_what_one_rank_freezes_does_not_count_in_the_norm(job: Callable[..., Job]) -> None:
    found = job(4)
    found.ranks[1].model[0].weight.requires_grad_(False)
    results = found.settled()
    assert all(result == results[0] for result in results)
    frozen = {i for i, p in enumerate(found.spec.parameters) if p.name == "0.weight"}
    left = [
        norm * norm
        for rank in found.ranks
        for shard, norm in rank.own.norms.items()
        if found.spec.shards[shard].parameter not in frozen
    ]
    assert len(left) < len(found.squares())
    assert results[0].share.norm.rounded() == math.fsum(left)
    assert results[0].settings["frozen"] == ["0.weight"]


def test_gradients_that_are_missing(job: Callable[..., Job]) -> None:
    """A parameter is idle if no rank had a gradient of it; the same ones as before need no further exchange."""
    found = job(4)
    without = {0: {0, 1}, 1: {1}, 2: {1, 3}, 3: {1}}
    for number, rank in enumerate(found.ranks):
        rank.own = replace(rank.own, touched=set(rank.own.summed) - without[number])
    assert [result.idle for result in found.settled()] == [(1,)] * 4
    assert found.exchanges() == 2
    for rank in found.ranks:
        rank.own = replace(rank.own, touched=set(rank.own.summed) - {1}, idle_before=(1,))
    assert [result.idle for result in found.settled()] == [(1,)] * 4
    assert found.exchanges() == 1
    for rank in found.ranks:
        rank.own = replace(rank.own, touched=set(rank.own.summed))
    assert [result.idle for result in found.settled()] == [()] * 4


def test_a_rank_that_joined_hears_of_the_runs_before(job: Callable[..., Job], tmp_path: Path) -> None:
    found = job(3, replace(SETTINGS, checkpoint=str(tmp_path)))
    ancestors = (("0123456789abcdef", 17.5),)
    for rank in found.ranks[:2]:
        rank.checkpoints.lineage = replace(rank.checkpoints.lineage, ancestors=ancestors)
    assert [result.ancestors for result in found.settled()] == [ancestors] * 3


def test_no_join_that_is_not_known_to_all(job: Callable[..., Job]) -> None:
    found = job(3)
    for known in ([0, 7, 7], [7, 7, 7]):
        for rank, generation in zip(found.ranks, known, strict=True):
            rank.own = replace(rank.own, join=generation)
        expected = 7 if len(set(known)) == 1 else None
        assert [result.share.join for result in found.settled()] == [expected] * 3


def test_the_norm_of_each_layer(job: Callable[..., Job]) -> None:
    found = job(3)
    results = found.each(lambda rank: rank.agreeing.layer_norms(rank.own, {}))
    assert all(result == results[0] for result in results)
    squares: dict[str, list[float]] = {"0": [], "1": []}
    for rank in found.ranks:
        for shard, norm in rank.own.norms.items():
            squares[str(found.spec.home(found.spec.shards[shard]))].append(norm * norm)
    assert results[0] == {layer: math.fsum(values) for layer, values in squares.items()}


# ------------------------------------------------------------ replicas


def begun(job: Job) -> list[Any]:
    return [replicas for _, replicas in job.each(lambda rank: rank.agreeing.begin(rank.own, job.layout))]


@pytest.mark.parametrize("size", [2, 4, 5])
def test_one_flipped_bit_among_replicas(job: Callable[..., Job], size: int) -> None:
    found = job(size)
    assert begun(found) == [{}] * size
    with torch.no_grad():
        found.ranks[1].model[1].weight.view(-1)[3] += 1.0
    replicas = begun(found)
    assert all(one == replicas[0] for one in replicas)
    (shard,) = disputed(replicas[0])
    assert {index for digests in replicas[0].values() for index, _ in digests.each()} == {shard}, "only what differs"
    true = replicas[0][0].live[shard]
    assert odd_ones(replicas[0], decide(replicas[0], {shard: Truth(true, true)})) == [Odd(shard, 1)]


def test_two_that_are_wrong_in_the_same_way(job: Callable[..., Job]) -> None:
    found = job(4)
    for rank in found.ranks[1:3]:
        with torch.no_grad():
            rank.model[0].bias.view(-1)[0] += 1.0
    assert len(disputed(begun(found)[0])) == 1


def test_all_of_a_ranks_memory_is_wrong(job: Callable[..., Job]) -> None:
    found = job(3)
    with torch.no_grad():
        for parameter in found.ranks[2].model.parameters():
            parameter.mul_(2)
    replicas = begun(found)[0]
    assert disputed(replicas) == [shard.index for shard in found.spec.shards]
    truth = {shard: Truth(replicas[0].live[shard], None) for shard in disputed(replicas)}
    assert {odd.rank for odd in odd_ones(replicas, truth)} == {2}


def test_a_value_that_is_not_what_was_committed(job: Callable[..., Job]) -> None:
    """Whether or not replicas are due in the step, and also where no other rank has the value."""
    for size in (1, 3):
        found = job(size, replace(SETTINGS, verify_every=0))
        rank = found.ranks[size - 1]
        assert begun(found) == [{}] * size
        shard = found.spec.shards[0]
        before = digest(rank.stack.computed_with(shard))
        with torch.no_grad():
            rank.stack.view(shard)[5] += 1.0
        rank.own = replace(rank.own, suspects={shard.index: before})
        for every in (0, 1):
            for one in found.ranks:
                one.replicas._every = every
            replicas = begun(found)
            assert [disputed(one) for one in replicas] == [[shard.index]] * size
            assert odd_ones(replicas[0], {shard.index: Truth(before, before)}) == [Odd(shard.index, size - 1)]


def test_a_backup_is_compared_with_the_master_and_readers_with_the_parameter() -> None:
    """Two masters that differ may round to one value; and a master is not the same number as the parameter."""
    same = {0: Digests(live={5: 1}, master={5: 10}), 1: Digests(live={5: 1}, backup={5: 10})}
    assert disputed(same) == []
    found = {0: Digests(live={5: 1}, master={5: 10}), 1: Digests(live={5: 1}, backup={5: 11})}
    assert disputed(found) == [5]
    assert odd_ones(found, decide(found, {5: Truth(1, 10)})) == [Odd(5, 1, True)]
    assert odd_ones(found, decide(found, {5: Truth(1, 11)})) == [Odd(5, 0)]
    assert decide(found, {5: None}) == {5: Truth(1, 10)}, "the lowest rank's, where no rank can tell"
    found = {0: Digests(live={5: 1}), 1: Digests(live={5: 2}), 2: Digests(live={5: 1}, backup={5: 1})}
    assert odd_ones(found, decide(found, {5: None})) == [Odd(5, 1)], "without a master, a backup is a replica like any"


def test_the_values_of_the_script_that_differ_are_named_as_it_wrote_them() -> None:
    """Dictionaries too, which travel as lists of pairs where their names are not sorted."""
    states = {
        rank: {"run.state['b']": 1, "run.state['a']": encode_state({"loss": 0.5, "best": rank}, "it")}
        for rank in (0, 1)
    }
    text = _state_differs(3, states)
    assert text.startswith(
        "run.state['a'] differs in step 3: expected the same on all ranks, got {'loss': 0.5, 'best': 0} on rank 0 and "
        "{'loss': 0.5, 'best': 1} on rank 1. "
    )
