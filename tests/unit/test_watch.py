"""What the watch detects of writes to parameters by the script."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from everstep.elastic.holding.stack import LayerStack
from everstep.elastic.holding.watch import (
    EDGE_BYTES,
    Change,
    ParameterWatch,
    describe,
    differing_bits,
)

BIG = EDGE_BYTES  # elements: its middle is not compared before a step


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(BIG, 1), nn.Linear(3, 2).to(torch.bfloat16))


@pytest.fixture
def watch(model: nn.Module) -> ParameterWatch:
    watch = ParameterWatch(LayerStack(model, cut=True))
    watch.remember()
    return watch


def found(watch: ParameterWatch, *, thorough: bool) -> list[tuple[int, Change]]:
    return [(changed.held.index, changed.how) for changed in watch.changed(thorough=thorough)]


@pytest.mark.parametrize("thorough", [False, True])
def test_what_is_put_back_is_not_noticed(model: nn.Module, watch: ParameterWatch, thorough: bool) -> None:
    assert not watch.changed(thorough=thorough)
    kept = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert found(watch, thorough=thorough) == [(i, Change.WRITTEN) for i in range(6)]
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), kept, strict=True):
            parameter.copy_(value)
    assert not watch.changed(thorough=thorough)


@pytest.mark.parametrize("thorough", [False, True])
def test_a_write_through_data(model: nn.Module, watch: ParameterWatch, thorough: bool) -> None:
    model[0].weight.data[1, 1] += 1
    model[2].bias.data.zero_()
    assert found(watch, thorough=thorough) == [(0, Change.SILENT), (5, Change.SILENT)]


def test_the_middle_of_a_large_parameter(model: nn.Module, watch: ParameterWatch) -> None:
    """It is compared before gradients are exchanged; if autograd saw the write, already before the step."""
    weight = model[1].weight
    weight.data[0, BIG // 2] += 1
    assert not watch.changed(thorough=False)
    assert found(watch, thorough=True) == [(2, Change.SILENT)]
    watch.remember()
    with torch.no_grad():
        weight[0, BIG // 2] += 1
    assert found(watch, thorough=False) == [(2, Change.WRITTEN)]


def test_another_storage_of_the_same_content(model: nn.Module, watch: ParameterWatch) -> None:
    """The parameter gets its own storage again, which the optimizer writes to."""
    weight = model[0].weight
    mine = weight.data_ptr()
    weight.data = weight.data.clone()
    assert weight.data_ptr() != mine
    assert not watch.changed(thorough=False)
    assert weight.data_ptr() == mine
    weight.data = weight.data + 1
    assert found(watch, thorough=False) == [(0, Change.REPLACED)]


@pytest.mark.parametrize("thorough", [False, True])
def test_another_parameter_type_or_layout(model: nn.Module, watch: ParameterWatch, thorough: bool) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    model[1].to(torch.float64)
    assert found(watch, thorough=thorough) == [(i, Change.REPLACED) for i in (0, 2, 3)]


def test_only_new(model: nn.Module) -> None:
    """A recovery within a step adds the gained layers; the marks of the others stay."""
    stack = LayerStack(model, cut=True)
    watch = ParameterWatch(stack)
    stack.hold(0, 2)
    watch.remember()
    model[0].weight.data.zero_()
    stack.hold(0, 3)
    model[2].weight.data.zero_()
    watch.remember(only_new=True)
    assert found(watch, thorough=True) == [(0, Change.SILENT)]


def test_a_tied_parameter_keeps_its_memory_when_the_other_layer_comes_and_goes() -> None:
    """The optimizer writes to that memory, and the watch must not put another one in its place."""
    first, last = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    last.weight = first.weight
    stack = LayerStack(nn.Sequential(first, nn.Linear(4, 4), last), cut=True)
    (tied,) = [shard for shard in stack.spec.shards if len(stack.spec.parameters[shard.parameter].layers) == 2]
    watch = ParameterWatch(stack)
    stack.hold(1, 3)
    stack.view(tied).fill_(2.0)
    watch.remember()
    stack.hold(0, 3)
    assert bool((stack.view(tied) == 2.0).all()), "its values are kept"
    watch.remember(only_new=True)
    assert not watch.changed(thorough=True)
    stack.view(tied).fill_(3.0)  # the optimizer
    for number in (0, 2):
        (weight,) = [held.tensor for held in stack.layers[number].parameters if held.index == tied.parameter]
        assert bool((weight == 3.0).all()), f"layer {number} computes with it"
    stack.hold(1, 3)
    assert bool((stack.view(tied) == 3.0).all())
    stack.hold(0, 1)
    assert bool((stack.view(tied) == 3.0).all()), "also when it is the other layer that stays"


def test_bits() -> None:
    one = torch.ones(5)
    other = one.clone()
    assert differing_bits(one, other) == 0
    other.view(torch.uint8)[7] ^= 16
    assert differing_bits(one, other) == 1
    assert differing_bits(one, torch.zeros(5)) == 8


def test_the_message_says_when() -> None:
    assert "between steps 6 and 7: " in describe("x", 7, within=False, replaced=False)
    assert "before or in the first step: " in describe("x", 0, within=False, replaced=False)
    assert "in step 7, or between steps 6 and 7: " in describe("x", 7, within=True, replaced=False)
