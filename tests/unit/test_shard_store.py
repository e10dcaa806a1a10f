"""A store of shards: the optimizer's arithmetic on them, in the model or apart from it, equals torch's on the whole."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everstep.checkpointing.memory.record import record_bytes
from everstep.elastic.holding.hyperparameters import pack
from everstep.elastic.holding.shard_store import ShardStore
from everstep.elastic.holding.stack import LayerStack
from everstep.elastic.holding.user_optimizer import UserOptimizer, master_type
from everstep.elastic.protocol.terms import Terms
from tests.terms import agreed

WIDTH = 300


class Trained:
    """A model with an optimizer, and its shards in a store that shares the model's memory."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        masters: str = "none",
        lr: float = 0.01,
        decay: float | None = None,
    ) -> None:
        torch.manual_seed(4)
        self.model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)).to(dtype)
        self.torch_optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=0.1)
        self.stack = LayerStack(self.model, cut=True)
        self.optimizer = UserOptimizer(self.torch_optimizer, self.stack, masters, decay)
        self.shards = self.stack.spec.shards
        self.store = ShardStore(self.optimizer, self.stack.view)
        self.store.own(self.shards)
        self.store.seed()

    def terms(self) -> Terms:
        """The agreed terms of a step."""
        return agreed(groups=pack(self.optimizer.hyper_parameters()))

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


@pytest.mark.parametrize(
    ("dtype", "masters"),
    [(torch.float32, "none"), (torch.float64, "float32"), (torch.bfloat16, "float32"), (torch.bfloat16, "none")],
)
def test_the_room_for_a_record_holds_it(dtype: torch.dtype, masters: str) -> None:
    trained = Trained(dtype, masters)
    trained.store.update({i: g.to(dtype) for i, g in gradients(trained, 0).items()}, trained.terms())
    for shard in trained.shards:
        room = trained.optimizer.state_bytes(shard)
        assert room - 512 <= record_bytes(trained.store.state(shard.index)) <= room


# ---------------------------------------------------------------- masters


@pytest.mark.parametrize(
    ("live", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int64, torch.int64),
    ],
)
def test_which_parameters_have_a_master(live: torch.dtype, expected: torch.dtype) -> None:
    assert master_type(live, "float32") == expected
    assert master_type(live, "none") == live


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_optimizer_steps_masters_and_the_model_has_them_rounded(dtype: torch.dtype) -> None:
    trained = Trained(dtype, "float32")
    apart = ShardStore(trained.optimizer)
    apart.own(trained.shards)
    apart.seed()
    masters = {index: tensor.detach().float() for index, tensor in trained.stack.parameter_of.items()}
    plain = torch.optim.AdamW(masters.values(), lr=0.01, weight_decay=0.1)
    for step in range(3):
        given = gradients(trained, step)
        trained.store.update(given, trained.terms())
        apart.update(given, trained.terms())
        for index, master in masters.items():
            parts = [given[shard.index] for shard in trained.shards if shard.parameter == index]
            master.grad = torch.cat(parts).view(master.shape)
        plain.step()
        for index, master in masters.items():
            assert torch.equal(trained.stack.parameter_of[index], master.to(dtype))
    for shard in trained.shards:
        state, master = trained.store.state(shard.index), masters[shard.parameter]
        rows = slice(shard.start, shard.stop)
        assert torch.equal(state["value"], master.view(-1)[rows])
        assert torch.equal(state["exp_avg"], plain.state[master]["exp_avg"].view(-1)[rows])
        assert_same(apart.state(shard.index), state)
        assert torch.equal(trained.stack.as_live(shard.index, state["value"]), trained.stack.view(shard))


def test_updates_too_small_for_bfloat16_add_up_in_a_master() -> None:
    """In bfloat16, 1 is followed by 1.0078: eight separate steps of 0.001 have no effect there."""
    ends = {}
    for masters in ("float32", "none"):
        trained = Trained(torch.bfloat16, masters, lr=0.001)
        ones = {shard.index: torch.ones(shard.elements) for shard in trained.shards}
        for shard in trained.shards:
            trained.store.load(shard.index, {"value": torch.ones(shard.elements)})
        for _ in range(8):
            trained.store.update(ones, trained.terms())
        ends[masters] = trained.live()
    assert all(bool((values == 1.0).all()) for values in ends["none"])
    assert all(bool((values < 1.0).all()) for values in ends["float32"])


