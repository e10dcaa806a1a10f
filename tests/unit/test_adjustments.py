"""What the user's code changes between steps: agreed by differences, refused where ranks contradict each other."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from everstep import UsageError
from everstep.elastic.holding.adjustments import Adjustments
from everstep.elastic.holding.hyperparameters import pack, settings_of, unpack
from everstep.elastic.holding.stack import LayerStack
from everstep.elastic.holding.user_optimizer import UserOptimizer


class Rank:
    """One rank's model, optimizer and adjustments."""

    def __init__(self, frozen: bool = False) -> None:
        self.model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        self.model[0].requires_grad_(not frozen)
        groups = [{"params": self.model[0].parameters()}, {"params": self.model[1].parameters(), "lr": 0.2}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.1)
        stack = LayerStack(self.model, cut=False)
        self.adjustments = Adjustments(UserOptimizer(self.optimizer, stack), stack)

    def rate(self, group: int = 0) -> float:
        return self.optimizer.param_groups[group]["lr"]

    def set_rate(self, rate: float, group: int = 0) -> None:
        self.optimizer.param_groups[group]["lr"] = rate


def step(ranks: list[Rank], number: int) -> dict[str, list[int]]:
    """Agree on a step and commit it on all; what is agreed travels as JSON."""
    shares = {n: json.loads(json.dumps(rank.adjustments.share(number))) for n, rank in enumerate(ranks)}
    terms = [rank.adjustments.merge(shares) for rank in ranks]
    assert all(json.dumps(t, sort_keys=True) == json.dumps(terms[0], sort_keys=True) for t in terms)
    for rank in ranks:
        commit(rank, number, terms[0][0])
    return terms[0][1]


def commit(rank: Rank, number: int, terms: dict[str, Any]) -> None:
    rank.adjustments.adopt(number, json.loads(json.dumps(terms)))
    rank.adjustments.settle()


@pytest.mark.parametrize(
    "groups",
    [
        [],
        [{"lr": 0.1, "betas": [0.9, 0.99], "foreach": None}],
        [{"lr": 0.1}, {"lr": 0.1}, {"lr": 0.3, "name": "head"}, {"lr": 0.3}],
        [{"a": None}, {}, {"a": 1}, {"a": 1}, {}],
        [{"lr": 1 / 3 * n, "weight_decay": n % 2} for n in range(1000)],
    ],
)
def test_settings_travel_by_column(groups: list[dict[str, Any]]) -> None:
    assert unpack(json.loads(json.dumps(pack(groups)))) == groups
    assert unpack(groups) == groups, "as checkpoints of earlier versions hold them"


def test_a_thousand_equal_groups_are_as_small_as_one() -> None:
    group = settings_of(torch.optim.AdamW([torch.zeros(1)]).param_groups[0])
    assert "params" not in group
    assert len(json.dumps(pack([group] * 1000))) < len(json.dumps(pack([group]))) + 100


def test_settings_that_are_no_json_values_are_left_alone() -> None:
    assert settings_of({"lr": torch.tensor(0.5), "f": print, "p": {1: 2}, "name": "x"}) == {"lr": 0.5, "name": "x"}
    assert math.isnan(settings_of({"lr": math.nan})["lr"])


def test_a_change_on_one_rank_counts_on_all() -> None:
    ranks = [Rank(), Rank(), Rank()]
    ranks[1].set_rate(0.5)
    ranks[1].optimizer.param_groups[1]["betas"] = (0.8, 0.9)
    ranks[1].adjustments.clip["norm"] = 2.0
    assert step(ranks, 0) == {
        "lr of parameter group 0": [1],
        "betas of parameter group 1": [1],
        "the norm that gradients are clipped to": [1],
    }
    assert [rank.rate() for rank in ranks] == [0.5] * 3
    assert [rank.optimizer.param_groups[1]["betas"] for rank in ranks] == [(0.8, 0.9)] * 3
    assert [rank.adjustments.clip["norm"] for rank in ranks] == [2.0] * 3
    assert step(ranks, 1) == {}, "and nothing is left to agree on"


def test_ranks_that_contradict_each_other() -> None:
    ranks = [Rank(), Rank(), Rank()]
    ranks[0].set_rate(0.5)
    ranks[2].set_rate(0.25)
    shares = {n: rank.adjustments.share(0) for n, rank in enumerate(ranks)}
    message = r"rank 0 set lr of parameter group 0 to 0\.5 and rank 2 to 0\.25: work it out from what is equal"
    for rank in ranks:
        with pytest.raises(UsageError, match=message):
            rank.adjustments.merge(shares)


