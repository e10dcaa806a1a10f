"""Which models are accepted, their parameters' memory layout, and their names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.holding.stack import LayerStack, plain_name
from everstep.elastic.step.reduction import _check_loss
from everstep.elastic.step.steps import StepState
from everstep.resharding.work import Work


def with_parameter(tensor: torch.Tensor) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].odd = nn.Parameter(tensor)
    return model


@pytest.mark.parametrize(
    ("build", "name", "what"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(3)), "'0.weight'", "run one forward, model\\(inputs\\)"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d()), "'1.weight'", "run one forward"),
        (lambda: with_parameter(torch.ones(2, dtype=torch.complex64)), "'0.odd'", "torch.view_as_complex"),
        (lambda: with_parameter(torch.ones(1).expand(4)), "'0.odd'", "share their memory"),
        (lambda: nn.Linear(2, 2, device="meta"), "'weight'", "to_empty"),
    ],
)
def test_what_is_refused(build: Callable[[], nn.Module], name: str, what: str) -> None:
    with pytest.raises(UsageError, match=f"parameter {name} .*{what}"):
        LayerStack(build(), cut=False)


def test_a_parameter_that_lies_otherwise_in_memory() -> None:
    """Shards are row-major; the parameter keeps its strides, even when its layer was given away and returns."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Linear(4, 4)).to(memory_format=torch.channels_last)
    stack = LayerStack(model, cut=True)
    weight, stride = model[0].weight, model[0].weight.stride()
    assert not weight.is_contiguous()
    assert torch.equal(stack.flat(0).view(weight.shape), weight)
    shard = stack.spec.shards[0]
    stack.view(shard).fill_(3)
    assert not torch.equal(stack.computed_with(shard), stack.view(shard))
    stack.refresh()
    assert torch.equal(stack.computed_with(shard), torch.full((shard.elements,), 3.0))
    stack.hold(1, 2)
    assert weight.numel() == 0
    stack.hold(0, 2)
    assert weight.stride() == stride
    stack.flat(0).fill_(5)
    stack.refresh()
    assert torch.equal(weight, torch.full_like(weight, 5))


def test_a_parameter_without_elements() -> None:
    stack = LayerStack(with_parameter(torch.empty(0, 3)), cut=True)
    assert {parameter.name: parameter.shape for parameter in stack.spec.parameters}["0.odd"] == (0, 3)


def test_names_are_those_without_compile() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model.register_buffer("mean", torch.ones(2))
    model[2].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    compiled = torch.compile(nn.Sequential(torch.compile(model, backend="eager")), backend="eager")
    found = LayerStack(compiled, cut=True)
    names = [parameter.name for parameter in found.spec.parameters]
    assert names[:2] == ["0.0.weight", "0.0.bias"]
    assert not [name for name in (*names, *found.aliases, *(n for n, _ in found.constants())) if "_orig" in name]
    assert found.aliases == {"0.2.weight": "0.0.weight"}
    assert {name for name, _ in found.constants()} == {"0.2.bias", "0.mean"}
    assert plain_name("_orig_mod.encoder._orig_mod.weight") == "encoder.weight"


def test_a_module_with_an_empty_state_of_its_own() -> None:
    class WithState(nn.Linear):
        def get_extra_state(self) -> None:
            return None

    model = nn.Sequential(WithState(2, 2), nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    assert "0._extra_state" in model.state_dict()
    assert [name for name, _ in LayerStack(model, cut=True).constants()] == ["0.bias"]


def test_a_loss_that_depends_on_nothing() -> None:
    _check_loss(torch.ones((), requires_grad=True) * 2, "the loss", 5, 1)
    with pytest.raises(UsageError, match="the loss of micro-batch 1 of step 5 depends on no trainable parameter"):
        _check_loss(torch.ones(()), "the loss", 5, 1)


def test_results_of_micro_batches_that_others_compute_now_are_dropped() -> None:
    state = StepState.begin(0, 0, Work(()))
    state.losses, state.tokens = {0: 0.5, 1: 0.25}, {0: 3, 1: 4}
    state.resume(Work(()), ())
    assert (state.losses, state.tokens) == ({}, {})


def test_parameters_that_are_summed_here() -> None:
    """Of the layers that this rank computed only."""
    state = StepState.begin(0, 0, Work(()))
    state.sums = {0: None, 2: None}  # type: ignore[dict-item]
    assert state.summed([[0, 1], [2, 3], [4, 5]]) == {0, 1, 4, 5}
