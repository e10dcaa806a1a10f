"""A parameter that a model has in three places: in one layer, and in three layers of its stack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import everstep

STEPS, GLOBAL, MICRO, WIDTH = 4, 6, 3, 5  # two micro-batches a step, so their sum has only one order
PLACES = (0, 2, 4)  # of the layers that share their weight


class Together(nn.Module):
    """One layer for the runtime."""

    def __init__(self, parts: nn.Sequential) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.parts(x)
        return found


def stack(*, tied: bool) -> nn.Sequential:
    torch.manual_seed(2)
    parts = nn.Sequential(*[nn.Tanh() if place % 2 else nn.Linear(WIDTH, WIDTH) for place in range(5)])
    for place in PLACES[1:]:
        weight = parts[0].weight
        parts[place].weight = weight if tied else nn.Parameter(weight.detach().clone())
    return parts


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(*[torch.randn(STEPS * GLOBAL, WIDTH, generator=generator) for _ in range(2)])


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)


def trained(net: nn.Module, *, loops: bool) -> dict[str, Any]:
    """The state that a job of one rank ends with."""
    loader, loss_fn, optimizer = DataLoader(samples(), batch_size=MICRO), nn.functional.mse_loss, adam(net.parameters())
    found: dict[str, Any] = {}

    @everstep.elastic(steps=STEPS, global_batch_size=GLOBAL, micro_batch_size=MICRO)
    def train(run: everstep.Run) -> None:
        if loops:
            model, stepped, batches = run.prepare(net, optimizer, loader)
            for inputs, targets in batches:
                loss_fn(model(inputs), targets).backward()
                stepped.step()
        else:
            for _ in run.steps(net, optimizer, loader, loss_fn=loss_fn):
                pass
        found.update(run.full_state_dict())

    train()
    return found


def backwards(net: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """The gradients of a step are the sums over its micro-batches. Each has memory of its own, as from a loader."""
    for part, wanted in zip(inputs.split(MICRO), targets.split(MICRO), strict=True):
        nn.functional.mse_loss(net(part.clone()), wanted).backward()


def halve(parameters: Any) -> None:
    for parameter in parameters:
        parameter.grad /= GLOBAL // MICRO


def assert_same(found: dict[str, Any], net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Values by all of their names, and the optimizer's states."""
    expected = net.state_dict()
    assert found["model"].keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found["model"][name], value), name
    states = {name: optimizer.state[parameter] for name, parameter in net.named_parameters()}
    assert found["optimizer"].keys() == states.keys(), "a state for each parameter, not for each place"
    for name, state in states.items():
        assert all(torch.equal(found["optimizer"][name][key], value) for key, value in state.items()), name


@pytest.mark.parametrize("loops", [True, False])
def test_in_one_layer(loops: bool) -> None:
    net = Together(stack(tied=True))
    optimizer = adam(net.parameters())
    for inputs, targets in DataLoader(samples(), batch_size=GLOBAL):
        backwards(net, inputs, targets)
        halve(net.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert_same(trained(Together(stack(tied=True)), loops=loops), net, optimizer)


def test_in_three_layers() -> None:
    """Each layer's gradient is summed over the micro-batches, and then the layers' in their order."""
    net, places = stack(tied=True), stack(tied=False)
    optimizer = adam(net.parameters())
    for inputs, targets in DataLoader(samples(), batch_size=GLOBAL):
        for place in PLACES:
            places[place].load_state_dict(net[place].state_dict())
        backwards(places, inputs, targets)
        for place in PLACES:
            net[place].bias.grad = places[place].bias.grad
        first, second, third = (places[place].weight.grad for place in PLACES)
        net[0].weight.grad = first + second + third
        halve(net.parameters())
        optimizer.step()
        places.zero_grad()
    assert_same(trained(stack(tied=True), loops=False), net, optimizer)
