"""A job on one screen, as text: what `everstep status` prints. Pure: from a view (`views.py`) to lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from .story import (
    Story,
    count_text,
    newest_stories,
    phases_text,
    ranks_text,
    redone_text,
    seconds,
    size_text,
)

EVENTS = 8
NODES = 12  # listed; of more, those in which something is amiss
SILENT_S = 3.0
AFTER = "after training"  # of a worker, and of the job
WELL = frozenset({"member", "finished", AFTER, "exited"})

View = Mapping[str, Any]


def screen(view: View) -> list[str]:
    """The lines, of any width."""
    parts = [
        head(view),
        _titled("layout", _layout(view)),
        _titled("nodes", _nodes(view)),
        _titled("safety", _safety(view)),
        _titled("last recovery", recovery_lines(view["recoveries"][-1], view)) if view["recoveries"] else [],
        _titled("look at", concerns(view)),
        _titled("events", [event_line(story, view) for story in newest_stories(view["events"], EVENTS)]),
    ]
    return [line for part in parts for line in part]


def _titled(title: str, lines: Sequence[str]) -> list[str]:
    return ["", title.upper(), *(f"  {line}" for line in lines)] if lines else []


def head(view: View) -> list[str]:
    """The job's name, progress and speed."""
    layout = f"{count_text(view['world_size'], 'rank')} in {count_text(len(view['stages']), 'stage')}"
    layout += f", generation {view['generation']}"
    running = f", for {seconds(view['running_s'])}" if view.get("running_s") else ""
    found = [f"{view['job']}: {view['phase']}{running}; {layout}"]
    if view.get("recovering"):
        now = view["recovering"]
        found.append(f"recovering for {seconds(now['seconds'])} in step {now['step']}: {now['why']}")
    if view["phase"] == AFTER:
        found.append(_after_training(view))
    if view["steps"]:
        done = view["step"] + 1
        rates = [f"step {done:,} of {view['steps']:,} ({done / view['steps']:.1%})"]
        rates += [f"loss {view['loss']:.6g}"] if view["loss"] is not None else []
        rates += [f"loss {view['loss_amiss']['loss']}"] if view["loss"] is None and view.get("loss_amiss") else []
        rates += [f"{seconds(view['typical_step_s'])} a step"] if view["typical_step_s"] else []
        rates += [f"{view['samples_per_s']:,.4g} samples/s"] if view["samples_per_s"] else []
        rates += [f"{view['tokens_per_s']:,.0f} tokens/s"] if view["tokens_per_s"] else []
        rates += [f"goodput {view['goodput']:.1%}"]
        if view["steps_per_s"] and done < view["steps"]:
            rates.append(f"{seconds((view['steps'] - done) / view['steps_per_s'])} to go")
        found.append(", ".join(rates))
    return found


def _after_training(view: View) -> str:
    """After training: the ranks whose scripts still run."""
    ranks = {status: [w["rank"] for w in view["workers"] if w["status"] == status] for status in (AFTER, "exited")}
    ended = f"; {_ranks(ranks['exited'])} have ended" if ranks["exited"] else ""
    return f"training is over; scripts still run on {_ranks(ranks[AFTER])}{ended}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks_text(ranks)}"


def _layout(view: View) -> list[str]:
    workers = {worker["rank"]: worker for worker in view["workers"]}
    return [_stage(number, stage, workers) for number, stage in enumerate(view["stages"])] + _unplaced(view)


