"""Layers, micro-batches and ranks move to where they are computed fastest, while training continues: the same bytes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from everstep.demo.model import GPTConfig, gpt
from everstep.resharding.forecast import Costs, step_time
from everstep.resharding.layout import Layout, Stage
from everstep.resharding.planners import deal_micro_batches
from everstep.resharding.rebalance import AS_GOOD
from everstep.resharding.units import ModelSpec
from tests.jobs import slowly
from tests.jobs.cluster import Cluster
from tests.jobs.hosts import Hosts
from tests.property.worlds import layouts_of

STEPS = 40


class Rebalancing(Cluster):
    """A job that looks for a faster layout soon."""

    def __init__(self, hosts: Hosts, out: Path, *, after_s: float = 0.3, least: int = 1, **config: Any) -> None:
        self._after_s = after_s
        super().__init__(hosts, out, steps=config.pop("steps", STEPS), least=least, **config)

    def start_coordinator(self) -> subprocess.Popen[str]:
        """With a store, so that it can be started again."""
        flags = [
            f"--es-events={self.out}/events.jsonl",
            f"--es-store={self.out}/store.sqlite",
            f"--es-rebalance-after={self._after_s}",
        ]
        self.coordinator = self.hosts.coordinator(self._nnodes, *flags)
        return self.coordinator

    def begin(self) -> None:
        """All nodes train, and one may be lost."""
        self.start()
        self.await_whole()

    def offer(self) -> None:
        """The last node is lost, and a faster layout for the others is ready."""
        self.lose(self.hosts.hosts[-1])
        self.until(lambda: self.events("rebalance_prepared"), 40, "a faster layout is ready")

    def lose(self, host: int) -> None:
        """For good."""
        self.away.add(host)
        self.hosts.kill(host)

    def stages(self) -> int:
        """Of the newest committed step."""
        return str(self.events("committed")[-1]["layout"]).count("ranks")

    def host_of(self, rank: int) -> int:
        """The host of a rank of the job's start."""
        address = self.events("node_joined")[rank]["host"]
        return next(host for host in self.hosts.hosts if self.hosts.address(host) == address)

    def rebalanced(self, times: int = 1) -> str:
        """The layout after so many rebalances."""
        self.until(lambda: len(self.events("rebalanced")) >= times, 40, f"{times} rebalances")
        return str(self.events("rebalanced")[times - 1]["layout"])


def most_layers(layout: str) -> float:
    """The most layers that a stage has for each of its ranks."""
    stages = re.findall(r"layers (\d+)-(\d+): ranks ([\d,]+)", layout)
    return max((int(stop) - int(start) + 1) / len(ranks.split(",")) for start, stop, ranks in stages)


def test_layers_move_after_a_loss(tmp_path: Path) -> None:
    """2 stages x 2 nodes: one is lost, and the other of its stage gets less to do. Then another node comes."""
    with Hosts(4) as hosts:
        job = Rebalancing(hosts, tmp_path, least=3, stages=2, layers=6)
        job.begin()
        with slowly(tmp_path):
            job.lose(3)
            after = job.rebalanced()
            assert most_layers(after) < 4, f"a stage of 4 layers has lost one of two ranks: {after}"
            job.advance(3)
            job.away.clear()
            job.until(lambda: job.events("joined"), 40, "another node joins")
        job.see_to_the_end(60)
        job.check()


@pytest.mark.soak
def test_stages_follow_the_memory(tmp_path: Path) -> None:
    """Three ranks, which divide the optimizer's state, can hold all layers: one stage. Two cannot, and make two stages.

    With Adam a parameter takes 12 bytes on each rank (value, gradient, sum), and 12 on one of them (its record).
    """
    parameters = sum(p.numel() for p in gpt(GPTConfig(layers=6, width=32, heads=2, context=32)).parameters())
    flags = [f"--es-worker-memory={parameters * 17}"]
    with Hosts(3) as hosts:
        job = Rebalancing(hosts, tmp_path, least=2, stages="auto", layers=6, flags=flags)
        job.begin()
        assert job.stages() == 1
        with slowly(tmp_path):
            job.lose(2)
            assert job.rebalanced().count("ranks") == 2
        job.see_to_the_end(60)
        job.check()
    (prepared,) = job.events("rebalance_prepared")[:1]
    assert prepared["why"].startswith("ranks lack the memory for their layers; ")


