"""A scheduler that the runtime steps, or watches, saves what it saves in plain torch."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, ReduceLROnPlateau, SequentialLR, StepLR

from everstep.elastic.step.schedule import EpochSchedule, ScheduledRate, refuse

KINDS: dict[str, Callable[[torch.optim.Optimizer], LRScheduler]] = {
    "step": lambda optimizer: StepLR(optimizer, 2, 0.5),
    "plateau": lambda optimizer: ReduceLROnPlateau(optimizer, patience=1),
    "sequential": lambda optimizer: SequentialLR(optimizer, [ConstantLR(optimizer), StepLR(optimizer, 2)], [3]),
}
TAKEN: dict[str, Callable[[LRScheduler], object]] = {
    "by step": ScheduledRate,
    "by epoch": lambda scheduler: EpochSchedule(scheduler, lambda name: None),
    "refused": lambda scheduler: refuse([scheduler], "why"),
}


def built(kind: str) -> LRScheduler:
    return KINDS[kind](torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("taken", list(TAKEN))
def test_what_a_script_saves_of_it(kind: str, taken: str) -> None:
    scheduler, plain = built(kind), built(kind)
    TAKEN[taken](scheduler)
    file = io.BytesIO()
    torch.save(scheduler.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == plain.state_dict()
    scheduler.load_state_dict(plain.state_dict())
    assert scheduler.state_dict() == plain.state_dict()