def _stage(number: int, stage: View, workers: Mapping[int, View]) -> str:
    steps = [
        (worker["steps"][-1]["compute_s"], rank)
        for rank in stage["ranks"]
        if (worker := workers.get(rank)) is not None and worker["steps"]
    ]
    first, stop = stage["layers"]
    text = f"stage {number}: layers {first}-{stop - 1}, ranks {ranks_text(stage['ranks'])}"
    if not steps:
        return text
    steps.sort()
    middle, (most, rank) = steps[(len(steps) - 1) // 2][0], steps[-1]
    slowest = f", most {seconds(most)} (rank {rank})" if len(steps) > 1 else ""
    return f"{text}: compute {seconds(middle)} of a step{slowest}"


def _unplaced(view: View) -> list[str]:
    placed = {rank for stage in view["stages"] for rank in stage["ranks"]}
    waiting: dict[str, list[int]] = {}
    for worker in view["workers"]:
        if worker["rank"] not in placed:
            waiting.setdefault(worker["status"], []).append(worker["rank"])
    return [f"not placed: ranks {ranks_text(ranks)} {status}" for status, ranks in sorted(waiting.items())]


def _nodes(view: View) -> list[str]:
    ranks: dict[str, list[int]] = {}
    for worker in view["workers"]:
        ranks.setdefault(worker["node"], []).append(worker["rank"])
    nodes = sorted(view["nodes"], key=lambda node: not _amiss(node))
    shown = nodes if len(nodes) <= NODES else [node for node in nodes if _amiss(node)][:NODES]
    rows = [_node(node, ranks.get(node["node"], [])) for node in shown]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(len(rows[0]) if rows else 0)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    rest = len(nodes) - len(shown)
    lines += [f"{'and ' if shown else ''}{rest} nodes in which nothing is amiss"] if rest else []
    return [*lines, *(f"spare: {spare['node']} ({spare['host']})" for spare in view.get("spares", ()))]


def _amiss(node: View) -> str:
    """What is wrong with a node, in a word."""
    if node["leaving"]:
        return f"leaving: {node['leaving']}"
    silence_s = node["silence_s"] or 0.0
    return f"no word for {seconds(silence_s)}" if silence_s > SILENT_S else "; ".join(node.get("odd", ()))


def _node(node: View, ranks: Sequence[int]) -> list[str]:
    reading = node["reading"]
    host = " ".join((node["host"], *node.get("domains", ())))
    cells = [node["node"], host, f"ranks {ranks_text(ranks)}" if ranks else "no ranks"]
    if reading:
        cells.append(f"CPU {reading['cpu_ratio']:.0%}")
        total = reading["memory_bytes"]
        cells.append(f"memory {reading['memory_used_bytes'] / total:.0%}" if total else "")
        limit = reading["keeper_limit_bytes"]
        of = f" of {size_text(limit)}" if limit else ""
        cells.append(f"keeper {size_text(reading['keeper_bytes'])}{of}")
    else:
        cells += ["", "", ""]
    gpus = [f"{gpu['busy_ratio']:.0%} {gpu['temperature_celsius']:.0f} C" for gpu in node["gpus"]]
    cells.append(f"GPUs {', '.join(gpus)}" if gpus else "")
    return [*cells, _amiss(node) or "well"]


def _safety(view: View) -> list[str]:
    found = []
    if view["protection"]:
        found.append(view["protection"])
    if view.get("survival"):
        survival = view["survival"]
        found.append(survival["text"] + (" (measured)" if survival["measured"] else " (assumed)"))
    exposure = view["exposure"]
    if exposure:
        interval = view["snapshot_interval"]
        every = f"; a version that outlives nodes every {interval} steps" if interval > 1 else ""
        since = f" ({seconds(exposure['seconds'])} old)" if exposure["seconds"] is not None else ""
        found.append(f"a lost node would cost up to {count_text(exposure['steps'], 'step')}{since}{every}")
    checkpoint = view["checkpoint"]
    if checkpoint:
        size = f", {size_text(checkpoint['bytes'])}" if checkpoint.get("bytes") else ""
        found.append(f"checkpoint: of {checkpoint['version']} steps, {seconds(checkpoint['age_s'])} ago{size}")
    elif view["steps"]:
        found.append("checkpoint: none so far")
    if view.get("saving"):
        saving = view["saving"]
        found.append(f"checkpoint: of {saving['version']} steps is being saved, for {seconds(saving['for_s'])} so far")
    return found


def recovery_lines(recovery: View, view: View) -> list[str]:
    """A recovery, in two lines."""
    ago = seconds(max(0.0, view["at_s"] - recovery["at_s"]))
    count = len(view["recoveries"])
    return [
        f"{ago} ago, in step {recovery['step']}{_whose(recovery)}: {recovery['why']}",
        f"{seconds(recovery['total_s'])}: {phases_text(recovery['phases'])}; {redone_text(recovery)}"
        + (f" ({count} recoveries so far, {seconds(view['lost_s'])} lost to them)" if count > 1 else ""),
    ]


def _whose(recovery: View) -> str:
    nodes = f", node {', '.join(recovery['nodes'])}" if recovery["nodes"] else ""
    return (f", rank {ranks_text(recovery['ranks'])}" if recovery["ranks"] else "") + nodes


def concerns(view: View) -> list[str]:
    """The alarms, with their evidence."""
    found = [
        f"rank {one['rank']} (node {one['node']}) is slow itself: {one['evidence']}"
        if one["what"] == "compute"
        else f"a link is slow: {one['evidence']}"
        for one in view.get("stragglers", ())
    ]
    found += view.get("waits", ())
    amiss: dict[str, list[int]] = {}
    for worker in view["workers"]:
        if worker["status"] not in WELL and view["stages"]:
            amiss.setdefault(worker["status"], []).append(worker["rank"])
    found += [f"ranks {ranks_text(ranks)}: {status}" for status, ranks in sorted(amiss.items())]
    found += [f"node {node['node']}: {_amiss(node)}" for node in view["nodes"] if _amiss(node)]
    found += [
        f"host {one['host']} is in quarantine for {seconds(one['left_s'])} more"
        + (f" (the job needs its node {', '.join(one['nodes'])}, or has it hand over)" if one["nodes"] else "")
        + f": {one['why']}"
        for one in view.get("quarantine", ())
    ]
    if asked := view.get("stages_asked"):
        found.append(f"a relayout to {count_text(asked, 'stage')} is under way")
    if amiss_loss := view.get("loss_amiss"):
        found.insert(0, f"the loss is {amiss_loss['loss']} since step {amiss_loss['since_step']}")
    if view.get("undecided"):  # later commits are not known here
        return [f"nothing can be decided: {view['undecided']}", *found]
    age_s, typical_s = view["commit_age_s"], view["typical_step_s"]
    if view["phase"] == "running" and age_s and typical_s and age_s > max(10 * typical_s, 2.0):
        found.append(f"no step was committed for {seconds(age_s)}; one takes {seconds(typical_s)}")
    return found


def event_line(story: Story, view: View) -> str:
    """An event, at the time of the reader's clock."""
    unix_s = view["unix_s"] - view["at_s"] + story.at_s
    when = datetime.fromtimestamp(unix_s, UTC).astimezone().strftime("%H:%M:%S")
    return f"{when} {story.grade.name.lower():7} {story.text}"
