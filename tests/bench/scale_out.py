"""Throughput gained by ranks that join: with 2, 3 and 4 ranks on 2 stages, and the cost of a join for the others.

    python tests/bench/scale_out.py --json [--steps N]

Layers sleep instead of computing, and the global batch stays. Two nodes begin, and another one joins twice.
`of_ideal`: the step time with two ranks over the step time now, over the number of ranks for each one at the start.
`joined`: the newcomer trains in the stage where it found its place; `rebalanced`: layers and ranks have moved, where
the coordinator found that worth it. `longest_step`: the longest of the steps from two before the newcomer trains to the
steady state, over the median step before; 1 means that nothing was felt.
"""

from __future__ import annotations

import argparse
import json
import os
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

STAGES, RANKS = 2, 4
LAYERS, MICRO_BATCHES = 12, 36
AFTER_S = 3.0
WARM_UP_STEPS = 6
LOOKS = 3  # times AFTER_S in which the coordinator has looked for a faster layout, and found none


class GrowingJob(SleepingJob):
    """A job that begins with one rank per stage, and grows."""

    def __init__(self, hosts: Hosts, out: Path) -> None:
        super().__init__(hosts, out, stages=STAGES, after_s=AFTER_S, least=STAGES)
        self._config = json.dumps(json.loads(self._config) | {"layers": LAYERS, "micro_batches": MICRO_BATCHES})

    def newest_s(self) -> float:
        """The time of the last commit."""
        return float(self.events("committed")[-1]["at_s"])

    def settles(self, since: int) -> bool:
        """Wait for a rebalance beyond the first `count`, or until none is expected; returns whether there was one."""
        until_s = self.newest_s() + LOOKS * AFTER_S
        wait(lambda: len(self.events("rebalanced")) > since or self.newest_s() > until_s, "the rebalance")
        return len(self.events("rebalanced")) > since


def measure(steps: int) -> list[dict[str, Any]]:
    """Measure one job at each size, from two ranks to four."""
    with tempfile.TemporaryDirectory() as folder, Hosts(RANKS, namespaces=False) as hosts:
        job = GrowingJob(hosts, Path(folder))
        job.start(*hosts.hosts[:STAGES])
        wait(lambda: len(job.events("committed")) > WARM_UP_STEPS or job.events("ended"), "training")
        assert not job.events("ended"), job.events("ended")
        first_s = before_s = job.median_step(job.newest_s(), steps)
        found: list[dict[str, Any]] = [{"ranks": STAGES, "step_s": round(first_s, 4)}]
        for ranks, host in enumerate(hosts.hosts[STAGES:], STAGES + 1):
            rebalances, joins = len(job.events("rebalanced")), len(job.events("joined"))
            job.start(host)
            wait(lambda: len(job.events("joined")) > joins, "the newcomer")  # noqa: B023
            joined_s = job.events("joined")[-1]["at_s"]
            ideal_s = first_s * STAGES / ranks
            entry: dict[str, Any] = {"ranks": ranks}
            step_s = job.median_step(joined_s, 3)
            entry["joined"] = {"step_s": round(step_s, 4), "of_ideal": round(ideal_s / step_s, 3)}
            if job.settles(rebalances):
                step_s = job.median_step(job.events("rebalanced")[-1]["at_s"], steps)
                entry["rebalanced"] = {"step_s": round(step_s, 4), "of_ideal": round(ideal_s / step_s, 3)}
            entry["longest_step"] = round(max(job.steps_since(joined_s - 2 * before_s)) / before_s, 3)
            entry["layout"] = job.events("committed")[-1]["layout"]
            before_s = step_s
            found.append(entry)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object (the only format)")
    parser.add_argument("--steps", type=int, default=8, help="measured in each state")
    options = parser.parse_args()
    job = {"stages": STAGES, "layers": LAYERS, "micro_batches": MICRO_BATCHES}
    results: dict[str, Any] = {
        "benchmark": "scale_out",
        "versions": {"everstep": __version__, "cpus": os.cpu_count()},
        "job": {**job, "forward_s": FORWARD_S, "backward_s": BACKWARD_S},
        "states": measure(options.steps),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
