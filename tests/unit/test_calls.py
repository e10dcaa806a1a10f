"""Calls in which all ranks take part, between ranks that run as threads: results, losses at any message, mistakes."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import AllreduceOptions, ReduceOp

from everstep import UsageError
from everstep.comms.mesh.communicator import Key, Kind
from everstep.comms.mesh.in_memory import MemoryCommunicator, MemoryNetwork
from everstep.elastic.api.calls import Calls
from everstep.elastic.api.process_group import LiveRanks
from everstep.elastic.api.sharing import SharedState, Sharing
from everstep.elastic.contract.progress import Progress
from everstep.elastic.contract.stateful import decode, encode
from everstep.elastic.engine.call_log import CallLog, MadeCall, Place
from everstep.resharding.plan import Plan, Report
from everstep.resharding.planners import initial_layout
from everstep.resharding.units import ModelSpec, ParameterSpec

HANG_S = 30
Script = Callable[["Rank"], Any]


class Killed(Exception):
    """This rank is dead."""


class MortalCommunicator(MemoryCommunicator):
    """Dies when it has sent a number of messages: the rest of them is never sent."""

    sends = 1 << 30
    dies: Callable[[], None] = staticmethod(lambda: None)

    def send(self, to: int, key: Key, payload: Sequence[Tensor]) -> None:
        if self.sends <= 0:
            self.dies()
            raise Killed
        self.sends -= 1
        super().send(to, key, payload)


class Rank(Sharing):
    """One rank's calls."""

    rank = 0
    world_size = 0

    def __init__(self, cluster: Cluster, rank: int, incarnation: int) -> None:
        self.rank, self.incarnation = rank, incarnation
        self.comm = MortalCommunicator(rank, incarnation, network=cluster.network)
        self.log = CallLog()
        self.version = 0
        progress = Progress(None, rank, incarnation, [])
        self.calls = Calls(
            self.comm, self.log, progress, lambda: self.version, lambda: cluster.wait(self), lambda version: None
        )
        self.state = SharedState()

    def _sharing(self) -> Calls:
        return self.calls


