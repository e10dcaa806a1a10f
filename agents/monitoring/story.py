"""The event log in words: a line for each event of importance, none for a step. For status, top, web page and log."""

from __future__ import annotations

import enum
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from everstep.agents.analysis.series import PHASES
from everstep.agents.base.strict_json import dumps
from everstep.elastic.contract.notices import Shown

FIELDS = ("rank", "ranks", "step", "generation", "node", "host")  # of every line, where they mean something
LOGS = ("warnings", "text", "json", "off")
Line = Mapping[str, Any]


class Grade(enum.IntEnum):
    """How much a line matters to the operator on call."""

    NEWS = logging.INFO
    WARNING = logging.WARNING  # something failed, and was or is being dealt with
    ALARM = logging.ERROR  # an operator should look


@dataclass(frozen=True)
class Story:
    """An event in words."""

    event: str
    at_s: float  # the event log's clock
    grade: Grade
    text: str
    fields: Mapping[str, Any] = field(default_factory=dict)  # of FIELDS


def tell(line: Line) -> Story | None:
    """A line of the event log in words; None for an event that is unimportant by itself."""
    event = line["event"]
    if event in _SILENT or (event == "committed_again" and line.get("same", True)):
        return None
    grade, words = _WORDS.get(event, (Grade.NEWS, _whatever))
    if event == "ended" and (not line.get("succeeded") or line.get("lost")):
        grade = Grade.ALARM
    try:
        text = words(line)
    except (KeyError, TypeError, ValueError):  # of another version
        text = _whatever(line)
    return Story(event, float(line.get("at_s", 0.0)), grade, text, _fields(line))


def newest_stories(lines: Iterable[Line], count: int) -> list[Story]:
    """The last of the stories of some lines, oldest first."""
    stories = [story for line in lines if (story := tell(line)) is not None]
    return stories[-count:] if count else []


def text_line(story: Story, unix_s: float) -> str:
    """A story as a line of a log: when by the world's clock, grade, event, fields, words."""
    when = datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    fields = "".join(f" {name}={_field(value)}" for name, value in story.fields.items())
    return f"{when} {story.grade.name.lower():7} {story.event}{fields}: {story.text}"


def json_line(story: Story, unix_s: float, line: Line) -> str:
    """The same as one JSON object, with all that the event log has of it."""
    rest = {k: v for k, v in line.items() if k not in ("event", "at_s", *FIELDS)}
    named = {"unix_s": unix_s, "grade": story.grade.name.lower(), "event": story.event, **story.fields}
    return dumps({**named, "text": story.text, **rest})


def seconds(value: float | None) -> str:
    """A time for people: `12 ms`, `3.4 s`, `5 min 12 s`, `3 h 5 min`, `2 d 4 h`."""
    if value is None or not math.isfinite(value):
        return "-"
    if value < 0.0995:
        return f"{value * 1e3:.1f} ms" if value < 0.00995 else f"{value * 1e3:.0f} ms"
    if value < 99.95:
        return f"{value:.2f} s" if value < 9.995 else f"{value:.1f} s"
    whole = round(value)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def count_text(count: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "es" if noun.endswith("ch") else "s")


def ranks_text(ranks: Iterable[int]) -> str:
    """Ranks in few letters: `0-3,7`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def size_text(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def phases_text(phases: Mapping[str, float]) -> str:
    """A recovery's phases in their order."""
    return ", ".join(f"{name} {seconds(phases[name])}" for name in PHASES if name in phases)


def redone_text(recovery: Line) -> str:
    """The work that a recovery repeated."""
    lost = f" and {count_text(recovery['lost_steps'], 'step')}" if recovery.get("lost_steps") else ""
    return f"{count_text(recovery['redone_micro_batches'], 'micro-batch')}{lost} computed again"


# ---------------------------------------------------------------- the coordinator's log


class Narrator:
    """A listener of the event log that writes stories to the log, as they come."""

    def __init__(self, kind: str, offset_s: float = 0.0) -> None:
        """`offset_s`: what to add to the event log's clock for the world's; 0: of this process's clocks, now."""
        self._as_json = kind == "json"
        self._least = Grade.WARNING if kind == "warnings" else Grade.NEWS
        self._shown = Shown()
        self._offset_s = offset_s or time.time() - time.monotonic()
        self._log = logging.getLogger("everstep.story")

    def heard(self, line: Line) -> None:
        story = tell(line)
        if story is not None and self._wanted(story, line):
            unix_s = story.at_s + self._offset_s
            text = json_line(story, unix_s, line) if self._as_json else text_line(story, unix_s)
            self._log.log(int(story.grade), "%s", text)

    def _wanted(self, story: Story, line: Line) -> bool:
        if story.event in ("warning", "checkpoint_failed"):  # every rank may report the same
            return self._shown.first(line.get("notice", line.get("name", "")), story.text)
        if story.event == "ended" and self._least > Grade.NEWS:
            return False  # the launcher reports how the job ended
        return story.grade >= self._least


