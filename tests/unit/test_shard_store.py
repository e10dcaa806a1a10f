"""A store of shards: the optimizer's arithmetic on them, in the model or apart from it, is torch's on the whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everstep.checkpointing.memory.record import record_bytes
from everstep.elastic.holding.hyperparameters import pack
from everstep.elastic.holding.shard_store import ShardStore
from everstep.elastic.holding.stack import LayerStack
from everstep.elastic.holding.user_optimizer import UserOptimizer

WIDTH = 300


class Trained:
    """A model with an optimizer, and its shards in a store that shares the model's memory."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(4)
        self.model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)).to(dtype)
        self.torch_optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, weight_decay=0.1)
        self.stack = LayerStack(self.model, cut=True)
        self.optimizer = UserOptimizer(self.torch_optimizer, self.stack)
        self.shards = self.stack.spec.shards
        self.store = ShardStore(self.optimizer, self.stack.view)
        self.store.own(self.shards)

    def terms(self, **more: Any) -> dict[str, Any]:
        """What a step is agreed on."""
        return {"scale": None, "groups": pack(self.optimizer.hyper_parameters()), **more}

    def live(self) -> list[Tensor]:
        return [self.stack.view(shard).clone() for shard in self.shards]


def gradients(trained: Trained, step: int) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {shard.index: torch.randn(shard.elements, generator=generator) for shard in trained.shards}


def assert_same(first: Any, second: Any) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, Tensor):
            assert (value.dtype, value.device) == (second[name].dtype, second[name].device), name
            assert torch.equal(value, second[name]), name
        else:
            assert value == second[name], name


def test_a_store_of_the_model_has_the_models_memory() -> None:
    trained = Trained()
    assert len(trained.shards) > 4, "the first layer is cut"
    for shard in trained.shards:
        assert trained.store.state(shard.index)["value"].data_ptr() == trained.stack.view(shard).data_ptr()
    trained.store.load(0, {"value": torch.full((trained.shards[0].elements,), 2.0)})
    assert bool((trained.stack.view(trained.shards[0]) == 2.0).all())


def test_shards_in_the_model_and_apart_are_stepped_as_torch_steps_the_whole() -> None:
    trained = Trained()
    apart = ShardStore(trained.optimizer)
    apart.own(trained.shards[1:4])
    apart.seed()
    expected = Trained()
    for step in range(3):
        given = gradients(trained, step)
        trained.store.update(given, trained.terms())
        before = trained.live()
        apart.update(given, trained.terms())
        assert all(map(torch.equal, before, trained.live())), "the model is not touched"
        for index, parameter in expected.stack.parameter_of.items():
            parts = [given[shard.index] for shard in expected.shards if shard.parameter == index]
            parameter.grad = torch.cat(parts).view(parameter.shape)
        expected.torch_optimizer.step()
    assert all(map(torch.equal, trained.live(), expected.live()))
    for shard in trained.shards[1:4]:
        assert_same(apart.state(shard.index), trained.store.state(shard.index))
        assert apart.state(shard.index)["exp_avg"].abs().sum() > 0


def test_what_changes_hands_goes_on_with_its_state() -> None:
    first, second = Trained(), Trained()
    first.store.update(gradients(first, 0), first.terms())
    second.store.own(second.shards[:2])
    for shard in second.shards[:2]:
        second.store.load(shard.index, copy.deepcopy(first.store.state(shard.index)))
    given = gradients(first, 1)
    second.store.update(given, second.terms())
    first.store.update(given, first.terms())
    for shard in second.shards[:2]:
        assert torch.equal(second.store.state(shard.index)["value"], first.store.state(shard.index)["value"])
    second.store.own(second.shards[1:3])
    assert [shard.index for shard in second.store.owned] == [1, 2]
    assert set(second.store.state(1)) == {"value", "step", "exp_avg", "exp_avg_sq"}
    assert set(second.store.state(2)) == {"value"}, "what comes new has no state"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_room_for_a_record_holds_it(dtype: torch.dtype) -> None:
    trained = Trained(dtype)
    trained.store.update({i: g.to(dtype) for i, g in gradients(trained, 0).items()}, trained.terms())
    for shard in trained.shards:
        room = trained.optimizer.state_bytes(shard)
        assert room - 512 <= record_bytes(trained.store.state(shard.index)) <= room
