"""The cost of a slow rank: throughput while it is slow, over the sum of the ranks' speeds, and after it recovers.

    python tests/bench/slow.py --json [--only 1.5,...] [--steps N]

One stage of 4 ranks on layers that sleep instead of computing. One rank takes 1.5 or 2 times as long from a moment on,
without a word to Everstep, and recovers later. `unbalanced`: every rank has as many micro-batches as before.
`balanced`: Everstep has found the slow rank, and dealt by speed. `of_speeds`: throughput over that of all ranks' speeds
together, (3 + 1 / factor) / 4 of that before. `steps_until_balanced`: steps committed from the moment on. `healthy`:
the step time of a job without a slow rank that may rebalance, over that of one that may not, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from everstep import __version__  # noqa: E402
from tests.bench.after_loss import BACKWARD_S, FORWARD_S, SleepingJob, wait  # noqa: E402
from tests.jobs.hosts import Hosts  # noqa: E402

RANKS, SLOW = 4, 2
LAYERS, MICRO_BATCHES = 4, 48
FACTORS = ("1.5", "2")
WARM_UP_STEPS = 6
AFTER_S = 3.0  # a layout has to last before it is looked at


class SlowJob(SleepingJob):
    """A job in which one rank can be slowed down."""

    def __init__(self, hosts: Hosts, out: Path, *, after_s: float = AFTER_S) -> None:
        super().__init__(hosts, out, stages=1, after_s=after_s)
        config = json.loads(self._config) | {"layers": LAYERS, "micro_batches": MICRO_BATCHES, "slow": str(out)}
        self._config = json.dumps(config)
        self._out = out

    def trains(self) -> None:
        self.start()
        wait(lambda: len(self.events("committed")) > WARM_UP_STEPS or self.events("ended"), "training")
        assert not self.events("ended"), self.events("ended")

    def slow(self, factor: str) -> float:
        """Slow one rank down by this factor; returns the time of the last commit before."""
        (self._out / f"slow-{SLOW}").write_text(factor)
        return float(self.events("committed")[-1]["at_s"])

    def balanced(self, since: int) -> dict[str, Any]:
        """The newest rebalance, once there are more than `count`."""
        wait(lambda: len(self.events("rebalanced")) > since, "the rebalance")
        return self.events("rebalanced")[-1]


def measure(factor: str, steps: int) -> dict[str, Any]:
    """Measure one slowdown factor."""
    with tempfile.TemporaryDirectory() as folder, Hosts(RANKS, namespaces=False) as hosts:
        job = SlowJob(hosts, Path(folder))
        job.trains()
        before_s = job.median_step(job.events("committed")[-1]["at_s"], steps)
        slow_s = job.slow(factor)
        unbalanced_s = job.median_step(slow_s, 3)
        first = job.balanced(0)
        job.median_step(first["at_s"], steps)
        settled = job.events("rebalanced")[-1]
        balanced_s = job.median_step(settled["at_s"], steps)
        count, again_s = len(job.events("rebalanced")), job.slow("1")
        back = job.balanced(count)
        recovered_s = job.median_step(back["at_s"], steps)
        took = [e for e in job.events("committed") if slow_s < e["at_s"] <= first["at_s"]]
        took_back = [e for e in job.events("committed") if again_s < e["at_s"] <= back["at_s"]]
    speeds = (RANKS - 1 + 1 / float(factor)) / RANKS
    return {
        "before_s": round(before_s, 4),
        "unbalanced_s": round(unbalanced_s, 4),
        "balanced_s": round(balanced_s, 4),
        "recovered_s": round(recovered_s, 4),
        "of_speeds": {
            "unbalanced": round(before_s / unbalanced_s / speeds, 3),
            "balanced": round(before_s / balanced_s / speeds, 3),
        },
        "recovered_over_before": round(recovered_s / before_s, 3),
        "steps_until_balanced": len(took),
        "steps_until_back": len(took_back),
    }


def healthy(rounds: int, steps: int) -> dict[str, Any]:
    """Alternate jobs with and without rebalancing."""
    times: dict[float, list[float]] = {AFTER_S: [], 0.0: []}
    for _ in range(rounds):
        for after_s, found in times.items():
            with tempfile.TemporaryDirectory() as folder, Hosts(RANKS, namespaces=False) as hosts:
                job = SlowJob(hosts, Path(folder), after_s=after_s)
                job.trains()
                found.append(job.median_step(job.events("committed")[-1]["at_s"], steps))
                assert not job.events("rebalanced"), job.events("rebalanced")
    ratios = [on / off for on, off in zip(times[AFTER_S], times[0.0], strict=True)]
    return {"rounds": rounds, "ratio": round(statistics.median(ratios), 4), "ratios": [round(r, 4) for r in ratios]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object (the only format)")
    parser.add_argument("--only", default=",".join(FACTORS), help="a comma-separated choice of factors")
    parser.add_argument("--steps", type=int, default=10, help="measured in each state")
    parser.add_argument("--rounds", type=int, default=3, help="of the healthy job")
    options = parser.parse_args()
    results: dict[str, Any] = {
        "benchmark": "slow",
        "versions": {"everstep": __version__, "cpus": os.cpu_count()},
        "job": {
            "ranks": RANKS,
            "layers": LAYERS,
            "micro_batches": MICRO_BATCHES,
            "forward_s": FORWARD_S,
            "backward_s": BACKWARD_S,
        },
        "slower": {factor: measure(factor, options.steps) for factor in options.only.split(",")},
        "healthy": healthy(options.rounds, options.steps),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
