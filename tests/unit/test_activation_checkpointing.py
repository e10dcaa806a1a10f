"""Activation checkpointing: what a forward draws is drawn again where backward computes it again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import everstep


class Block(nn.Module):
    """With dropout. `calls`: how often its inner forward has run; in a list, since a forward may change no number."""

    def __init__(self, how: dict[str, Any] | None) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh())
        self.how = how
        self.calls = [0]

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            self.calls[0] += 1
            found: Tensor = self.inner(x)
            return found

        return inner(x) if self.how is None else checkpoint(inner, x, **self.how)


def trained(how: dict[str, Any] | None, *, loops: bool) -> tuple[dict[str, Any], int]:
    """The state after three steps of four micro-batches, and the number of the block's forwards."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), Block(how), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    data = torch.utils.data.TensorDataset(torch.randn(24, 4), torch.randn(24, 1))
    found: dict[str, Any] = {}

    @everstep.elastic(steps=3, global_batch_size=8, micro_batch_size=2, seed=1)
    def train(run: everstep.Run) -> None:
        loss_fn = nn.functional.mse_loss
        if loops:
            net, wrapped, batches = run.prepare(model, optimizer, data)
            for inputs, targets in batches:
                loss_fn(net(inputs), targets).backward()
                wrapped.step()
        else:
            for _ in run.steps(model, optimizer, data, loss_fn=loss_fn):
                pass
        found.update(run.full_state_dict())

    train()
    return found, model[1].calls[0]


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_the_bytes_are_those_without_it(reentrant: bool, loops: bool) -> None:
    expected, calls = trained(None, loops=loops)
    found, twice = trained({"use_reentrant": reentrant}, loops=loops)
    assert (calls, twice) == (12, 24)
    for name, value in expected["model"].items():
        assert torch.equal(found["model"][name], value), name
    other, _ = trained({"use_reentrant": reentrant, "preserve_rng_state": False}, loops=loops)
    assert not torch.equal(other["model"]["0.weight"], expected["model"]["0.weight"]), "the dropout matters"