SLEEPS = [(0.005, 0.005), (0.02, 0.03), (0.02, 0.08), (0.03, 0.03), (0.08, 0.16), (0.02, 0.02)]
"""Seconds of each layer's forward and backward: unlike what their parameters say, and not in one proportion."""


def chosen(event: dict[str, Any]) -> None:
    """The layout that a rebalance goes to is the best of all, by the costs that were measured."""
    costs = Costs(tuple(event["forward_s"]), tuple(event["backward_s"]))
    for sleeps, measured in zip(zip(*SLEEPS, strict=True), (costs.forward, costs.backward), strict=True):
        for sleep_s, cost_s in zip(sleeps, measured, strict=True):
            assert sleep_s <= cost_s < 1.3 * sleep_s + 0.01, f"measured {measured}, slept {sleeps}"
    speeds = {int(rank): speed for rank, speed in event["speeds"].items()}
    found = re.findall(r"layers (\d+)-(\d+): ranks ([\d,]+)", event["layout"])
    stages = [(int(start), int(stop) + 1, tuple(map(int, ranks.split(",")))) for start, stop, ranks in found]
    cut = tuple(Stage(start, stop, ranks, deal_micro_batches(8, ranks, speeds)) for start, stop, ranks in stages)
    layout = Layout(1, 8, cut, (), cut)
    spec = ModelSpec(costs.total, ())
    times = [step_time(other, costs, speeds) for other in layouts_of(spec, layout, len(cut), speeds)]
    assert step_time(layout, costs, speeds) <= (1 + AS_GOOD) * min(times)
    assert event["forecast_s"] == pytest.approx(step_time(layout, costs, speeds), rel=1e-3)


@pytest.mark.soak
def test_layers_go_where_measured_costs_say(tmp_path: Path) -> None:
    """2 stages x 2 nodes whose layers sleep unequally, before and after a loss."""
    (tmp_path / "sleeps.json").write_text(json.dumps(SLEEPS))
    with Hosts(4) as hosts:
        job = Rebalancing(hosts, tmp_path, after_s=4.0, least=3, stages=2, steps=30)
        job.begin()
        job.rebalanced(1)
        job.until(lambda: job.events("rebalance_measured"), 40, "the promise is checked")
        job.lose(job.host_of(3))
        job.rebalanced(2)
        job.until(lambda: len(job.events("rebalance_measured")) == 2, 40, "the promise is checked")
        job.see_to_the_end(60)
        job.check()
        prepared = job.events("rebalance_prepared")
        for event in prepared:
            chosen(event)
        assert job.events("rebalance_measured")[-1]["forecast_s"] == prepared[-1]["forecast_s"]


@pytest.mark.soak
@pytest.mark.parametrize("host", [0, 1, 2])
def test_a_rank_is_lost_while_layers_move(tmp_path: Path, host: int) -> None:
    """On either side of the move, once the plan has been offered."""
    with Hosts(4) as hosts:
        job = Rebalancing(hosts, tmp_path, least=2, stages=2, layers=6)
        job.begin()
        with slowly(tmp_path):
            job.offer()
            victim = job.workers_of(host)
            os.kill(next(iter(victim)), signal.SIGKILL)
            job.rebalanced()
            job.advance(3)
        job.see_to_the_end(60)
        job.check()


@pytest.mark.soak
def test_the_coordinator_dies_while_layers_move(tmp_path: Path) -> None:
    with Hosts(4) as hosts:
        job = Rebalancing(hosts, tmp_path, least=2, stages=2, layers=6)
        job.begin()
        with slowly(tmp_path):
            job.offer()
            job.coordinator.kill()
            job.coordinator.wait()
            job.start_coordinator()
            job.rebalanced()
            job.advance(3)
        job.see_to_the_end(60)
        job.check()