@dataclass
class Cluster:
    """Ranks that are replaced when they die. Each runs the script from its beginning, and then serves the others."""

    size: int
    script: Script
    replaces: bool = True
    network: MemoryNetwork = field(default_factory=MemoryNetwork)
    ranks: dict[int, Rank] = field(default_factory=dict)
    results: dict[int, Any] = field(default_factory=dict)
    generation: int = 0
    fresh: set[int] = field(default_factory=set)
    deaths: int = 0

    def run(self, lives: dict[int, int] | None = None) -> dict[int, Any]:
        """The result of the script on each rank that is left. `lives`: rank -> after how many messages it dies."""
        self.changed = threading.Condition()
        self.waiting: set[int] = set()
        self.plan: Plan | None = None
        for rank in range(self.size):
            self.ranks[rank] = Rank(self, rank, 0)
            self.ranks[rank].comm.sends = (lives or {}).get(rank, 1 << 30)
        peers = {rank: item.comm.peer for rank, item in self.ranks.items()}
        self.generation = 1
        for item in self.ranks.values():
            item.comm.edit(1, peers)
        for item in list(self.ranks.values()):
            threading.Thread(target=self._live, args=(item,), daemon=True).start()
        with self.changed:
            done = self.changed.wait_for(lambda: set(self.results) == set(self.ranks), HANG_S)
        assert done, f"only ranks {sorted(self.results)} of {sorted(self.ranks)} are through"
        return dict(sorted(self.results.items()))

    def _live(self, item: Rank, *, joins: bool = False) -> None:
        try:
            if joins:
                self.wait(item)
            try:
                result = self.script(item)
            except UsageError as error:
                result = str(error)
            with self.changed:
                self.results[item.rank] = result
                self.changed.notify_all()
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: self.generation > item.comm.generation)
                self.wait(item)
        except Killed:
            self._died(item)

    def _died(self, item: Rank) -> None:
        with self.changed:
            item.comm.close()
            self.deaths += 1
            self.generation += 1
            self.waiting.discard(item.rank)
            self.results.pop(item.rank, None)
            self.fresh.discard(item.rank)
            del self.ranks[item.rank]
            for other in self.ranks.values():
                other.comm.abort()
            if self.replaces:
                replacement = self.ranks[item.rank] = Rank(self, item.rank, item.incarnation + 1)
                self.fresh.add(item.rank)
                threading.Thread(target=self._live, args=(replacement,), kwargs={"joins": True}, daemon=True).start()
            self.changed.notify_all()

    def wait(self, item: Rank) -> None:
        """What a recovery does: report, and take the plan."""
        while True:
            with self.changed:
                generation = self.generation
                self.waiting.add(item.rank)
                if self.waiting == set(self.ranks):
                    self._decide()
                self.changed.wait_for(partial(self._known, generation))
                plan = self.plan_of(generation)
                if plan is None:
                    continue
                peers = {rank: other.comm.peer for rank, other in self.ranks.items()}
            item.comm.edit(generation, peers)
            if self._carry_out(item, plan):
                return

    def _known(self, generation: int) -> bool:
        return self.plan_of(generation) is not None or self.generation > generation

    def plan_of(self, generation: int) -> Plan | None:
        return self.plan if self.plan is not None and self.plan.generation == generation == self.generation else None

    def _decide(self) -> None:
        reports = [
            Report(rank=rank, generation=1, fresh=rank in self.fresh, calls=item.log.count)
            for rank, item in self.ranks.items()
        ]
        layout = replace(initial_layout(SPEC, sorted(self.ranks), 1, 8), generation=self.generation)
        plan = Plan(layout=layout, version=0, fresh=tuple(sorted(self.fresh)))
        self.plan, self.waiting = plan.with_calls(reports), set()
        self.changed.notify_all()

    def _carry_out(self, item: Rank, plan: Plan) -> bool:
        """Whether the rank is where the others are."""
        sources = dict.fromkeys(plan.behind, plan.caller)
        if plan.guide is not None:
            sources |= {rank: plan.guide for rank in plan.fresh if rank not in plan.behind}
        with self.changed:  # a message of this cluster takes no time
            if self.generation > plan.generation:
                return False
            if item.rank in sources:
                item.log.take(self.ranks[sources[item.rank]].log.records())
            self.fresh.discard(item.rank)
        return True


SPEC = ModelSpec((1.0,), (ParameterSpec("w", (8, 8), "float32", 4, (0,)),))


def after(step: int) -> Place:
    return Place(f"after step {step}", until=step + 1)


def usual(rank: Rank) -> list[Any]:
    """Every kind of call, before the loop and after some steps."""
    found: list[Any] = [rank.broadcast({"seed": 7, "from": 0}), rank.gather("x")]
    for step in range(3):
        rank.calls.at(after(step))
        found += [rank.mean(float(step)), rank.reduce(torch.full((2,), step + 0.1), "max").tolist()]
        rank.barrier()
    return found


def test_results_are_equal_on_all_ranks_and_in_their_order() -> None:
    def script(rank: Rank) -> list[Any]:
        number = 0.1 * (rank.rank + 1)
        return [
            rank.mean(number),
            rank.gather({"rank": rank.rank, "tensor": torch.tensor([rank.rank])}),
            rank.reduce(torch.tensor([number])),
            rank.reduce(torch.tensor([number], dtype=torch.bfloat16), "min"),
            rank.broadcast((rank.rank, b"x"), source=2),
            rank.barrier(),
        ]

    first, *others = Cluster(3, script).run().values()
    assert first[0] == 0.2
    assert first[1] == [{"rank": rank, "tensor": torch.tensor([rank])} for rank in range(3)]
    parts = [torch.tensor([0.1 * (rank + 1)]) for rank in range(3)]
    assert torch.equal(first[2], (parts[0] + parts[1]) + parts[2])
    assert first[3].dtype == torch.bfloat16
    assert first[4] == (2, b"x")
    for other in others:
        assert other[:2] == first[:2]
        assert torch.equal(other[2], first[2])


