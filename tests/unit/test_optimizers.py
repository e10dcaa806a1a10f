"""Optimizers by name: which of them may have their parameters cut, and that each steps shards as it steps the model."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import everstep
from everstep.checkpointing.memory.record import ShardRecord, read_record, record_bytes
from everstep.elastic.holding.hyperparameters import pack
from everstep.elastic.holding.several_optimizers import AnyOptimizer, SeveralOptimizers, parts_of
from everstep.elastic.holding.shard_store import ShardStore
from everstep.elastic.holding.stack import LayerStack
from everstep.elastic.holding.user_optimizer import UserOptimizer, is_elementwise
from everstep.resharding.units import Shard
from tests.jobs.optimizers import ALL, ELEMENTWISE, WHOLE, Lion, Written
from tests.terms import agreed

STEPS, BATCH, MICRO = 5, 6, 3
CUT = 150  # width of a layer that is cut, where the optimizer is element-wise
WIDTH = 20


class Adam(Written):
    """Has the name of an optimizer of torch's, and is not that."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.sub_(group["lr"] * g / (g.norm() + 1e-6))


class Steeper(torch.optim.AdamW):
    """May have changed what torch's does."""


def model(width: int = WIDTH) -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))


def optimizer_of(name: str, net: nn.Module) -> AnyOptimizer:
    built = ALL[name](list(net.parameters()))
    return SeveralOptimizers(built, alternating=False) if isinstance(built, list) else built


@pytest.mark.parametrize("name", ALL)
def test_which_may_have_their_parameters_cut(name: str) -> None:
    assert is_elementwise(optimizer_of(name, model())) == (name in ELEMENTWISE)


@pytest.mark.parametrize("kind", [Adam, Steeper])
def test_what_is_not_known_has_whole_parameters(kind: Any) -> None:
    assert not is_elementwise(kind(model().parameters(), lr=0.1))


def gradients(shards: tuple[Shard, ...], step: int) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {shard.index: torch.randn(shard.elements, generator=generator) for shard in shards}


def rows(shard: Shard, state: dict[str, Any], like: Tensor) -> dict[str, Any]:
    """What a shard has of its parameter's state."""
    cut = {name: value for name, value in state.items() if isinstance(value, Tensor) and value.shape == like.shape}
    return {**state, **{name: value.view(-1)[shard.start : shard.stop] for name, value in cut.items()}}


