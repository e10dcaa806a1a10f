"""What an agent reads of its workers and its host, and reports: bounded, whatever their number."""

from __future__ import annotations

import mmap
import os
import sys
import types

import psutil
import pytest

from everstep.agents.monitoring.metrics import ACTIVITIES
from everstep.agents.node import gatherer as module
from everstep.agents.node.gatherer import Gatherer
from everstep.agents.node.host import HostReader
from everstep.comms.control import telemetry_pb2 as pb
from everstep.elastic.contract.progress import create_page
from everstep.elastic.contract.telemetry import SHARED_BYTES, Spent, Telemetry
from everstep.elastic.protocol.events import WorkerId


class Node:
    """A gatherer whose workers are this process."""

    def __init__(self) -> None:
        self.sent: list[pb.Telemetry] = []
        self.gatherer = Gatherer("job", "node", self.sent.append)
        self.host = HostReader()

    def worker(self, rank: int) -> Telemetry:
        fd = create_page()
        self.gatherer.watch(WorkerId(rank, 0), fd)
        telemetry = Telemetry(mmap.mmap(fd, SHARED_BYTES))
        os.close(fd)
        return telemetry

    def message(self) -> pb.Telemetry:
        return self.gatherer.message(*self.gatherer.look(self.host))


@pytest.fixture
def node():
    node = Node()
    yield node
    node.gatherer.close()


def work(telemetry: Telemetry, steps: int, peers: int = 1) -> None:
    for step in range(steps):
        telemetry.at(step)
        for peer in range(peers):
            telemetry.span(Spent.SEND, 1, peer=peer, amount=10, end_ns=1001)
        telemetry.committed(1.0, 8)


def test_messages_are_bounded_and_what_is_left_out_is_counted(node) -> None:
    for rank in range(20):
        work(node.worker(rank), 100, peers=5)
    message = node.message()
    assert len(message.steps) == module.STEPS_PER_MESSAGE
    assert len(message.links) == module.LINKS_PER_MESSAGE
    assert message.left_out == 20 * 99 - module.STEPS_PER_MESSAGE
    assert max(step.step for step in message.steps) == 99
    assert len(message.SerializeToString()) < 64 << 10
    again = node.message()
    assert (len(again.steps), len(again.links), again.left_out) == (0, 0, message.left_out)


def test_layers_of_many_workers_are_told_in_turn(node, monkeypatch) -> None:
    monkeypatch.setattr(module, "LAYERS_PER_MESSAGE", 6)
    workers = [node.worker(rank) for rank in range(5)]
    told = []
    for step in range(4):
        for telemetry in workers:
            telemetry.at(step)
            for layer in range(3):
                telemetry.span(Spent.LAYER, 1, amount=layer, value=0.1, end_ns=1001)
        layers = node.message().layers
        assert all(list(times.layer) == [0, 1, 2] for times in layers)
        told.append([times.rank for times in layers])
    assert told == [[], [0, 1], [2, 3], [4, 0]], "the first step is not timed"


def test_what_a_dead_worker_left_is_told(node) -> None:
    telemetry = node.worker(3)
    work(telemetry, 4)
    node.gatherer.ended(WorkerId(3, 0))
    assert [step.step for step in node.message().steps] == [1, 2, 3]
    assert b'everstep_worker_steps_total{rank="3"} 3.0' in node.gatherer._metrics.page()


def test_spans_are_kept_for_traces_within_bounds(node, monkeypatch) -> None:
    monkeypatch.setattr(module, "SPANS_KEPT", 100)
    telemetry = node.worker(0)
    for _ in range(10):
        work(telemetry, 20)
        node.message()
    ((_, kept),) = node.gatherer.spans()
    assert 100 <= sum(map(len, kept)) <= 100 + 40
    assert int(kept[-1]["number"][-1]) == 400 - 1


def test_the_host_is_what_psutil_says(node) -> None:
    host = node.message().host
    assert host.memory_bytes == psutil.virtual_memory().total
    assert 0 < host.memory_used_bytes < host.memory_bytes
    assert {disk.place for disk in host.disks} == {"cwd", "tmp"}
    assert host.cpus == psutil.cpu_count()
    assert 0 <= host.cpu_ratio <= 1
    for name in ACTIVITIES:
        assert hasattr(pb.StepTimes(), f"{name}_s")


def test_gpus_are_read_by_nvml(monkeypatch) -> None:
    """No device is needed: a library with the same calls replaces NVML, with one device that answers half of them."""
    nvml = types.ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def refused(handle: str) -> int:
        raise NVMLError("not supported")

    nvml.NVMLError = NVMLError
    nvml.NVML_TEMPERATURE_GPU = 0
    nvml.nvmlInit = nvml.nvmlShutdown = lambda: None
    nvml.nvmlDeviceGetCount = lambda: 2
    nvml.nvmlDeviceGetHandleByIndex = str
    nvml.nvmlDeviceGetName = lambda handle: b"GPU"
    nvml.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(used=3, total=10)
    nvml.nvmlDeviceGetUtilizationRates = lambda handle: types.SimpleNamespace(gpu=50)
    nvml.nvmlDeviceGetTemperature = lambda handle, sensor: 60
    nvml.nvmlDeviceGetPowerUsage = refused
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    host = HostReader()
    first, second = host.gpus()
    assert (first.index, second.index, first.name) == (0, 1, "GPU")
    assert (first.busy_ratio, first.memory_used_bytes, first.memory_bytes) == (0.5, 3, 10)
    assert (first.temperature_celsius, first.power_watts) == (60, 0)
    nvml.nvmlDeviceGetCount = lambda: refused("")
    assert host.gpus() == []
    host.close()
