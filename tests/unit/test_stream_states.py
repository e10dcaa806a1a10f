"""What a turn sees of the states that micro-batches carry on, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.stateful import bytes_of, encode
from everstep.elastic.step.order import DataOrder
from everstep.elastic.step.stream_states import STREAM_STATE, StreamStates
from everstep.elastic.step.taking_turns import TakingTurns

ORDER = DataOrder(samples=24, global_batch_size=8, micro_batch_size=4, seed=1, by_epoch=True)  # epochs of 3 steps


def states(order: DataOrder = ORDER, stages: int = 1) -> StreamStates:
    made = StreamStates()
    made.begin(order, torch.device("cpu"), stages)
    return made


class Gathering:
    """The exchanges of ranks that come one after the other: `rounds` has what each has said in the round before."""

    def __init__(self) -> None:
        self.said: list[dict[int, Any]] = [{}, {}]
        self.rank = 0

    def texts(self, text: str) -> dict[int, str]:
        self.said[0][self.rank] = text
        return self.said[0]

    def contents(self, data: torch.Tensor) -> dict[int, torch.Tensor]:
        self.said[1][self.rank] = data
        return self.said[1]


def committed(ranks: list[StreamStates], step: int, held: list[list[int]]) -> None:
    """All agree on what the turns of a step have left, and commit it."""
    gathering, kept = Gathering(), dict[str, bytes]()

    def keep(where: str, value: Any) -> list[str]:
        kept[where] = bytes(bytes_of(value))
        return [where]

    for again in (False, True):  # in the first round some have not said what they have
        for rank, one in enumerate(ranks):
            gathering.rank, registered = rank, dict[str, Any]()
            try:
                one.share(step, one.own(step, held[rank]), registered, gathering, keep)
            except KeyError:
                assert not again
    foreseeing = states()
    foreseeing.foresee(registered, lambda digests: bytearray(kept[digests[0]]))
    foreseeing.commit(registered)
    for one in ranks:
        one.commit(registered)
        assert encode(one.state_dict(), "") == encode(foreseeing.state_dict(), ""), "a rank that was not there has them"


def turn(one: StreamStates, step: int, micro_batch: int, value: float) -> float:
    """Leaves a value; returns the one that was there."""
    one.enter(step, micro_batch)
    found = one.get("it", torch.tensor(-1.0)).item()
    one["it"] = torch.tensor(value, requires_grad=True)
    one.leave()
    return float(found)


def test_it_goes_on_where_the_micro_batch_is_computed() -> None:
    ranks = [states(), states()]
    assert turn(ranks[0], 0, 0, 1.0) == turn(ranks[1], 0, 1, 2.0) == -1.0
    committed(ranks, 0, [[0], [1]])
    assert (turn(ranks[0], 1, 1, 20.0), turn(ranks[1], 1, 0, 10.0)) == (2.0, 1.0)
    assert turn(ranks[1], 1, 1, 20.0) == 2.0, "computed again, the step begins with what it did before"
    committed(ranks, 1, [[], [0, 1]])
    joined = states()
    joined.load_state_dict(ranks[0].state_dict())
    assert (turn(joined, 2, 0, 0.0), turn(joined, 2, 1, 0.0)) == (10.0, 20.0)
    assert turn(joined, 3, 0, 0.0) == -1.0, "another epoch"
    steps = states(replace(ORDER, by_epoch=False))
    steps.load_state_dict(ranks[0].state_dict())
    assert turn(steps, 3, 0, 0.0) == 10.0, "without epochs it goes on"
    other = states(replace(ORDER, micro_batch_size=2))
    other.load_state_dict(ranks[0].state_dict())
    assert turn(other, 2, 0, 0.0) == -1.0, "another division of the batch"


def test_large_values_are_on_all_ranks() -> None:
    ranks = [states(), states()]
    values = [torch.full((5_000,), 1.0), np.arange(9_000.0)]
    for rank, value in enumerate(values):
        ranks[rank].enter(0, rank)
        ranks[rank]["it"] = [value, 3]
        value[:] = 7  # the script's own: of no account
        ranks[rank].leave()
    committed(ranks, 0, [[0], [1]])
    for one in ranks:
        one.enter(1, 0)
        one["it"][0].zero_()  # a copy
        assert torch.equal(one["it"][0], torch.full((5_000,), 1.0))
        one.enter(1, 1)
        assert np.array_equal(one["it"][0], np.arange(9_000.0))


def test_states_of_an_earlier_version_are_read() -> None:
    one = states()
    one.load_state_dict({"count": 2, "states": {"1": '{"it": [1, 2]}'}, "version": 1})
    one.enter(1, 1)
    assert dict(one) == {"it": [1, 2]}


def test_what_is_not_changed_stays() -> None:
    one = states()
    turn(one, 0, 0, 1.0)
    turn(one, 0, 1, 2.0)
    committed([one], 0, [[0, 1]])
    one.enter(1, 0)
    assert one.own(1, [0, 1]) == {}
    one.clear()
    assert (dict(one), len(one)) == ({}, 0)
    committed([one], 1, [[0, 1]])
    assert (turn(one, 2, 0, 0.0), turn(one, 2, 1, 0.0)) == (-1.0, 2.0)


def test_it_is_of_a_turn() -> None:
    one = states()
    for use in (lambda: one.get("it"), lambda: one.update(it=1), lambda: len(one)):
        with pytest.raises(UsageError, match="has values in a turn of the loop over"):
            use()
    one.enter(0, 0)
    with pytest.raises(UsageError, match=r"run.stream_state\[1\]: names are text, got a int"):
        one[1] = 2  # type: ignore[index]
    with pytest.raises(UsageError, match=r"run.stream_state\['it'\]\[0\] is a object: what ranks share may hold"):
        one["it"] = [object()]
    one["it"] = torch.zeros(98_000)
    with pytest.raises(UsageError, match=r"take 586 KiB without its large tensors, those of all 2 of a step 1\.1 MiB"):
        one["more"] = "x" * 600_000
    assert list(one) == ["it"], "what is refused changes nothing"
    with pytest.raises(UsageError, match="by the ranks of stages=2, and a state is carried on by one: use stages=1"):
        dict(states(stages=2))
    alternating = states(replace(ORDER, turns=TakingTurns((1, 1))))
    alternating.enter(0, 0)
    with pytest.raises(UsageError, match="each batch is computed several times, by several optimizers that take turns"):
        alternating["it"] = 1
    assert STREAM_STATE in repr(alternating)
