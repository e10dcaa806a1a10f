"""What `run.average` returns, in the place of torch's `AveragedModel`."""

from __future__ import annotations

import torch
from torch import nn

from everstep.elastic.api.average import MovingAverage


def test_the_state_of_a_model_with_its_averages() -> None:
    """A tied parameter has its average under each name; buffers and frozen parameters are the model's."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    averages = {"0.weight": torch.ones(3, 3), "1.bias": torch.full((3,), 2.0)}
    average = MovingAverage(model, 0.9, lambda: {"average": averages})
    average.update_parameters(model)
    found = average.module.state_dict()
    expected = {**model.state_dict(), **averages, "2.weight": averages["0.weight"]}
    assert list(found) == list(model.state_dict())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
