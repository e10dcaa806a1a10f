"""Plots what the dashboards' panels show of a real run with faults, for the documentation.

    python -m tests.bench.plot_metrics [FOLDER]      (docs/images; needs Prometheus, and matplotlib: the group `plot`)

The run is that of tests/integration/test_prometheus.py; every line is what Prometheus answers to the panel's query.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib  # pyright: ignore[reportMissingImports]  (of the dependency group plot)

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

from deploy.grafana.job import JOB
from deploy.grafana.model import Panel
from deploy.grafana.recovery import PROTECTION
from deploy.grafana.workers import WORKERS
from tests.jobs.watched import WatchedJob, watched

FOLDER = Path(__file__).parents[2] / "docs" / "images"
WINDOW = "5s"
SHOWN = {
    "metrics-job": (JOB, ("Step time", "Loss", "Throughput: tokens", "Goodput over the window")),
    "metrics-recovery": (
        PROTECTION,
        ("Recoveries by reason", "Time of a recovery by phase", "Exposure", "Copy and parity throughput"),
    ),
    "metrics-workers": (
        WORKERS,
        (
            "Compute per step",
            "Wait per step",
            "All ranks: seconds a second",
            "Straggler: slowdown of the slowest ranks",
        ),
    ),
}
UNITS = {"s": "s", "percentunit": "share", "Bps": "bytes/s"}
MARKS = {
    "worker_died": ("red", "worker killed"),
    "node_lost": ("darkred", "node killed"),
    "corruption": ("purple", "bit flipped"),
}


def named(legend: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        legend = legend.replace(f"{{{{{name}}}}}", value)
    return legend


def draw(axes: Any, panel: Panel, job: WatchedJob, end_s: float, marks: Sequence[tuple[float, str]]) -> None:
    for line in panel.lines:
        for series in job.prometheus.series(line.prometheus("watched", WINDOW), job.started_s, end_s, 0.25):
            points = [(at_s - job.started_s, float(value)) for at_s, value in series["values"] if value != "NaN"]
            if points:
                label = named(line.legend, series["metric"])
                axes.plot(*zip(*points, strict=True), linewidth=1.1, label=label)
    for at_s, color in marks:
        axes.axvline(at_s, color=color, linewidth=0.8, linestyle=":")
    unit = UNITS.get(panel.unit, "")
    axes.set_title(f"{panel.title} [{unit}]" if unit else panel.title, fontsize=9)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if len(axes.lines) - len(marks) <= 9:
        axes.legend(fontsize=6, loc="upper left")


def faults(job: WatchedJob) -> list[tuple[float, str]]:
    """The times of injected faults, in seconds since the start, with their colours."""
    ahead_s = time.time() - time.monotonic() - job.started_s
    return [(event["at_s"] + ahead_s, color) for name, (color, _) in MARKS.items() for event in job.events(name)]


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="everstep-plot-") as place, watched(Path(place)) as job:
        job.history()
        time.sleep(1.5)
        end_s, marks = time.time(), faults(job)
        for name, (dashboard, titles) in SHOWN.items():
            panels = [
                panel for panel in dashboard.panels() if panel.kind == "timeseries" and panel.title.startswith(titles)
            ]
            figure, grid = plt.subplots(2, 2, figsize=(10, 5.2), sharex=True, layout="constrained")
            for axes, panel in zip(grid.flat, panels, strict=True):
                draw(axes, panel, job, end_s, marks)
            for axes in grid[1]:
                axes.set_xlabel("seconds since the start", fontsize=7)
            told = ", ".join(f"{text}: {color}" for color, text in MARKS.values())
            figure.suptitle(f"{dashboard.title}   (dotted: {told})", fontsize=9)
            figure.savefig(folder / f"{name}.png", dpi=80)


if __name__ == "__main__":
    main()
