"""The model of a Grafana dashboard, and its JSON. Pure: values in, values out.

Expressions contain bare metric names; the selector of the chosen runs is inserted. `$w` is the window of rates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH = 24
_METRIC = re.compile(r"\b(everstep_[a-z_]+)(\{([^}]*)\})?")
_SOURCE = {"type": "prometheus", "uid": "${source}"}


@dataclass(frozen=True)
class Line:
    """One query of a panel, and the name of its series."""

    expression: str
    legend: str = ""

    def prometheus(self, run: str, window: str) -> str:
        """The expression as Prometheus reads it."""

        def select(match: re.Match[str]) -> str:
            inside = f",{match[3]}" if match[3] else ""
            return f'{match[1]}{{run=~"{run}"{inside}}}'

        return _METRIC.sub(select, self.expression).replace("$w", window)


@dataclass(frozen=True)
class Panel:
    """A panel. `unit` is Grafana's name of the unit; `faults` marks recoveries on the time axis."""

    title: str
    about: str
    unit: str
    lines: Sequence[Line]
    kind: str = "timeseries"  # timeseries | stat | bargauge | heatmap
    width: int = 12
    height: int = 8
    stacked: str = ""
    thresholds: Sequence[tuple[str, float | None]] = ()


@dataclass(frozen=True)
class Row:
    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Dashboard:
    uid: str
    title: str
    about: str
    rows: Sequence[Row]
    tags: Sequence[str] = field(default=("everstep",))

    def panels(self) -> Iterator[Panel]:
        for row in self.rows:
            yield from row.panels


def quantiles(metric: str, by: str = "") -> tuple[Line, ...]:
    """The median and the 95th percentile of a histogram."""
    group = f"le, {by}" if by else "le"
    name = f"{{{{{by}}}}} " if by else ""
    return tuple(
        Line(f"histogram_quantile({q}, sum by ({group}) (rate({metric}_bucket[$w])))", f"{name}{shown}")
        for q, shown in ((0.5, "median"), (0.95, "p95"))
    )


def stat(title: str, about: str, unit: str, expression: str, *thresholds: tuple[str, float | None]) -> Panel:
    return Panel(title, about, unit, (Line(expression),), "stat", width=4, height=4, thresholds=thresholds)


def render(dashboard: Dashboard) -> dict[str, Any]:
    """A dashboard as Grafana (11 and newer) imports it."""
    panels: list[dict[str, Any]] = []
    top = 0
    for row in dashboard.rows:
        panels.append(
            {
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": top, "w": WIDTH, "h": 1},
                "panels": [],
            }
        )
        top += 1
        left = height = 0
        for panel in row.panels:
            if left + panel.width > WIDTH:
                left, top, height = 0, top + height, 0
            place = {"x": left, "y": top, "w": panel.width, "h": panel.height}
            panels.append(_panel(panel, place))
            left, height = left + panel.width, max(height, panel.height)
        top += height
    for number, drawn in enumerate(panels, start=1):
        drawn["id"] = number
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.about,
        "tags": list(dashboard.tags),
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "graphTooltip": 1,
        "templating": {"list": [_source_variable(), _run_variable()]},
        "annotations": {"list": [_recoveries()]},
        "links": [
            {"type": "dashboards", "title": "Everstep", "tags": ["everstep"], "asDropdown": False, "keepTime": True}
        ],
        "panels": panels,
    }


def _panel(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    steps = [{"color": color, "value": value} for color, value in panel.thresholds or (("green", None),)]
    custom: dict[str, Any] = {}
    if panel.kind == "timeseries":
        custom = {"lineWidth": 1, "fillOpacity": 40 if panel.stacked else 0, "showPoints": "never"}
        custom["stacking"] = {"mode": panel.stacked or "none", "group": "A"}
    options: dict[str, Any] = {"tooltip": {"mode": "multi"}, "legend": {"displayMode": "list", "placement": "bottom"}}
    if panel.kind == "stat":
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "custom": custom, "thresholds": {"mode": "absolute", "steps": steps}},
            "overrides": [],
        },
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": _SOURCE,
                "expr": line.prometheus("$run", "$__rate_interval"),
                "legendFormat": line.legend,
            }
            for number, line in enumerate(panel.lines)
        ],
    }


def _source_variable() -> dict[str, Any]:
    return {"name": "source", "label": "Source", "type": "datasource", "query": "prometheus", "current": {}}


def _run_variable() -> dict[str, Any]:
    query = "label_values(everstep_job_phase, run)"
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": "run"},
        "definition": query,
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def _recoveries() -> dict[str, Any]:
    line = Line("sum by (reason) (changes(everstep_recoveries_total[$w])) > 0")
    return {
        "name": "Recoveries",
        "enable": True,
        "iconColor": "red",
        "datasource": _SOURCE,
        "expr": line.prometheus("$run", "$__rate_interval"),
        "titleFormat": "recovery",
        "textFormat": "{{reason}}",
        "step": "10s",
    }


def text(dashboard: Dashboard) -> str:
    """The file."""
    return json.dumps(render(dashboard), indent=1, ensure_ascii=False) + "\n"