class _Lines(logging.Formatter):
    """Formats log lines: event stories unchanged, other messages in the same form."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.name == "everstep.story":
            return text if self._kind == "json" else f"everstep: {text}"
        story = Story("log", 0.0, Grade(max(logging.INFO, min(logging.ERROR, record.levelno // 10 * 10))), text)
        if self._kind == "json":
            return json_line(story, record.created, {})
        return f"everstep: {text_line(story, record.created)}"


def set_up_log(kind: str) -> None:
    """Send this process's log to standard error, line by line, in the common form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(kind))
    root = logging.getLogger()
    for former in list(root.handlers):
        root.removeHandler(former)
    root.addHandler(handler)
    root.setLevel(logging.WARNING if kind == "warnings" else logging.INFO)


# ---------------------------------------------------------------- words


def _fields(line: Line) -> dict[str, Any]:
    found = {name: line[name] for name in FIELDS if line.get(name) not in (None, "")}
    if "step" not in found:
        step = line.get("interrupted_step", line.get("version", line.get("committed")))
        found |= {"step": step} if step is not None else {}
    if not found.get("ranks", True):
        del found["ranks"]
    return {name: found[name] for name in FIELDS if name in found}


def _field(value: Any) -> str:
    return ranks_text(value) if isinstance(value, list | tuple) else str(value)


def _whatever(line: Line) -> str:
    """An event without words of its own."""
    rest = {k: v for k, v in line.items() if k not in ("event", "at_s", "number", *FIELDS)}
    return ", ".join(f"{name} {_short(value)}" for name, value in rest.items()) or line["event"].replace("_", " ")


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _one(ranks: Iterable[int]) -> str:
    found = list(ranks)
    return f"rank {found[0]}" if len(found) == 1 else f"ranks {ranks_text(found)}" if found else "no ranks"


def _rebalanced(line: Line) -> str:
    moved, ahead = size_text(line["moved_bytes"]), size_text(line["prefetched_bytes"])
    return f"rebalanced in {seconds(line['stall_s'])}, {moved} moved, {ahead} before; now {line['layout']}"


def _recovered(line: Line) -> str:
    phases = {phase: line[f"{phase}_s"] for phase in PHASES}
    again = redone_text(line)
    return f"recovered in {seconds(line['total_s'])} ({phases_text(phases)}); {again}; cause: {line['why']}"


def _protection(line: Line) -> str:
    note = f" ({line['note']})" if line.get("note") else ""
    most = max(line["bytes"].values(), default=0)
    text = f"{line['mode']} protects from the loss of {count_text(line['losses'], 'node')} at once{note}"
    day = f"; a day leads back to storage with probability {line['day']:.1e}" if "day" in line else ""
    return f"{text}; up to {size_text(most)} of a node's memory{day}"


def _started(line: Line) -> str:
    resumed = f", from checkpoint {line['checkpoint']}" if line.get("checkpoint") else ""
    return f"training begins{resumed}: {line['layout']}"


def _ended(line: Line) -> str:
    why = "; ".join([line["why"]] if line.get("why") else line.get("lost", ()))
    return f"the job {'succeeded' if line['succeeded'] else 'failed'}" + (f": {why}" if why else "")


def _trained(line: Line) -> str:
    lost = "".join(f"; {one}" for one in line.get("lost", ()))
    return f"training is over with step {line['step']}; scripts still run{lost}"


def _died(line: Line) -> str:
    return f"worker of rank {line['rank']} {line['cause']}" + (f", in {line['phase']}" if line.get("phase") else "")


def _corruption(line: Line) -> str:
    return f"damaged {line['where']} found by rank {line.get('found_by')}, not used: {line.get('detail', '')}"


def _saved(line: Line) -> str:
    how = f", {size_text(line['bytes'])} in {seconds(line.get('seconds'))}" if line.get("bytes") else ""
    return f"checkpoint {line.get('name', '')} of {line['version']} steps is saved{how}"


