"""The device of a worker, and the transfer of batches and random numbers to it. The device here is torch's "meta"."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.settings import WorkerContext
from everstep.elastic.step.devices import memory_for_state, own_device, seed_torch, to_device

META = torch.device("meta")
Pair = namedtuple("Pair", "left right")


@dataclasses.dataclass(frozen=True)
class Sample:
    values: torch.Tensor
    name: str


class Mover:
    """A batch object of the kind that libraries use."""

    def __init__(self, device: str) -> None:
        self.device = device

    def to(self, device: torch.device) -> Mover:
        return Mover(device.type)


def test_batches_move_however_they_are_nested() -> None:
    one = torch.ones(2)
    moved = to_device(
        {
            "list": [one, "text", 3, None],
            "pair": Pair(one, (one,)),
            "ordered": OrderedDict(a=one),
            "user": UserDict(a=one),
            "sample": Sample(one, "x"),
            "own": Mover("cpu"),
        },
        META,
    )
    assert moved["list"][0].device == META
    assert moved["list"][1:] == ["text", 3, None]
    assert isinstance(moved["pair"], Pair)
    assert moved["pair"].left.device == moved["pair"].right[0].device == META
    assert isinstance(moved["ordered"], OrderedDict)
    assert moved["ordered"]["a"].device == META
    assert isinstance(moved["user"], UserDict)
    assert moved["user"]["a"].device == META
    assert isinstance(moved["sample"], Sample)
    assert (moved["sample"].values.device, moved["sample"].name) == (META, "x")
    assert moved["own"].device == "meta"


def test_for_the_cpu_a_batch_is_as_it_is() -> None:
    batch = {"x": [torch.ones(2)]}
    assert to_device(batch, torch.device("cpu")) is batch


def context(local_rank: int, workers: int, *, shares: bool = False) -> WorkerContext:
    return WorkerContext(
        rank=10 + local_rank,  # which does not determine the device
        incarnation=0,
        world_size=20,
        host="",
        host_id="",
        token="",
        control_fd=0,
        progress_fd=0,
        keeper_name="",
        local_rank=local_rank,
        gpu_workers=workers,
        share_gpu=shares,
    )


@pytest.fixture
def accelerators(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Make torch find `count` devices of a kind, and record what is set and seeded."""
    seen: dict[str, Any] = {"count": 2, "set": [], "seeds": [], "initialised": True}
    module = SimpleNamespace(
        set_device=seen["set"].append,
        manual_seed_all=seen["seeds"].append,
        is_initialized=lambda: seen["initialised"],
    )
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: seen["count"] > 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: seen["count"])
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    return seen


def test_the_device_is_that_of_the_local_rank(accelerators: dict[str, Any]) -> None:
    assert own_device(context(1, 2)) == torch.device("xpu", 1)
    assert own_device(context(0, 2)) == torch.device("xpu", 0)
    assert own_device(None) == torch.device("xpu", 0)
    assert accelerators["set"] == [1, 0, 0]


def test_more_workers_than_devices(accelerators: dict[str, Any]) -> None:
    for local_rank in range(4):
        with pytest.raises(UsageError, match=r"4 workers and 2 xpu devices: .*--nproc-per-node=2.*--es-share-gpu"):
            own_device(context(local_rank, 4))
    assert [own_device(context(n, 4, shares=True)).index for n in range(4)] == [0, 1, 0, 1]
    accelerators["count"] = 0
    assert own_device(context(3, 4)) == torch.device("cpu")


def test_the_generators_of_the_device_are_seeded(accelerators: dict[str, Any]) -> None:
    seed_torch(5)
    assert accelerators["seeds"] == [5]
    first = torch.rand(3)
    accelerators["initialised"] = False
    seed_torch(5)
    assert accelerators["seeds"] == [5], "what is not in use is left alone"
    assert torch.equal(torch.rand(3), first)


def test_tensors_at_odd_addresses_are_copied_and_others_are_not() -> None:
    """Where a view of an array begins differs between processes, and the bits of products depend on it."""
    whole = torch.arange(100.0)
    batch = {"view": whole[1:5], "whole": whole, "more": [(whole[3:7], 1)]}
    moved = to_device(batch, torch.device("cpu"))
    assert moved["whole"] is whole
    for found, view in ((moved["view"], whole[1:5]), (moved["more"][0][0], whole[3:7])):
        assert torch.equal(found, view)
        assert found.data_ptr() % 64 == 0


@pytest.mark.parametrize(("workers", "devices", "size"), [(1, 1, 50), (4, 4, 50), (4, 2, 25), (3, 2, 25)])
def test_half_of_a_devices_memory_is_for_parameters_and_states(workers, devices, size, monkeypatch) -> None:
    """Workers that share a device divide it; on the CPU it is the worker's part of the node."""
    module = SimpleNamespace(mem_get_info=lambda device: (7, 100))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: devices)
    assert memory_for_state(torch.device("cuda", 0), 1000, workers) == size
    assert memory_for_state(torch.device("cpu"), 1000, workers) == 1000
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    assert memory_for_state(torch.device("cuda", 0), 1000, workers) == 0, "not known"
