"""Which state a forward may leave behind, and which not."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.holding.stack import LayerStack
from everstep.elastic.step.forwards import EDGE_BYTES, Forwards


class Keeping(nn.Module):
    """A module that does `action(self, x)` in its forward."""

    def __init__(self, action: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.action = action
        self.linear = nn.Linear(3, 3)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("passing", torch.zeros(3), persistent=False)
        self.register_buffer("large", torch.zeros(EDGE_BYTES))
        self.plain = torch.zeros(3)
        self.number, self.calls = 0.0, 0
        self.memory: Any = [torch.zeros(3)]
        self.table = {"a": torch.zeros(3)}
        self.cached = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.action(self, x)
        return y


class Trial:
    def __init__(self, action: Callable[[Any, Tensor], Any]) -> None:
        self.module = Keeping(action)
        self.warnings: list[str] = []
        self.forwards = Forwards(LayerStack(self.module, cut=False), self.warnings.append)

    def forward(self, times: int = 1) -> None:
        for n in range(times):
            self.forwards.before(0)
            self.module(torch.full((2, 3), float(n + 1)))
            self.forwards.after(0)

    def check(self, *registered: Any, step: int = 4) -> None:
        self.forwards.check_constants(step, registered)


def mean(x: Tensor) -> Tensor:
    return x.detach().mean(0)


def assign(m: Any, x: Tensor) -> None:
    m.mean = 0.9 * m.mean + 0.1 * mean(x)


def write_data(m: Any, x: Tensor) -> None:
    m.mean.data.mul_(0.9).add_(mean(x))


def in_place(m: Any, x: Tensor) -> None:
    m.mean.mul_(0.9).add_(mean(x))


def frozen(m: Any, x: Tensor) -> None:
    m.frozen.data.add_(mean(x))


@pytest.mark.parametrize(
    ("action", "name"),
    [(assign, "buffer 'mean'"), (write_data, "buffer 'mean'"), (in_place, "buffer 'mean'"), (frozen, "'frozen'")],
)
def test_a_buffer_that_a_forward_changes(action: Callable[[Any, Tensor], Any], name: str) -> None:
    """At the first forward, by whatever method."""
    with pytest.raises(UsageError, match=f"{name} in forward"):
        Trial(action).forward()


def not_saved(m: Any, x: Tensor) -> None:
    m.passing = m.passing + mean(x)


def attribute(m: Any, x: Tensor) -> None:
    m.plain = 0.9 * m.plain + 0.1 * mean(x)


def attribute_in_place(m: Any, x: Tensor) -> None:
    m.plain += mean(x)


def attribute_data(m: Any, x: Tensor) -> None:
    m.plain.data.add_(mean(x))


def first_then_average(m: Any, x: Tensor) -> None:
    m.cached = mean(x) if m.cached is None else m.cached * 0.5 + mean(x)


def in_a_list(m: Any, x: Tensor) -> None:
    m.memory[0] = m.memory[0] + mean(x)


def appended(m: Any, x: Tensor) -> None:
    torch.stack(m.memory).mean(0)
    m.memory.append(mean(x))


def in_a_dictionary(m: Any, x: Tensor) -> None:
    m.table["a"] = m.table["a"] + mean(x)


def handed_on(m: Any, x: Tensor) -> None:
    m.cached = m.plain
    m.plain = mean(x)
    if m.cached is not None:
        m.cached.sum()


@pytest.mark.parametrize(
    "action",
    [
        not_saved,
        attribute,
        attribute_in_place,
        attribute_data,
        first_then_average,
        in_a_list,
        appended,
        in_a_dictionary,
        handed_on,
    ],
)
def test_what_one_forward_leaves_for_the_next(action: Callable[[Any, Tensor], Any]) -> None:
    trial = Trial(action)
    with pytest.raises(
        UsageError, match=r"in forward: (only buffers can be kept equal|say how micro-batches of a step combine)"
    ):
        trial.forward(4)


def for_the_caller(m: Any, x: Tensor) -> None:
    m.plain = m.linear(x).sum()  # an auxiliary loss, with its graph
    m.table["a"] = x
    m.plain.shape  # noqa: B018


def found_once(m: Any, x: Tensor) -> None:
    if m.cached is None:
        m.cached = torch.ones(3).tril(0) if x.dim() == 1 else torch.ones(3)
    (x + m.cached).sum()


def logged(m: Any, x: Tensor) -> None:
    m.memory.append(float(x.sum()))


def with_memory(m: Any, x: Tensor) -> None:
    m.memory = deque([x.detach()])


@pytest.mark.parametrize("action", [for_the_caller, found_once, logged, with_memory])
def test_what_no_forward_uses(action: Callable[[Any, Tensor], Any]) -> None:
    trial = Trial(action)
    trial.forward(5)
    assert not trial.warnings
    assert type(trial.module.table["a"]) is Tensor
    assert type(trial.module.plain) is Tensor, "no stand-in is left"


def test_a_number_is_warned_of_once() -> None:
    def count(m: Any, x: Tensor) -> None:
        m.calls += 1
        m.number = 0.5 * m.number + float(x.sum())

    trial = Trial(count)
    trial.forward()
    assert not trial.warnings, "it may be set once, when it is first needed"
    trial.forward(4)
    assert len(trial.warnings) == 2
    assert "attribute 'calls' in forward" in trial.warnings[0] + trial.warnings[1]


def nothing(m: Any, x: Tensor) -> None:
    pass


@pytest.mark.parametrize("name", ["mean", "passing", "frozen"])
def test_between_steps(name: str) -> None:
    """Restored it is harmless, left changed it is an error, registered it is the script's responsibility."""
    trial = Trial(nothing)
    tensor = getattr(trial.module, name)
    kept = tensor.detach().clone()
    for change in (lambda: tensor.data.add_(1), lambda: tensor.detach().mul_(3).add_(1)):
        change()
        tensor.data.copy_(kept)
        trial.check()
        change()
        with pytest.raises(UsageError, match=f"the script changed the .* '{name}' .* between steps 3 and 4"):
            trial.check()
        trial.check(SimpleNamespace(state_dict=lambda: {"what": {"it": [tensor]}}))
        trial.check()
        kept = tensor.detach().clone()


def test_another_tensor_between_steps() -> None:
    trial = Trial(nothing)
    trial.module.mean = torch.zeros(3)
    with pytest.raises(UsageError, match="the script replaced the buffer 'mean' by another tensor"):
        trial.check(step=0)


def test_the_middle_of_a_large_buffer_is_seen_in_its_turn() -> None:
    trial = Trial(nothing)
    trial.module.large.data[EDGE_BYTES // 2] = 1
    with pytest.raises(UsageError, match="'large'"):
        trial.check()