_SILENT = frozenset({"committed", "checkpoint_begun"})
_WORDS: dict[str, tuple[Grade, Callable[[Line], str]]] = {
    "node_joined": (Grade.NEWS, lambda x: f"node {x['node']} ({x['host']}) joined, with {x['slots']} workers"),
    "spare_joined": (Grade.NEWS, lambda x: f"node {x['node']} ({x['host']}) is here as a spare"),
    "spare_started": (
        Grade.NEWS,
        lambda x: f"spare node {x['node']} takes a place, as {_one(x['ranks'])}; {x['spares']} more are left",
    ),
    "node_lost": (Grade.WARNING, lambda x: f"node {x['node']} with {_one(x['ranks'])} is lost: {x['why']}"),
    "node_left": (Grade.NEWS, lambda x: f"node {x['node']} has left the job: {x['why']}"),
    "draining": (Grade.NEWS, lambda x: f"node {x['node']} hands over {_one(x['ranks'])}: {x['why']}"),
    "leave_prepared": (Grade.NEWS, lambda x: f"a plan without {_one(x['ranks'])} is ready"),
    "handed_over": (Grade.NEWS, lambda x: f"{_one(x['ranks'])} have handed over; now {x['layout']}"),
    "worker_died": (Grade.WARNING, _died),
    "node_refused": (Grade.WARNING, lambda x: f"node {x['node']} ({x['host']}) may not join: {x['why']}"),
    "planned": (Grade.NEWS, lambda x: f"continuing: {x['summary']}"),
    "recovered": (Grade.WARNING, _recovered),
    "join_prepared": (Grade.NEWS, lambda x: f"a plan that adds {_one(x['ranks'])} is ready"),
    "rebalance_prepared": (Grade.NEWS, lambda x: f"a faster layout is ready: {x['layout']}; {x['why']}"),
    "relayout_prepared": (
        Grade.NEWS,
        lambda x: f"a layout of {count_text(x['stages'], 'stage')} is ready, as ordered: {x['layout']}",
    ),
    "relayout_dropped": (
        Grade.WARNING,
        lambda x: f"the order to go to {count_text(x['stages'], 'stage')} is dropped: {x['why']}",
    ),
    "rebalance_measured": (
        Grade.NEWS,
        lambda x: f"the rebalance saves {x['saved']:.0%} of a step's time; the forecast was {x['promised']:.0%}",
    ),
    "rebalanced": (Grade.NEWS, _rebalanced),
    "joined": (Grade.NEWS, lambda x: f"{_one(x['ranks'])} joined; now {x['layout']}"),
    "started": (Grade.NEWS, _started),
    "few_micro_batches": (
        Grade.WARNING,
        lambda x: (
            f"a step has {x['micro_batches']} micro-batches for a stage's {x['ranks']} ranks: too few to deal work "
            f"evenly after a loss; choose a micro_batch_size that makes {x['enough']} or more of them"
        ),
    ),
    "restarted": (Grade.WARNING, lambda x: f"all workers start again, for the {x['restart']}. time: {x['cause']}"),
    "ended": (Grade.NEWS, _ended),
    "stopping": (Grade.NEWS, lambda x: f"a checkpoint is saved before the job ends: {x['why']}"),
    "left_alone": (
        Grade.NEWS,
        lambda x: f"{_one(x['ranks'])} left the training loop after step {x['step']}; not {_one(x['others'])}",
    ),
    "script_stopped": (Grade.NEWS, lambda x: f"the script ends training after step {x['step']}: {x['why']}"),
    "last_save": (Grade.NEWS, lambda x: f"the state after {x['version']} steps is being saved, as {x['name']}"),
    "trained": (Grade.NEWS, _trained),
    "protection": (Grade.NEWS, _protection),
    "domain_exposed": (Grade.WARNING, lambda x: f"the loss of a whole {x['kind']} is not covered: {x['why']}"),
    "snapshot_interval": (
        Grade.NEWS,
        lambda x: f"a version that outlives nodes every {x['every']} steps: {x.get('why', '')}",
    ),
    "unprotected": (Grade.WARNING, lambda x: f"version {x.get('versions')} is not whole everywhere in time"),
    "corruption": (Grade.ALARM, _corruption),
    "lacking": (Grade.WARNING, lambda x: f"{x['shards']} shards of version {x['version']} are nowhere: an older one"),
    "substituted": (Grade.ALARM, lambda x: f"{len(x['shards'])} lost shards are made up from neighbouring layers"),
    "committed_again": (Grade.ALARM, lambda x: f"step {x['step']}, computed again, came out otherwise"),
    "checkpoint_saved": (Grade.NEWS, _saved),
    "checkpoint_failed": (Grade.ALARM, lambda x: f"checkpoint {x.get('name', '')} was not saved: {x['why']}"),
    "checkpoint_unreadable": (Grade.ALARM, lambda x: f"checkpoint {x['name']} cannot be read: {x['why']}"),
    "straggler_found": (Grade.WARNING, lambda x: f"rank {x['rank']} is slow ({x['what']}): {x['evidence']}"),
    "straggler_lasts": (Grade.WARNING, lambda x: f"rank {x['rank']} is still slow ({x['what']}): {x['evidence']}"),
    "straggler_gone": (Grade.NEWS, lambda x: f"rank {x['rank']} is slow no more ({x['what']})"),
    "newcomer_refused": (Grade.ALARM, lambda x: f"rank {x['rank']} is left out, and not replaced: {x['why']}"),
    "node_unhealthy": (Grade.ALARM, lambda x: f"node {x['node']} ({x['host']}) may not join: {x['why']}"),
    "node_quarantined": (Grade.ALARM, lambda x: f"{x['host']} is kept out for {seconds(x['seconds'])}: {x['why']}"),
    "node_released": (Grade.NEWS, lambda x: f"{x['host']} may join again"),
    "coordinator_returned": (
        Grade.WARNING,
        lambda x: f"a coordinator took over; awaited: {count_text(len(x['nodes']), 'node')}",
    ),
    "warning": (Grade.WARNING, lambda x: f"{x['text']} [{x['notice']}]"),
    "abandoned": (Grade.ALARM, lambda x: f"no node has reconnected: a new job is started, after step {x['step']}"),
}
