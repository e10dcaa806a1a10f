"""`run.evaluate` says that it needs the whole model, where the model could be cut into stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import everstep
from everstep.elastic.contract.membership import Solo
from everstep.elastic.protocol import events as e


class Pairs:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((2,), float(index)), torch.zeros(2)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_coordinator_is_told(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    tell = Solo.tell
    monkeypatch.setattr(Solo, "tell", lambda self, message: (told.append(message), tell(self, message)))

    @everstep.elastic(steps=2, global_batch_size=2, micro_batch_size=1)
    def train(run: everstep.Run) -> None:
        model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in run.steps(model, optimizer, Pairs(), loss_fn=nn.functional.mse_loss):
            run.evaluate(Pairs(), lambda batch: len(batch[0]))

    train()
    said = [message.what for message in told if isinstance(message, e.WorkerNeedsWhole)]
    assert said == ["its script calls run.evaluate"] * (2 if layers > 1 else 0)
