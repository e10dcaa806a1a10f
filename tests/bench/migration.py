"""The cost of a rebalance: with prefetching, and with all copies made at the switch (stop, copy, go).

    python tests/bench/migration.py --json [--megabytes 10,50,200] [--steps N]

2 stages x 1 rank, one rank a node, links of 1 Gbit/s (network namespaces and tc; without them the JSON reports it, and
the links are those of the loopback interface). A third node joins the first stage, and then one of the second stage's
three layers moves to the first. Layers are as large as it takes for about so many megabytes to move at the switch;
Adam; no parity: its transfers would use a part of the links at random times.

Times are those between commits, by the coordinator's clock. `stall_s`: the longest time that a rank stood still to
enter the new layout, by its own clock. `longest_s`: the longest step from the announcement to the second step behind
the switch; `lost_s`: what the steps from the announcement on took longer than the median step before the switch and
behind it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from after_loss import SleepingJob, wait

from everstep import __version__
from tests.jobs.hosts import Cannot, Hosts

BITS_PER_S = 1e9
STAGES, NODES, LAYERS, MICRO_BATCHES = 2, 3, 6, 6
FORWARD_S, BACKWARD_S = 0.02, 0.04
MOVED_PER_PARAMETER = 48  # bytes of all ranks together: records, gradients that lead on, values of layers
BEHIND = 2  # steps behind the switch that may still take longer, while snapshots begin again


class MigratingJob(SleepingJob):
    """A job with layers of this many parameters."""

    def __init__(self, hosts: Hosts, out: Path, *, width: int, ahead: bool, after_s: float) -> None:
        self._ahead = ahead
        super().__init__(hosts, out, stages=STAGES, after_s=after_s, least=STAGES)
        config = {"layers": LAYERS, "stages": STAGES, "micro_batches": MICRO_BATCHES, "steps": 10_000}
        times = {"forward_s": FORWARD_S, "backward_s": BACKWARD_S}
        self._config = json.dumps({**config, **times, "width": width, "optimizer": "Adam", "protection": "none"})

    def flags(self) -> list[str]:
        return [*super().flags(), f"--es-prefetch={'on' if self._ahead else 'off'}"]


def limited(hosts: Hosts) -> bool:
    """Limit the links of every host to BITS_PER_S, where network namespaces are available."""
    try:
        hosts.limit(*hosts.hosts, bits_per_s=BITS_PER_S)
    except Cannot:
        return False
    return True


def measure(megabytes: float, steps: int, *, ahead: bool) -> dict[str, Any]:
    """One rebalance."""
    width = round(math.sqrt(megabytes * 1e6 / MOVED_PER_PARAMETER))
    with tempfile.TemporaryDirectory() as folder, Hosts(NODES) as hosts:
        links = limited(hosts)
        job = MigratingJob(hosts, Path(folder), width=width, ahead=ahead, after_s=4.0 + megabytes / 10)
        job.start(*hosts.hosts[:STAGES])
        wait(lambda: len(job.events("committed")) > 1 or job.events("ended"), "training")
        job.start(*hosts.hosts[STAGES:])
        wait(lambda: job.events("joined") or job.events("ended"), "the third node joins")
        wait(lambda: job.events("rebalanced") or job.events("ended"), "the rebalance")
        assert not job.events("ended"), job.events("ended")
        switch = job.events("rebalanced")[-1]
        job.median_step(switch["at_s"], steps + BEHIND)
        announced_s = job.events("rebalance_prepared")[-1]["at_s"]
        joined = job.events("joined")[-1]
        times = [(event["at_s"], event["generation"]) for event in job.events("committed")]
    spans = [(one[0], other[0], other[1]) for one, other in pairwise(times)]
    before = [stop - start for start, stop, _ in spans if start >= joined["at_s"] and stop <= announced_s]
    behind = [stop - start for start, stop, number in spans if number == switch["generation"]][1 + BEHIND :]
    usual = {False: statistics.median(before), True: statistics.median(behind)}
    under_way = [span for span in spans if span[1] > announced_s and span[2] < switch["generation"]]
    of_it = [*under_way, *[span for span in spans if span[2] == switch["generation"]][: 1 + BEHIND]]
    lost = [stop - start - usual[number == switch["generation"]] for start, stop, number in of_it]
    return {
        "links_limited": links,
        "before_s": round(usual[False], 4),
        "behind_s": round(usual[True], 4),
        "steps_under_way": len(under_way),
        "stall_s": round(switch["stall_s"], 4),
        "longest_s": round(max(stop - start for start, stop, _ in of_it), 4),
        "lost_s": round(sum(lost), 4),
        "ahead_bytes": switch["prefetched_bytes"],
        "switch_bytes": switch["moved_bytes"],
    }


def compare(megabytes: float, steps: int) -> dict[str, Any]:
    """Measure with and without prefetching."""
    copied = measure(megabytes, steps, ahead=True)
    stopped = measure(megabytes, steps, ahead=False)
    return {
        "ahead": copied,
        "stop_copy_go": stopped,
        "stall_over_stop_copy_go": round(copied["stall_s"] / stopped["stall_s"], 3),
        "switch_bytes_over_stop_copy_go": round(copied["switch_bytes"] / stopped["switch_bytes"], 3),
        "all_bytes_over_stop_copy_go": round(
            (copied["ahead_bytes"] + copied["switch_bytes"]) / stopped["switch_bytes"], 3
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object (the only format)")
    parser.add_argument("--megabytes", default="10,50,200", help="moved by stop, copy, go: a comma-separated list")
    parser.add_argument("--steps", type=int, default=4, help="measured behind the switch")
    options = parser.parse_args()
    results: dict[str, Any] = {
        "benchmark": "migration",
        "versions": {"everstep": __version__, "cpus": os.cpu_count()},
        "links_bits_per_s": BITS_PER_S,
        "job": {"layers": LAYERS, "micro_batches": MICRO_BATCHES, "forward_s": FORWARD_S, "backward_s": BACKWARD_S},
        "cases": {text: compare(float(text), options.steps) for text in options.megabytes.split(",")},
    }
    print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(main())