def assert_same(found: Any, expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert found[name].dtype == value.dtype, name
            assert torch.equal(found[name].view(value.shape), value), name
        else:
            assert (type(found[name]), found[name]) == (type(value), value), name


def recorded(store: ShardStore, shard: Shard) -> dict[str, Any]:
    """A shard's state as another rank gets it: as bytes."""
    record = ShardRecord(store.state(shard.index))
    room = bytearray(record.length)
    record.write(memoryview(room))
    return read_record(room)


@pytest.mark.parametrize("name", ALL)
def test_two_owners_step_as_torch_steps_the_whole(name: str) -> None:
    """They exchange their shards in the middle."""
    net, plain = (model(CUT if name in ELEMENTWISE else WIDTH) for _ in range(2))
    users, expected = optimizer_of(name, net), optimizer_of(name, plain)
    stack = LayerStack(net, cut=True, whole=not is_elementwise(users))
    optimizer = UserOptimizer(users, stack)
    shards = stack.spec.shards
    assert (len(shards) > 4) == (name in ELEMENTWISE), "the first layer is cut, or not"
    owners = [ShardStore(optimizer), ShardStore(optimizer)]
    for owner, store in enumerate(owners):
        store.own(shards[owner::2])
        store.seed()
    parameters = list(plain.parameters())
    for step in range(STEPS):
        given = gradients(shards, step)
        if step == 3:
            kept = [{shard.index: recorded(store, shard) for shard in store.owned} for store in owners]
            for store, states in zip(owners, reversed(kept), strict=True):
                store.own([shards[index] for index in states])
                for index, state in states.items():
                    store.load(index, state)
        for store in owners:
            terms = agreed(groups=pack(optimizer.hyper_parameters()))
            store.update({shard.index: given[shard.index] for shard in store.owned}, terms)
        for number, parameter in enumerate(parameters):
            parts = [given[shard.index] for shard in shards if shard.parameter == number]
            parameter.grad = torch.cat(parts).view(parameter.shape)
        for part in parts_of(expected):
            part.step()
    states = {parameter: state for part in parts_of(expected) for parameter, state in part.state.items()}
    for store in owners:
        for shard in store.owned:
            parameter = parameters[shard.parameter]
            whole = {"value": parameter.detach(), **states.get(parameter, {})}
            found = store.state(shard.index)
            assert_same(found, whole if stack.spec.whole else rows(shard, whole, parameter))
            assert record_bytes(found) <= optimizer.state_bytes(shard)


# ---------------------------------------------------------------- a job


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(*[torch.randn(STEPS * BATCH, size, generator=generator) for size in (WIDTH, 3)])


def train_with(net: nn.Module, users: Any) -> None:
    """A job of one rank; several optimizers step together."""

    @everstep.elastic(steps=STEPS, global_batch_size=BATCH, micro_batch_size=MICRO)
    def train(run: everstep.Run) -> None:
        loader = DataLoader(samples(), batch_size=MICRO)
        optimizers = users if isinstance(users, list) else [users]
        (trained,), stepped, batches = run.prepare([net], optimizers, loader, updates="simultaneous")
        for inputs, targets in batches:
            nn.functional.mse_loss(trained(inputs), targets).backward()
            for optimizer in stepped:
                optimizer.step()

    train()


@pytest.mark.parametrize("name", [*WHOLE, *sorted(ELEMENTWISE)])
def test_a_job_of_one_rank(name: str) -> None:
    """Two micro-batches a step, so their sum has only one order."""
    plain, net = model(), model()
    expected, users = optimizer_of(name, plain), ALL[name](list(net.parameters()))
    for inputs, targets in DataLoader(samples(), batch_size=BATCH):
        for part, wanted in zip(inputs.split(MICRO), targets.split(MICRO), strict=True):
            (nn.functional.mse_loss(plain(part.clone()), wanted) / 2).backward()
        for stepped in parts_of(expected):
            stepped.step()
        plain.zero_grad()

    train_with(net, users)
    for found, parameter in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found, parameter)


# ---------------------------------------------------------------- what is refused


class Prodigy(Written):
    """Learns one rate from all parameters, and keeps it in the group."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        group["distance"] = max(group.get("distance", 1e-6), float((g * p).sum()))
        group["k"] = group.get("k", 0) + 1
        p.sub_(group["lr"] * group["distance"] * g)


class Counting(Written):
    """Keeps its count of steps beside the states of parameters."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        self.state["steps"] = self.state.get("steps", 0) + 1
        p.sub_(group["lr"] * g)


class Listing(Written):
    """Keeps its matrices in a list."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["matrices"] = [torch.eye(size) for size in p.shape]
        p.sub_(group["lr"] * g)


class Lookahead(torch.optim.Optimizer):
    """Wraps another optimizer, and never becomes one itself."""

    def __init__(self, parameters: Any, lr: float) -> None:
        self.wrapped = torch.optim.SGD(parameters, lr=lr)
        self.param_groups, self.state, self.defaults = self.wrapped.param_groups, self.wrapped.state, {}

    def step(self, closure: Any = None) -> None:
        self.wrapped.step()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Lookahead, "Lookahead is an Optimizer whose __init__ does not call Optimizer.__init__"),
        (Prodigy, "Prodigy changes 'k' of its parameter group in step(), which ranks would not share"),
        (Counting, "Counting keeps a state of no parameter ('steps'), which ranks would not share"),
        (Listing, "Listing keeps 'matrices' of a parameter as a list: a state must be a tensor, a number, a text"),
    ],
)
def test_what_cannot_be_shared_among_ranks_is_refused(kind: Any, text: str) -> None:
    net = model()
    with pytest.raises(SystemExit, match=re.escape(text)):
        train_with(net, kind(net.parameters(), lr=0.1))


def test_a_rate_that_a_tensor_has_is_no_change() -> None:
    net = model()
    train_with(net, Lion(net.parameters(), lr=torch.tensor(0.1)))  # type: ignore[arg-type]
