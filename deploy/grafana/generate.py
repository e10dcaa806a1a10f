"""Writes the Grafana dashboards: python -m deploy.grafana.generate. The JSON is checked in, and a test compares it."""

from __future__ import annotations

from pathlib import Path

from .job import JOB
from .model import text
from .recovery import PROTECTION
from .workers import WORKERS

FOLDER = Path(__file__).parent / "dashboards"
DASHBOARDS = (JOB, PROTECTION, WORKERS)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for dashboard in DASHBOARDS:
        (FOLDER / f"{dashboard.uid}.json").write_text(text(dashboard))


if __name__ == "__main__":
    main()
