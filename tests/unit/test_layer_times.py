"""The times of single layers: what each one took, forward and backward, and which micro-batch is timed."""

from __future__ import annotations

import mmap
import os
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everstep.agents.analysis.layer_costs import LEAST, LayerCosts
from everstep.comms.control import telemetry_pb2 as pb
from everstep.elastic.contract.progress import create_page
from everstep.elastic.contract.telemetry import SHARED_BYTES, Spent, Telemetry, TelemetryReader, spans
from everstep.elastic.step.layer_times import PAUSE_S, LayerSample, LayerTimes
from everstep.resharding.legs import StepWork
from everstep.resharding.work import AssignedLeg, Leg, Work


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, forward_s: float, backward_s: float) -> Tensor:
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.backward_s)
        return gradient, None, None


class Sleeping(nn.Module):
    def __init__(self, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.seconds = forward_s, backward_s

    def forward(self, value: Any) -> Any:
        first, *rest = value if isinstance(value, tuple) else (value,)
        out = Sleep.apply(self.linear(first), *self.seconds)
        return (out, *rest) if rest else out


def timed(layers: list[nn.Module], value: Any, start: int = 0) -> tuple[list[float], list[float]]:
    """The seconds of each layer's forward and backward, as a sample writes them: the least of four."""
    found = [once(layers, value, start) for _ in range(4)]
    forwards, backwards = zip(*found, strict=True)
    return list(map(min, zip(*forwards, strict=True))), list(map(min, zip(*backwards, strict=True)))


def once(layers: list[nn.Module], value: Any, start: int) -> tuple[list[float], list[float]]:
    sample = LayerSample(Leg(3, start, start + len(layers)))
    for layer in layers:
        started = time.monotonic_ns()
        value = layer(value)
        sample.forwarded(started, value)
    loss = (value[0] if isinstance(value, tuple) else value).sum()
    sample.lost()
    began = time.monotonic_ns()
    loss.backward(retain_graph=True)
    sample.backward(began)
    for _ in layers:
        sample.harvested(time.monotonic_ns())
    fd = create_page()
    sample.write(Telemetry(mmap.mmap(fd, SHARED_BYTES)))
    reader = TelemetryReader(fd)
    written = list(spans(reader.read()))
    reader.close()
    os.close(fd)
    assert [(span.kind, span.amount, span.micro_batch) for span in written] == [
        (Spent.LAYER, start + i, 3) for i in range(len(layers))
    ]
    return [(span.end_ns - span.start_ns) / 1e9 for span in written], [span.value for span in written]


SECONDS = [(0.01, 0.06), (0.05, 0.02), (0.02, 0.09)]


def close(found: list[float], expected: tuple[float, ...]) -> bool:
    return all(want <= got < want + 0.015 for got, want in zip(found, expected, strict=True))


@pytest.mark.parametrize("start", [0, 2])
def test_each_layer_has_its_own_time(start: int) -> None:
    value = torch.ones(2, 4, requires_grad=start > 0)  # activations of another stage are leaves
    forward_s, backward_s = timed([Sleeping(*seconds) for seconds in SECONDS], value, start)
    assert close(forward_s, (0.01, 0.05, 0.02)), forward_s
    assert close(backward_s, (0.06, 0.02, 0.09)), backward_s


def test_what_passes_a_layer_unchanged_does_not_matter() -> None:
    aside = torch.ones(2, 4, requires_grad=True)
    through = aside * 2
    layers: list[nn.Module] = [Sleeping(*seconds) for seconds in SECONDS]
    _, backward_s = timed(layers, (torch.ones(2, 4), aside, through))
    assert close(backward_s, (0.06, 0.02, 0.09)), backward_s
    assert not aside._backward_hooks, "a hook on a leaf would be called in later steps, too"


def test_frozen_layers_at_the_beginning_have_no_backward() -> None:
    layers = [Sleeping(*seconds) for seconds in SECONDS]
    for parameter in layers[0].parameters():
        parameter.requires_grad_(False)
    _, backward_s = timed([*layers], torch.ones(2, 4))
    assert close(backward_s, (0.0, 0.02, 0.09)), backward_s


def test_a_layer_that_works_in_place_is_no_obstacle() -> None:
    first, last = Sleeping(0.0, 0.05), Sleeping(0.0, 0.03)
    _, backward_s = timed([first, nn.ReLU(inplace=True), last], torch.ones(2, 4))
    assert close(backward_s, (0.05, 0.0, 0.03)), backward_s


def test_one_micro_batch_of_each_step_is_timed_in_turn() -> None:
    legs = tuple(Leg(m, 0, 2) for m in range(3))
    work = Work(tuple(AssignedLeg(0, *leg) for leg in legs))
    now_s, sampled = 0.0, []
    times = LayerTimes(lambda layer: True, lambda: now_s)
    for step in range(6):
        now_s += 1.0
        state = StepWork.begin(step, 0, work)
        for leg in legs:
            if times.sample(state, leg) is not None:
                sampled.append(leg.micro_batch)
            state.forwarded(leg)
    assert sampled == [0, 1, 2, 0, 1, 2]
    now_s += PAUSE_S
    assert times.sample(StepWork.begin(6, 0, work), legs[0]) is None, "too soon: it would cost too much"
    now_s += PAUSE_S
    assert times.sample(StepWork.begin(9, 0, work), legs[0]) is not None
    elsewhere = LayerTimes(lambda layer: layer == 0)
    assert not any(elsewhere.sample(StepWork.begin(0, 0, work), leg) for leg in legs), "not in host memory"


def test_a_sample_is_cheap() -> None:
    """Below 0.5% of the time between two of them: without the layers' own time, on a machine that others use."""

    def cost() -> float:
        sample, tensors = LayerSample(Leg(0, 0, 24)), []
        value = torch.ones(1, requires_grad=True)
        took_ns = 0
        for _ in range(24):
            value = value * 1
            started = time.monotonic_ns()
            sample.forwarded(started, value)
            took_ns += time.monotonic_ns() - started
            tensors.append(value)
        value.backward()
        sample.backward(0)
        started = time.monotonic_ns()
        for _ in range(24):
            sample.harvested(started)
        sample.write(telemetry)
        return (took_ns + time.monotonic_ns() - started) / 1e9

    telemetry = Telemetry()
    assert min(cost() for _ in range(50)) < 0.005 * 24 * PAUSE_S


def report(rank: int, costs: dict[int, tuple[float, float]]) -> pb.Telemetry:
    layers = pb.LayerTimes(rank=rank, layer=costs)
    layers.forward_s.extend(forward for forward, _ in costs.values())
    layers.backward_s.extend(backward for _, backward in costs.values())
    return pb.Telemetry(layers=[layers])


def test_costs_are_what_ranks_mostly_report_by_their_speed() -> None:
    costs = LayerCosts()
    for _ in range(LEAST):
        costs.take(report(0, {0: (0.1, 0.2), 1: (0.3, 0.3)}), {})
        assert costs.costs(3) is None, "layer 2 was not reported"
    for _ in range(LEAST):
        costs.take(report(1, {2: (1.0, 2.0)}), {1: 0.5})
    costs.take(report(0, {0: (9.0, 9.0)}), {})
    found = costs.costs(3)
    assert found is not None
    assert found.forward == pytest.approx((0.1, 0.3, 0.5))
    assert found.backward == pytest.approx((0.2, 0.3, 1.0))
    assert costs.costs(0) is None