@pytest.mark.parametrize("numbers", [[0.1] * 7, [1e300, -1e300, 5e-324], [3, 4], [float("inf"), 1.0]])
def test_the_mean_is_rounded_once(numbers: list[float]) -> None:
    (mean,) = set(Cluster(len(numbers), lambda rank: rank.mean(numbers[rank.rank])).run().values())
    expected = {7: 0.1, 3: 0.0, 2: 3.5}[len(numbers)] if numbers[0] != float("inf") else float("inf")
    assert mean == expected


@pytest.mark.parametrize("seed", range(60))
def test_ranks_die_at_any_message(seed: int) -> None:
    """Each rank returns what all others do, from every call, at whichever message a rank dies, replaced or not."""
    chance = random.Random(seed)
    size = chance.randint(2, 5)
    dying = chance.sample(range(size), chance.randint(1, size - 1))
    lives = {rank: chance.randint(0, 3 * size) for rank in dying}
    cluster = Cluster(size, usual, replaces=chance.random() < 0.7)
    results = cluster.run(lives)
    expected = usual_results(results)
    assert all(result == expected for result in results.values()), results
    counts = {item.log.count for item in cluster.ranks.values()}
    assert counts == {11}, counts


def test_a_rank_without_state_may_have_the_newest_calls() -> None:
    """A guide sent them to it, and died: they count, also for a rank with state that was interrupted in the last."""
    reports = [Report(rank=rank, generation=1, fresh=rank != 1, calls=calls) for rank, calls in enumerate((3, 2, 0))]
    plan = Plan(layout=initial_layout(SPEC, [0, 1, 2], 1, 8), version=0, fresh=(0, 2)).with_calls(reports)
    assert (plan.guide, plan.caller, plan.behind) == (1, 0, (1, 2))


def usual_results(results: dict[int, Any]) -> list[Any]:
    """They depend on the ranks only in how many gave an "x"."""
    found: list[Any] = [{"seed": 7, "from": 0}, next(iter(results.values()))[1]]
    for step in range(3):
        found += [float(step), torch.full((2,), step + 0.1).tolist()]
    return found


def test_a_rank_that_was_interrupted_takes_the_result_that_others_have() -> None:
    """The lowest rank dies when it has answered one of two: the other one does not make the call again alone."""

    def script(rank: Rank) -> list[Any]:
        return [rank.gather(rank.rank + 10 * rank.incarnation), rank.mean(1)]

    def until_one_has_gone_on() -> None:
        while not cluster.ranks[1].log.count:
            time.sleep(0.001)

    cluster = Cluster(3, script, replaces=False)
    MortalCommunicator.dies = staticmethod(until_one_has_gone_on)
    try:
        results = cluster.run({0: 1})
    finally:
        MortalCommunicator.dies = staticmethod(lambda: None)
    assert cluster.deaths == 1
    assert results == {1: [[0, 1, 2], 1.0], 2: [[0, 1, 2], 1.0]}


@pytest.mark.parametrize("lives", [{}, {0: 0}, {0: 1}, {0: 2, 1: 3}])
def test_one_rank_saves_whoever_dies(lives: dict[int, int], tmp_path: Path) -> None:
    """The file exists, whole, when a rank continues; ranks that make the call later do not write it again."""
    path = tmp_path / "weights.pt"

    def script(rank: Rank) -> Any:
        rank.save({"w": torch.arange(4), "rank": 7}, path)
        found = torch.load(path, weights_only=True)
        return found["w"].tolist(), found["rank"]

    results = Cluster(3, script).run(lives)
    assert all(result == ([0, 1, 2, 3], 7) for result in results.values()), results
    assert [item.name for item in tmp_path.iterdir()] == ["weights.pt"]


def test_a_file_that_cannot_be_written_is_named_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    results = Cluster(2, lambda rank: rank.save(1, tmp_path / "file" / "weights.pt")).run()
    assert set(results.values()) == {f"run.save: {tmp_path}/file/weights.pt cannot be written: Not a directory"}


