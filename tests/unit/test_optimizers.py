"""Optimizers by name: which of them may have their parameters cut, and that each steps shards as it steps the model.

Those that torch lacks are written here as their papers have them, in the usual form: state by parameter, a loop over
the groups.
"""

from __future__ import annotations

import re
from collections.abc import Callable
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
from tests.terms import agreed

STEPS, BATCH, MICRO = 5, 6, 3
CUT = 150  # width of a layer that is cut, where the optimizer is element-wise
WIDTH = 20


class Written(torch.optim.Optimizer):
    """What the optimizers below have in common: `update` steps one parameter."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad, self.state[parameter], group)

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError


def trust(p: Tensor, update: Tensor) -> Tensor:
    """The ratio of LARS and LAMB: of the whole parameter's length to the update's."""
    lengths = p.norm(), update.norm()
    return torch.where((lengths[0] > 0) & (lengths[1] > 0), lengths[0] / lengths[1], torch.ones(()))


class Lion(Written):
    """Chen et al., 2023."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        (first, second), average = group["betas"], state.setdefault("exp_avg", torch.zeros_like(p))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * (average * first + g * (1 - first)).sign())
        average.mul_(second).add_(g, alpha=1 - second)


class Lars(Written):
    """You, Gitman and Ginsburg, 2017."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        decayed = g + group["weight_decay"] * p
        buffer = state.setdefault("momentum_buffer", torch.zeros_like(p))
        buffer.mul_(group["betas"][0]).add_(trust(p, decayed) * decayed)
        p.sub_(group["lr"] * buffer)


class Lamb(Written):
    """You et al., 2020; the number of steps is a Python number."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        (first, second), step = group["betas"], state.get("step", 0) + 1
        mean, square = (state.setdefault(name, torch.zeros_like(p)) for name in ("exp_avg", "exp_avg_sq"))
        state["step"] = step
        mean.mul_(first).add_(g, alpha=1 - first)
        square.mul_(second).addcmul_(g, g, value=1 - second)
        update = mean / (1 - first**step) / ((square / (1 - second**step)).sqrt() + 1e-6)
        update += group["weight_decay"] * p
        p.sub_(group["lr"] * trust(p, update) * update)


class Shampoo(Written):
    """Gupta, Koren and Singer, 2018: a square matrix for each dimension of the parameter."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        update = g
        for at, size in enumerate(p.shape):
            sides = g.transpose(0, at).reshape(size, -1)
            precondition = state.setdefault(f"precondition_{at}", 0.1 * torch.eye(size))
            precondition.add_(sides @ sides.t())
            values, vectors = torch.linalg.eigh(precondition)
            root = vectors @ torch.diag(values.clamp(min=1e-6) ** (-0.5 / p.dim())) @ vectors.t()
            update = (root @ update.transpose(0, at).reshape(size, -1)).reshape(update.transpose(0, at).shape)
            update = update.transpose(0, at)
        p.sub_(group["lr"] * update)


class Adam8bit(Written):
    """Adam with moments in eight bits, a scale for each block of 64 elements (Dettmers et al., 2022)."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state.setdefault("step", torch.zeros(()))
        state["step"] += 1
        moments = []
        for name, new, beta in zip(("exp_avg", "exp_avg_sq"), (g, g * g), group["betas"], strict=True):
            moment = self.wide(state, name, p) * beta + new * (1 - beta)
            blocks = nn.functional.pad(moment.reshape(-1), (0, -moment.numel() % 64)).view(-1, 64)
            scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-20) / 127
            state[name], state[f"{name}_scale"] = (blocks / scale).round().to(torch.int8), scale
            moments.append(moment / (1 - beta ** float(state["step"])))
        p.sub_(group["lr"] * moments[0] / (moments[1].clamp(min=0).sqrt() + 1e-8))

    def wide(self, state: dict[str, Any], name: str, p: Tensor) -> Tensor:
        if name not in state:
            return torch.zeros_like(p)
        found: Tensor = state[name] * state[f"{name}_scale"]
        return found.view(-1)[: p.numel()].view(p.shape)


class Adam(Written):
    """Has the name of an optimizer of torch's, and is not that."""

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.sub_(group["lr"] * g / (g.norm() + 1e-6))


class Steeper(torch.optim.AdamW):
    """May have changed what torch's does."""


def muon(parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """As it is used: for matrices, with AdamW for the rest."""
    matrices, rest = ([p for p in parameters if (p.dim() == 2) == wanted] for wanted in (True, False))
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.01)]


Build = Callable[[list[nn.Parameter]], Any]
ELEMENTWISE = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "ASGD", "Rprop")
WHOLE: dict[str, Build] = {
    "muon": muon,
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.02),
    **{
        kind.__name__.lower(): lambda parameters, kind=kind: kind(parameters, lr=0.02)
        for kind in (Lion, Lars, Lamb, Shampoo, Adam8bit)
    },
}
ALL = {name: getattr(torch.optim, name) for name in ELEMENTWISE} | WHOLE


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


@pytest.mark.parametrize("name", WHOLE)
def test_a_job_of_one_rank(name: str) -> None:
    """Two micro-batches a step, so their sum has only one order."""
    plain, net = model(), model()
    expected, users = optimizer_of(name, plain), ALL[name](list(net.parameters()))
    for inputs, targets in DataLoader(samples(), batch_size=BATCH):
        for part, wanted in zip(inputs.split(MICRO), targets.split(MICRO), strict=True):
            (nn.functional.mse_loss(plain(part), wanted) / 2).backward()
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


@pytest.mark.parametrize(
    ("kind", "text"),
    [
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
