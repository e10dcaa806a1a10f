"""Throughput after ranks are lost for good: measured, forecast, and the upper bound.

    python tests/bench/after_loss.py --json [--only 4x2-1,...] [--steps N]
    python tests/bench/after_loss.py --json --simulated

Jobs of P stages x D ranks, one rank a node, on layers that sleep instead of computing; k nodes are killed and do not
come back, and the global batch stays. `rerouted`: until Everstep rebalances, the micro-batches of a lost rank go to the
others of its stage, and nothing else changes. `rebalanced`: layers and ranks have moved. Times are medians between
commits, by the coordinator's clock; `of_ideal` is throughput over (N - k) / N of that before the loss; `forecast` the
planner's ratio of the step time to that before the loss, over the measured one.

With `--simulated` nothing is measured: policies are compared by their forecasts (`after_loss_policies.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from everstep import __version__  # noqa: E402
from everstep.resharding.forecast import Costs, step_time  # noqa: E402
from everstep.resharding.layout import Layout, Stage  # noqa: E402
from everstep.resharding.planners import deal_micro_batches  # noqa: E402
from tests.bench.after_loss_policies import SHAPES, table  # noqa: E402
from tests.jobs.hosts import HostJob, Hosts  # noqa: E402

SCRIPT = Path(__file__).with_name("peers") / "sleeping_worker.py"
LAYERS, MICRO_BATCHES = 16, 32
FORWARD_S, BACKWARD_S = 0.005, 0.010
CASES = {"2x2-1": (2, 2, (3,)), "4x2-1": (4, 2, (3,)), "4x2-2": (4, 2, (3, 5)), "4x2-3": (4, 2, (0, 3, 5))}
TIMEOUT_S = 240.0


class SleepingJob(HostJob):
    """A job of one rank per host that rebalances after `after_s`."""

    def __init__(self, hosts: Hosts, out: Path, *, stages: int, after_s: float, least: int = 0) -> None:
        """`least`: the number of nodes with which the job begins; 0: all."""
        self._after_s = after_s
        count = len(hosts.hosts)
        super().__init__(hosts, out, nnodes=f"{least or count}:{count}", steps=10_000, stages=stages)
        config = {"layers": LAYERS, "stages": stages, "micro_batches": MICRO_BATCHES, "steps": 10_000}
        self._config = json.dumps({**config, "forward_s": FORWARD_S, "backward_s": BACKWARD_S})

    def start_coordinator(self) -> Any:
        self.coordinator = self.hosts.coordinator(self._nnodes, *self.flags())
        return self.coordinator

    def flags(self) -> list[str]:
        """Flags of the coordinator."""
        return [f"--es-events={self._events}", f"--es-rebalance-after={self._after_s}"]

    def start(self, *hosts: int) -> None:
        """One node on each of these hosts, or on all."""
        for host in hosts or self.hosts.hosts:
            flags = [f"--nnodes={self._nnodes}", "--nproc-per-node=1"]
            self.hosts.launch(host, SCRIPT, [self._config], flags)

    def hosts_of(self, ranks: tuple[int, ...]) -> list[int]:
        """The hosts of these ranks."""
        addresses = [event["host"] for event in self.events("node_joined")]  # in the order of their ranks
        return [next(h for h in self.hosts.hosts if self.hosts.address(h) == addresses[rank]) for rank in ranks]

    def steps_since(self, at_s: float) -> list[float]:
        """The times between commits since then."""
        times = [event["at_s"] for event in self.events("committed") if event["at_s"] >= at_s]
        return [later - earlier for earlier, later in pairwise(times)]

    def median_step(self, since_s: float, steps: int) -> float:
        """Of so many steps after the first one since then."""
        wait(lambda: len(self.steps_since(since_s)) > steps, f"{steps} steps")
        return statistics.median(self.steps_since(since_s)[1:])


def wait(condition: Callable[[], Any], what: str) -> None:
    until_s = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > until_s:
            raise TimeoutError(f"not within {TIMEOUT_S:g} s: {what}")
        time.sleep(0.05)


def layout_of(text: str) -> Layout:
    """Parse the layout in an event."""
    stages = []
    for start, last, ranks in re.findall(r"layers (\d+)-(\d+): ranks ([\d,]+)", text):
        members = tuple(int(rank) for rank in ranks.split(","))
        stages.append(Stage(int(start), int(last) + 1, members, deal_micro_batches(MICRO_BATCHES, members)))
    return Layout(1, MICRO_BATCHES, tuple(stages), (), tuple(stages))


def measure(stages: int, width: int, lost: tuple[int, ...], steps: int) -> dict[str, Any]:
    """One case."""
    ranks = stages * width
    costs = Costs((FORWARD_S,) * LAYERS, (BACKWARD_S,) * LAYERS)
    forecast = lambda text: step_time(layout_of(text), costs, {})  # noqa: E731
    with tempfile.TemporaryDirectory() as folder, Hosts(ranks, namespaces=False) as hosts:
        job = SleepingJob(hosts, Path(folder), stages=stages, after_s=8 * steps)
        job.start()
        wait(lambda: len(job.events("committed")) > 3 or job.events("ended"), "training")
        assert not job.events("ended"), job.events("ended")
        whole = job.events("started")[0]["layout"]
        before_s = job.median_step(job.events("committed")[-1]["at_s"], steps)
        for count, host in enumerate(job.hosts_of(lost), 1):
            hosts.kill(host)
            wait(lambda: len(job.events("recovered")) >= count or job.events("ended"), "the recovery")  # noqa: B023
            assert not job.events("ended"), job.events("ended")
            job.median_step(job.events("recovered")[-1]["at_s"], 2)  # another version outlives nodes
        rerouted_s = job.median_step(job.events("recovered")[-1]["at_s"], steps)
        rerouted = job.events("committed")[-1]["layout"]
        wait(lambda: job.events("rebalanced"), "the rebalance")
        switch = job.events("rebalanced")[-1]
        rebalanced_s = job.median_step(switch["at_s"], steps)
        switching_s = max(job.steps_since(switch["at_s"] - rerouted_s)[:2])
    left = (ranks - len(lost)) / ranks
    found = {"rerouted": (rerouted_s, rerouted), "rebalanced": (rebalanced_s, switch["layout"])}
    return {
        "stages": stages,
        "ranks_per_stage": width,
        "lost": len(lost),
        "before_s": round(before_s, 4),
        **{f"{name}_s": round(seconds, 4) for name, (seconds, _) in found.items()},
        "of_ideal": {name: round(before_s / seconds / left, 3) for name, (seconds, _) in found.items()},
        "forecast": {
            name: round(forecast(text) / forecast(whole) / (seconds / before_s), 3)
            for name, (seconds, text) in found.items()
        },
        "rebalanced_over_rerouted": round(rerouted_s / rebalanced_s, 3),
        "longest_step_at_the_switch_s": round(switching_s, 4),
        "layout": switch["layout"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object (the only format)")
    parser.add_argument("--only", default=",".join(CASES), help=f"a comma-separated choice of {', '.join(CASES)}")
    parser.add_argument("--steps", type=int, default=6, help="measured in each state")
    parser.add_argument("--simulated", action="store_true", help="compare policies in virtual time, up to 1,024 ranks")
    options = parser.parse_args()
    if options.simulated:
        print(json.dumps({"benchmark": "after_loss", "simulated": True, "of_ideal": table(list(SHAPES))}))
        return
    results: dict[str, Any] = {
        "benchmark": "after_loss",
        "versions": {"everstep": __version__, "cpus": os.cpu_count()},
        "job": {"layers": LAYERS, "micro_batches": MICRO_BATCHES, "forward_s": FORWARD_S, "backward_s": BACKWARD_S},
        "cases": {name: measure(*CASES[name], options.steps) for name in options.only.split(",")},
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