def test_the_process_group_of_all_live_ranks() -> None:
    def script(rank: Rank) -> list[Any]:
        rank.world_size = 2
        group = LiveRanks(rank)
        total, options = torch.tensor([rank.rank + 0.5]), AllreduceOptions()
        options.reduceOp = ReduceOp.SUM
        group.allreduce([total], options).wait()
        places, parts = [torch.zeros(2), torch.zeros(2)], torch.zeros(4)
        group.allgather([places], [torch.full((2,), float(rank.rank))], None)
        group._allgather_base(parts, torch.full((2,), float(rank.rank)), None)
        group.barrier()
        refused = []
        options.reduceOp = ReduceOp.PRODUCT
        for call in (
            lambda: group.allreduce([total], options),
            lambda: group.allgather([places[:1]], [total], None),
            lambda: group.alltoall([total], [total]),
        ):
            with pytest.raises(UsageError) as caught:
                call()
            refused.append(str(caught.value))
        return [total.tolist(), [p.tolist() for p in places], parts.tolist(), (group.rank(), group.size()), refused]

    results = Cluster(2, script).run()
    for rank, (total, places, parts, at, refused) in results.items():
        assert (total, places, parts) == ([2.0], [[0.0, 0.0], [1.0, 1.0]], [0.0, 0.0, 1.0, 1.0])
        assert at == (rank, 2)
        assert "takes SUM, AVG, MIN or MAX" in refused[0]
        assert "gathering call has room for the tensors of 1 ranks, and 2 gave one" in refused[1]
        assert "an elastic job has no alltoall of torch.distributed" in refused[2]


def test_a_replacement_makes_the_calls_that_were_made_long_ago() -> None:
    together = threading.Barrier(2)

    def script(rank: Rank) -> list[Any]:
        before = rank.gather((rank.rank, rank.incarnation))
        rank.calls.at(after(0))
        if rank.rank == 1 and not rank.incarnation:
            together.wait(HANG_S)
            raise Killed
        if rank.rank == 0 and not before[0][1]:
            together.wait(HANG_S)
        return [before, rank.gather((rank.rank, rank.incarnation))]

    results = Cluster(2, script).run()
    assert results[0] == results[1] == [[(0, 0), (1, 0)], [(0, 0), (1, 1)]]


@pytest.mark.parametrize(
    ("odd", "what"),
    [
        (lambda rank: rank.gather(1), "calls run.gather before the loop (test_calls.py, line"),
        (lambda rank: rank.calls.announce_end(), "has ended its training function"),
        (lambda rank: rank.reduce(torch.ones(2), "max"), "calls run.reduce(max) before the loop"),
    ],
    ids=["another call", "none", "another operation"],
)
def test_ranks_that_do_not_make_the_same_call(odd: Script, what: str) -> None:
    """One line for all of them, which names both."""
    results = Cluster(3, lambda rank: odd(rank) if rank.rank == 2 else rank.mean(1)).run()
    assert results[0] == results[1]
    assert f"and rank 2 {what}" in results[0]
    assert results[0].startswith("rank 0 calls run.mean before the loop (test_calls.py, line")


@pytest.mark.parametrize("gone", [0, 1])
def test_a_rank_goes_on_without_the_call(gone: int) -> None:
    """A message of the next step shows it."""

    def script(rank: Rank) -> Any:
        if rank.rank != gone:
            return rank.barrier()
        return rank.comm.send(1 - gone, Key(Kind.PARTIAL, rank.version), [torch.ones(1)])

    results = Cluster(2, script).run()
    line = results[1 - gone]
    assert f"rank {1 - gone} calls run.barrier before the loop (" in line
    assert f"and rank {gone} continues with step 0 without it" in line


