"""The script's own collectives after a worker was lost: detection and timing of the warning."""

from __future__ import annotations

import sys
from types import FrameType, ModuleType

import pytest

from everstep.elastic.contract.collectives import (
    SAID_S,
    STUCK_S,
    CollectiveWatch,
    _call,
    raised_there,
)

WRAPPED = """
import sys
def all_reduce(what):
    return wrapper(what)
def wrapper(what):
    return what()
"""


@pytest.fixture
def torch_like() -> ModuleType:
    """A module whose file is in the folder of torch's collectives."""
    module = ModuleType("like_torch")
    exec(compile(WRAPPED, "/somewhere/torch/distributed/distributed_c10d.py", "exec"), module.__dict__)
    return module


def test_the_call_is_named_with_the_line_of_the_script(torch_like: ModuleType) -> None:
    found: list[str] = []

    def inside() -> None:
        frame: FrameType | None = sys._getframe(1)  # as seen while the transport waits
        found.append(_call(frame))

    torch_like.all_reduce(inside)
    assert found[0].startswith("torch.distributed.all_reduce (test_collectives.py, line ")
    assert _call(sys._getframe()) == ""


def test_an_error_that_comes_from_there_is_known(torch_like: ModuleType) -> None:
    def fails() -> None:
        raise RuntimeError("closed by peer")

    with pytest.raises(RuntimeError) as caught:
        torch_like.all_reduce(fails)
    assert raised_there(caught.value)
    assert not raised_there(ValueError("another"))


def test_it_is_said_once_and_given_up_later() -> None:
    said: list[str] = []
    given_up: list[str] = []
    watch = CollectiveWatch(said.append, given_up.append)
    where = "torch.distributed.all_reduce (train.py, line 22)"
    for second in range(int(SAID_S)):
        assert not watch.look(where, float(second))
    assert not watch.look("", SAID_S)
    for second in range(1000):
        if watch.look(where, float(second)):
            break
    assert len(said) == 1, "it waited in another call before"
    assert where in said[0]
    assert "run.full_state_dict()" in said[0]
    assert second == STUCK_S
    assert len(given_up) == 1
