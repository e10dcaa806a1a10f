"""A job as a live terminal view shows it. Pure: from a view (agents/monitoring/views.py) to what rich draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from everstep.agents.analysis.series import PHASES
from everstep.agents.monitoring.screen import concerns, event_line, head
from everstep.agents.monitoring.story import (
    Grade,
    count_text,
    newest_stories,
    ranks_text,
    seconds,
    size_text,
)

BLOCKS = "▁▂▃▄▅▆▇█"
COLOURS = dict(zip(PHASES, ("red", "dark_orange", "yellow", "magenta", "blue", "green"), strict=True))
GRADES = {Grade.NEWS: "", Grade.WARNING: "yellow", Grade.ALARM: "bold red"}
BOXES = 64  # ranks that are shown with their step time; more are squares
RECOVERIES = 4
CELL = 16

View = Mapping[str, Any]


def dials(view: View, *, note: str = "", width: int = 100, height: int = 40) -> RenderableType:
    """The whole view; `note` is why it is old."""
    parts: list[RenderableType] = []
    if note:
        parts.append(Text(note, style="black on yellow"))
    title, *figures = head(view)
    style = {"running": "bold green", "recovering": "bold red"}.get(view["phase"], "bold")
    parts.append(Text(title, style=style))
    if view.get("recovering"):
        parts.append(Text(figures.pop(0), style="red"))
    parts += [Text(line) for line in figures]
    parts.append(curves(view, width - 4))
    parts.append(Panel(layout(view, width - 4), title="layout: step time of each rank", title_align="left"))
    if view["recoveries"]:
        shown = list(reversed(view["recoveries"]))[:RECOVERIES]
        parts.append(Panel(recoveries(shown, view, width - 4), title=_legend(), title_align="left"))
    parts += [Text(line, style="dim") for line in safety(view)]
    parts += [Text(f"! {line}", style="yellow") for line in concerns(view)[:6]]
    room = max(3, height - 20 - len(view["stages"]) - min(RECOVERIES, len(view["recoveries"])))
    stories = newest_stories(view["events"], min(room, 12))
    if stories:
        events = Group(*(_line(event_line(story, view), GRADES[story.grade]) for story in stories))
        parts.append(Panel(events, title="events", title_align="left"))
    return Group(*parts)


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def sparkline(values: Sequence[float | None], width: int) -> str:
    """A curve in one line: of more values than there is room for, the newest."""
    shown = list(values)[-max(1, width) :]
    known = [value for value in shown if value is not None and value == value]
    if not known:
        return ""
    low, high = min(known), max(known)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(
        BLOCKS[round((value - low) * scale)] if value is not None and value == value else " " for value in shown
    )


def curves(view: View, width: int) -> RenderableType:
    """Loss and step time of the last steps, with what was disturbed in colour."""
    table = Table.grid(padding=(0, 1))
    room = max(10, width - 32)
    series = view["series"][-room:]
    losses = [point["loss"] for point in series]
    known = [loss for loss in losses if loss is not None]
    if known:
        table.add_row("loss", Text(sparkline(losses, room), style="cyan"), f"{known[0]:.4g} to {known[-1]:.4g}")
    if series:
        times = Text(sparkline([point["step_s"] for point in series], room), style="cyan")
        for place, point in enumerate(series):
            if not point["undisturbed"] and place:
                times.stylize("bold red", place, place + 1)
        most = max(point["step_s"] for point in series)
        table.add_row("step", times, f"{seconds(view['typical_step_s'])}, at most {seconds(most)}")
    return table


def layout(view: View, width: int) -> RenderableType:
    """Stages x ranks: state by colour, and the step time where there is room."""
    workers = {worker["rank"]: worker for worker in view["workers"]}
    placed = {rank for stage in view["stages"] for rank in stage["ranks"]}
    rows = [
        (f"{number}: layers {stage['layers'][0]}-{stage['layers'][1] - 1}", stage["ranks"])
        for number, stage in enumerate(view["stages"])
    ]
    others = [rank for rank in workers if rank not in placed]
    rows += [("not placed", others)] if others else []
    if not rows:
        return Text("no rank trains yet" if view["phase"] != "done" else "the job is over", style="dim")
    table = Table.grid(padding=(0, 1))
    brief = len(workers) > BOXES
    for name, ranks in rows:
        table.add_row(Text(name, style="bold"), _squares(ranks, workers) if brief else _cells(ranks, workers, width))
    return table


def _style(worker: View | None) -> str:
    if worker is None:
        return "red"
    if worker["status"] not in ("member", "finished"):
        return "red" if worker["status"] == "starting" else "blue"
    return "yellow" if worker["straggler"] else "green"


def _cells(ranks: Sequence[int], workers: Mapping[int, View], width: int) -> RenderableType:
    columns = max(1, (width - 20) // CELL)
    grid = Table.grid(padding=(0, 1))
    cells = [_cell(rank, workers.get(rank)) for rank in ranks]
    for start in range(0, len(cells), columns):
        grid.add_row(*cells[start : start + columns])
    return grid


def _cell(rank: int, worker: View | None) -> Text:
    style = _style(worker)
    said = worker["status"] if worker is not None else "gone"
    if worker is not None and said in ("member", "finished") and worker["steps"]:
        said = seconds(worker["steps"][-1]["step_s"])
        if worker["straggler"] and worker["slowdown"]:
            said += f" x{worker['slowdown']:.1f}"
    return Text.assemble(("■ ", style), f"{rank} ", (said, "dim" if style == "green" else style))


def _squares(ranks: Sequence[int], workers: Mapping[int, View]) -> RenderableType:
    """A square a rank, and by name only those in which something is amiss."""
    if len(ranks) > 1024:
        text = Text(f"{len(ranks):,} ranks")
    else:
        text = Text()
        for rank in ranks:
            text.append("■", style=_style(workers.get(rank)))
    amiss = [rank for rank in ranks if _style(workers.get(rank)) != "green"]
    if amiss:
        text.append(f" amiss: {ranks_text(amiss[:50])}", style="yellow")
    return text


def _legend() -> Text:
    return Text("recoveries: ").append_text(Text(" ").join(Text(name, style=COLOURS[name]) for name in PHASES))


def recoveries(shown: Sequence[View], view: View, width: int) -> RenderableType:
    """Bars of phases, to one scale, the newest first."""
    table = Table.grid(padding=(0, 1))
    longest = max(recovery["total_s"] for recovery in shown) or 1e-9
    room = max(10, width - 56)
    for recovery in shown:
        bar = Text()
        for phase in PHASES:
            share = recovery["phases"].get(phase, 0.0) / longest
            bar.append("█" * round(room * share), style=COLOURS[phase])
        ago = f"{seconds(view['at_s'] - recovery['at_s'])} ago"
        table.add_row(_line(ago, "dim"), _line(recovery["reason"]), seconds(recovery["total_s"]), bar)
    return table


def safety(view: View) -> list[str]:
    """One line of protection, one of the checkpoint."""
    found = []
    if view["protection"]:
        exposure = view["exposure"]
        cost = f"; a lost node would cost up to {count_text(exposure['steps'], 'step')}" if exposure else ""
        found.append(view["protection"] + cost)
    if view["checkpoint"]:
        checkpoint = view["checkpoint"]
        size = f", {size_text(checkpoint['bytes'])}" if checkpoint.get("bytes") else ""
        found.append(f"checkpoint of {checkpoint['version']} steps, {seconds(checkpoint['age_s'])} ago{size}")
    return found
