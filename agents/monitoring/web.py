"""The job's web page: one file without anything from elsewhere, and what it draws, in bounded size."""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .observer import Observer
from .pages import Maker, Negotiated, Page
from .screen import concerns
from .story import (
    Grade,
    newest_stories,
    ranks_text,
    size_text,
)
from .views import (
    Seen,
    newest,
    to_json,
    view_of,
)

FRESH_S = 0.5  # for this long all clients get the same answer
STEPS = 600
EVENTS = 200
CONCERNS = 20
RECOVERIES = 40
NODES = 200  # listed; of more, first those in which something is amiss
HEAT_ROWS = 256
HEAT_STEPS = 120
HEAT_CELLS = 20_000
SILENT_S = 3.0
_FOLDER = Path(__file__).parent / "web"
_COPIED = (
    *("job", "at_s", "unix_s", "phase", "recovering", "generation", "world_size", "stages", "step", "steps", "loss"),
    *("step_s", "typical_step_s", "commit_age_s", "samples_per_s", "tokens_per_s", "goodput", "protection", "exposure"),
    "checkpoint",
    "saving",
)


def routes(observer: Observer, *, orders: bool = False) -> dict[str, Maker]:
    """The pages that a coordinator serves over HTTP. `orders`: who sees them may give orders, too."""
    shown, page = WebPage(observer, orders=orders), front_page()
    return {
        "/": lambda: page,
        "/view.json": shown.page,
        "/metrics": Negotiated(observer.page),
        "/targets": observer.targets,
    }


def front_page() -> Page:
    """The page itself, and what browsers are to allow it: its own script and style, and asking where it came from."""
    style, script = ((_FOLDER / f"page.{kind}").read_text() for kind in ("css", "js"))
    html = (_FOLDER / "page.html").read_text().replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
    return Page("text/html; charset=utf-8", html.encode(), headers)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


class WebPage:
    """The page's data, made at most twice a second for any number of viewers."""

    def __init__(
        self, observer: Observer, clock: Callable[[], float] = time.monotonic, *, orders: bool = False
    ) -> None:
        self._observer = observer
        self._orders = orders
        self._clock = clock
        self._lock = threading.Lock()
        self._made_s = float("-inf")
        self._body = b""

    def page(self) -> Page:
        with self._lock:
            if self._clock() - self._made_s >= FRESH_S:
                shown = digest(self._observer.seen(STEPS, HEAT_STEPS))
                self._body = to_json({**shown, "orders": self._orders}).encode()
                self._made_s = self._clock()
            return Page("application/json", self._body, {"Cache-Control": "no-store"})


def digest(seen: Seen) -> dict[str, Any]:
    """A view with what the page needs of it, in few bytes."""
    view = view_of(replace(seen, rank_steps={rank: newest(steps, 1) for rank, steps in seen.rank_steps.items()}))
    stories = newest_stories(view["events"], EVENTS)
    nodes = _nodes(view)
    return {
        **{name: view[name] for name in _COPIED},
        "workers": [_worker(worker) for worker in view["workers"]],
        "nodes": nodes[:NODES],
        "nodes_left_out": max(0, len(nodes) - NODES),
        "spares": [[spare[name] for name in ("node", "host", "silence_s")] for spare in view["spares"][:NODES]],
        "series": [[p["at_s"], p["step"], p["step_s"], p["loss"], p["undisturbed"]] for p in view["series"]],
        "recoveries": view["recoveries"][-RECOVERIES:],
        "faults": [[s.at_s, s.text] for s in stories if s.grade >= Grade.WARNING and s.event != "recovered"],
        "events": [[s.at_s, s.grade.name.lower(), s.event, s.text] for s in stories],
        "concerns": concerns(view)[:CONCERNS],
        "heat": heat(seen),
    }


def _worker(worker: Mapping[str, Any]) -> list[Any]:
    last = worker["steps"][-1] if worker["steps"] else {}
    times = [last.get(name) for name in ("step_s", "compute_s", "wait_s")]
    return [worker[name] for name in ("rank", "node", "status", "slowdown", "straggler")] + times


def _nodes(view: Mapping[str, Any]) -> list[list[Any]]:
    """A row of each node, those in which something is amiss first."""
    ranks: dict[str, list[int]] = {}
    for worker in view["workers"]:
        ranks.setdefault(worker["node"], []).append(worker["rank"])
    rows = [_node(node, ranks.get(node["node"], [])) for node in view["nodes"]]
    return sorted(rows, key=lambda row: not row[-1])


def _node(node: Mapping[str, Any], ranks: Sequence[int]) -> list[Any]:
    reading = node["reading"] or {}
    gpus = ", ".join(f"{gpu['busy_ratio']:.0%} {gpu['temperature_celsius']:.0f} °C" for gpu in node["gpus"])
    held, limit = reading.get("keeper_bytes", 0), reading.get("keeper_limit_bytes", 0)
    keeper = f"{size_text(held)} of {size_text(limit)}" if limit else size_text(held)
    note = f"leaving: {node['leaving']}" if node["leaving"] else ""
    if (node["silence_s"] or 0.0) > SILENT_S:
        note = note or "silent"
    host = " ".join((node["host"], *node["domains"]))
    return [
        *(node["node"], host, ranks_text(ranks), node["silence_s"], reading.get("cpu_ratio")),
        *(reading.get("memory_used_bytes"), reading.get("memory_bytes"), keeper if reading else "-", gpus or "-", note),
    ]


def heat(seen: Seen) -> dict[str, Any]:
    """Ranks by steps: a row is a rank, or the slowest of several neighbours; cells are seconds, or None."""
    ranks = sorted(seen.rank_steps)
    group = max(1, -(-len(ranks) // HEAT_ROWS))
    groups = [ranks[start : start + group] for start in range(0, len(ranks), group)]
    most = min(HEAT_STEPS, HEAT_CELLS // max(1, len(groups)))
    steps = sorted({times.step for of in seen.rank_steps.values() for times in of})[-most:]
    column = {step: number for number, step in enumerate(steps)}
    measures = {"compute": "compute_s", "wait": "wait_s", "step": "step_s"}
    cells: dict[str, list[list[float | None]]] = {name: [[None] * len(steps) for _ in groups] for name in measures}
    for row, members in enumerate(groups):
        for times in (times for rank in members for times in seen.rank_steps[rank] if times.step in column):
            for name, attribute in measures.items():
                line, at = cells[name][row], column[times.step]
                line[at] = max(line[at] or 0.0, round(getattr(times, attribute), 5))
    return {"steps": steps, "rows": [ranks_text(members) for members in groups], "group": group, **cells}