def test_a_shard_that_comes_back_to_a_model_that_moved_is_written_there() -> None:
    trained = Trained(torch.bfloat16, "float32")
    trained.store.update(gradients(trained, 0), trained.terms())
    state = copy.deepcopy(trained.store.state(0))
    live = trained.stack.view(trained.shards[0]).clone()
    trained.store.own(trained.shards[1:])
    trained.stack.hold(1, 2)
    trained.stack.hold(0, 2)
    trained.store.own(trained.shards)
    trained.store.load(0, state)
    assert torch.equal(trained.stack.view(trained.shards[0]), live)
    assert_same(trained.store.state(0), state)


def test_a_state_without_masters_is_taken_up_with_them_and_the_other_way_round() -> None:
    low, high = Trained(torch.bfloat16, "none"), Trained(torch.bfloat16, "float32")
    given = gradients(low, 0)
    low.store.update(given, low.terms())
    high.store.update(given, high.terms())
    stored = copy.deepcopy(low.store.state(0))
    high.store.load(0, stored)
    taken = high.store.state(0)
    assert {name: value.dtype for name, value in taken.items()} == dict.fromkeys(taken, torch.float32)
    assert all(torch.equal(taken[name], stored[name].float()) for name in taken)
    assert torch.equal(high.stack.view(high.shards[0]), stored["value"])
    taken = copy.deepcopy(taken)
    taken["step"] = torch.tensor(257.0)  # not representable in bfloat16
    low.store.load(0, taken)
    back = low.store.state(0)
    assert (back["value"].dtype, back["exp_avg"].dtype, back["step"].dtype) == (
        torch.bfloat16, torch.bfloat16, torch.float32,
    )  # fmt: skip
    assert back["step"] == 257.0
    assert torch.equal(back["exp_avg"], stored["exp_avg"])
    high.store.update(given, high.terms())
    low.store.update(given, low.terms())


def test_statistics_of_a_batch_norm_are_their_own_values() -> None:
    """Every micro-batch starts from those in the model; nothing is summed."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(torch.bfloat16)
    stack = LayerStack(model, cut=True)
    optimizer = UserOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), stack, "float32")
    assert set(optimizer.masters()) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert set(optimizer.masters().values()) == {"bfloat16"}
    assert "float32 masters" in optimizer.describe()
    store = ShardStore(optimizer, stack.view)
    store.own(stack.spec.shards)
    store.seed()
    for shard in stack.spec.shards:
        shares = store.state(shard.index)["value"].data_ptr() == stack.view(shard).data_ptr()
        assert shares == stack.is_buffer(shard.parameter)


@pytest.mark.parametrize(("dtype", "masters"), [(torch.float32, "none"), (torch.bfloat16, "float32")])
def test_moving_averages_are_torchs(dtype: torch.dtype, masters: str) -> None:
    """Those of `torch.optim.swa_utils` over what the optimizer steps; a loaded state continues with them."""
    trained = Trained(dtype, masters, decay=0.75)
    other = Trained(dtype, masters, decay=0.75)
    step_values = lambda: [trained.store.state(s.index)["value"] for s in trained.shards]  # noqa: E731
    expected = [value.clone() for value in step_values()]
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.75)
    for step in range(4):
        if step == 2:
            for shard in trained.shards:
                other.store.load(shard.index, trained.store.state(shard.index))
        skipped = agreed(groups=pack(trained.optimizer.hyper_parameters()), skip=True)
        trained.store.update(gradients(trained, 99), skipped)
        trained.store.update(gradients(trained, step), trained.terms())
        if step >= 2:
            other.store.update(gradients(trained, step), other.terms())
        average(expected, step_values(), 0)
    for shard, value in zip(trained.shards, expected, strict=True):
        state = trained.store.state(shard.index)
        assert torch.equal(state["ema"], value)
        assert_same(other.store.state(shard.index), state)
        assert record_bytes(state) <= trained.optimizer.state_bytes(shard)
    kept = trained.shards[1:]
    trained.store.own(kept)
    trained.store.own(trained.stack.spec.shards)
    assert "ema" not in trained.store.state(0)
    assert torch.equal(trained.store.state(kept[0].index)["ema"], expected[1])


def test_a_sum_over_tokens_is_divided_before_it_is_clipped() -> None:
    """Wherever the optimizer runs, it divides the gradient by the agreed number of tokens."""
    found, expected = Trained(), Trained()
    for step in range(3):
        given = gradients(found, step)
        terms = replace(found.terms(), tokens=48, scale=0.5, clip={"norm": 1.0, "value": 0.01})
        found.store.update({shard: gradient * 48 for shard, gradient in given.items()}, terms)
        divided = {shard: gradient * 48 / 48 for shard, gradient in given.items()}
        expected.store.update(divided, replace(terms, tokens=None))
    assert all(map(torch.equal, found.live(), expected.live()))