def test_a_tensor_stays_one() -> None:
    ranks = [Rank(), Rank()]
    for rank in ranks:
        rank.set_rate(torch.tensor(0.1))
    step(ranks, 0)
    tensors = [rank.rate() for rank in ranks]
    ranks[0].rate().fill_(0.75)
    step(ranks, 1)
    assert [rank.rate() is tensor and float(tensor) == 0.75 for rank, tensor in zip(ranks, tensors, strict=True)]


def test_a_layer_is_frozen_and_unfrozen() -> None:
    ranks = [Rank(), Rank()]
    ranks[0].model[0].requires_grad_(False)
    shares = {n: rank.adjustments.share(0) for n, rank in enumerate(ranks)}
    assert ranks[0].adjustments.merge(shares)[0]["frozen"] == ["0.bias", "0.weight"]
    step(ranks, 0)
    assert not any(p.requires_grad for rank in ranks for p in rank.model[0].parameters())
    ranks[1].model[0].bias.requires_grad_(True)
    step(ranks, 1)
    assert all(rank.model[0].bias.requires_grad and not rank.model[0].weight.requires_grad for rank in ranks)


def test_what_was_frozen_before_cannot_be_trained() -> None:
    rank = Rank(frozen=True)
    rank.adjustments.share(0)
    rank.model[0].weight.requires_grad_(True)
    with pytest.raises(UsageError, match=r"'0\.weight' was frozen at run\.prepare or run\.steps, .* Freeze it after"):
        rank.adjustments.share(0)


def test_a_group_that_is_added() -> None:
    rank = Rank()
    rank.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(UsageError, match="a parameter group was added"):
        rank.adjustments.share(0)


def test_the_micro_batches_of_a_step_have_one_rate() -> None:
    rank = Rank()
    rank.set_rate(0.05)
    rank.adjustments.notice(0)
    rank.adjustments.notice(0)
    rank.set_rate(0.025)  # halved in each micro-batch: how often depends on the layout
    with pytest.raises(UsageError, match=r"was 0\.05 in one micro-batch of step 0 and 0\.025 in the next"):
        rank.adjustments.notice(0)
    rank.set_rate(0.05)
    rank.adjustments.notice(1)
    rank.adjustments.interrupted(1)  # a recovery gave this rank more of the step, and the others' rates
    rank.set_rate(0.03)
    rank.adjustments.notice(1)
    rank.adjustments.notice(1)


def test_a_step_computed_again_has_the_rates_of_then() -> None:
    """Steps 0 to 3 are lost with a node; the loop over run.steps does not show them again."""
    ranks, used = [Rank(), Rank()], []
    for number in range(4):
        for rank in ranks:
            rank.set_rate(1.0 / (number + 1))
        step(ranks, number)
        used.append(ranks[0].rate())
    for rank in ranks:
        rank.set_rate(0.125)  # after step 3
    birth = Rank().adjustments.terms()
    joined = Rank()
    joined.adjustments.take_records(json.loads(json.dumps(ranks[1].adjustments.records())))
    left = ranks[0].adjustments.terms()
    for rank in ranks:
        rank.adjustments.set(birth)
        rank.adjustments.settle()
        assert rank.rate() == 0.1
    again = []
    for number in range(4):
        step([*ranks, joined], number)
        again.append(joined.rate())
    assert again == used
    for rank in ranks:
        rank.adjustments.set(left)
    step([*ranks, joined], 4)
    assert joined.rate() == 0.125


def test_forgotten_steps_are_not_kept() -> None:
    rank = Rank()
    for number in range(4):
        step([rank], number)
    rank.adjustments.forget(3)
    assert list(rank.adjustments.records()) == ["3"]


def test_what_a_rank_that_joins_sets_before_its_loop_is_past() -> None:
    rank = Rank()
    rank.set_rate(0.5)  # what the others have at step 7
    rank.adjustments.settle()
    rank.adjustments.join(7, clip=True)
    rank.set_rate(0.1, 1)
    rank.adjustments.clip["norm"] = 1.0
    rank.model[0].requires_grad_(False)
    assert sorted(rank.adjustments.begin()) == [
        "lr of parameter group 1",
        "requires_grad of 0.bias",
        "requires_grad of 0.weight",
        "the norm that gradients are clipped to",
    ]
    assert (rank.rate(), rank.rate(1), rank.adjustments.clip["norm"]) == (0.5, 0.2, None)
    assert rank.model[0].weight.requires_grad
    rank.set_rate(0.3)
    assert rank.adjustments.begin() == []
    assert rank.rate() == 0.3, "in the loop it counts"