def test_a_call_after_the_end_of_the_lowest_rank() -> None:
    ended = threading.Event()

    def script(rank: Rank) -> Any:
        if rank.rank == 0:
            while not ended.wait(0.01):
                rank.calls.answer_late()
            return None
        try:
            return rank.mean(1)
        finally:
            ended.set()

    line = Cluster(2, script).run()[1]
    assert line.startswith("rank 0 has ended its training function, and rank 1 calls run.mean before the loop (")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda rank: rank.mean("x"), "run.mean takes a number, got a str: use run.reduce(tensor, 'mean')"),
        (lambda rank: rank.mean(torch.ones(2)), "got a tensor of shape (2,)"),
        (lambda rank: rank.reduce(3.0), "run.reduce takes a tensor, got a float"),
        (lambda rank: rank.reduce(torch.ones(1), "prod"), "op must be one of sum, mean, min, max, got 'prod'"),
        (lambda rank: rank.reduce(torch.ones(1 + rank.rank)), "rank 0 has float32 of shape (1,), and rank 1 float32"),
        (lambda rank: rank.broadcast(1, source=2), "source is 2, and there are 2 ranks"),
        (lambda rank: rank.gather({"x": [object()]}), "run.gather['x'][0] is a object: what ranks share may hold"),
    ],
)
def test_values_that_cannot_be_shared(call: Script, text: str) -> None:
    assert all(text in result for result in Cluster(2, call).run().values())


def test_no_call_in_the_middle_of_a_step() -> None:
    def script(rank: Rank) -> Any:
        rank.calls.away()
        return rank.barrier()

    assert "run.barrier was called in the middle of a step" in Cluster(1, script).run()[0]


def test_calls_that_no_newcomer_comes_by_are_forgotten() -> None:
    log = CallLog()
    for place in (Place("before the loop"), after(0), after(1)):
        log.add(MadeCall(place.name, 0, "run.mean", "1", place.until))
    log.forget(2)
    assert [log.find(place, 0) is not None for place in (Place("before the loop"), after(0), after(1))] == [
        True,
        False,
        True,
    ]
    assert log.count == 3


@pytest.mark.parametrize(
    ("value", "where"), [(object(), "run.state['x']"), ({"a": [{1, 2}]}, "run.state['x']['a'][0]")]
)
def test_what_a_state_may_hold(value: object, where: str) -> None:
    state = SharedState()
    with pytest.raises(UsageError, match="what ranks share may hold") as raised:
        state["x"] = value
    assert str(raised.value).startswith(where)
    with pytest.raises(UsageError, match="names are text"):
        state[1] = 2  # type: ignore[index]


def test_what_a_script_sets_before_its_loop_belongs_to_the_start() -> None:
    """On a rank that joins the job's values count; where all ranks resume, new names stay."""
    for resumed, expected in ((False, {"best": 0.9}), (True, {"best": 0.9, "new": 1})):
        state = SharedState()
        state.load_state_dict({"best": 0.9})
        assert state.setdefault("best", 0.0) == 0.9
        state["best"], state["new"] = 0.0, 1
        state.begin(resumed=resumed)
        assert dict(state) == expected
    state = SharedState()
    state["best"] = 0.0
    state.begin(resumed=False)
    assert dict(state) == {"best": 0.0}


@pytest.mark.parametrize("before", [False, True])
def test_variables_of_the_script_stay_bound_to_what_a_state_holds(before: bool) -> None:
    """`log = run.state.setdefault("log", [])`, in front of the call that has a rank join or behind it."""
    state, bound = SharedState(), {}

    def bind() -> None:
        bound.update(log=state.setdefault("log", []), record=state.setdefault("record", {"old": 1}))

    if before:
        bind()
    state.load_state_dict({"log": [1, 2], "record": {"best": 0.9}})
    if not before:
        bind()
    bound["log"].append(3)  # in front of the loop: it does not count
    state.begin(resumed=False)
    assert dict(state) == bound == {"log": [1, 2], "record": {"best": 0.9}}
    bound["log"].append(4)
    bound["record"]["best"] = 1.0
    assert dict(state) == {"log": [1, 2, 4], "record": {"best": 1.0}}


def test_dictionaries_keep_their_order() -> None:
    """Also through JSON whose names are sorted, as between the ranks."""
    for value in ({"loss": 1, "accuracy": 2}, {"a": {"z": 1, "b": {"d": 0, "c": 1}}}):
        carried = json.loads(json.dumps(encode(value, "it"), sort_keys=True))
        assert repr(decode(carried)) == repr(value)
