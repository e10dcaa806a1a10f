"""Spans of all ranks as a trace that ui.perfetto.dev and chrome://tracing show: the Trace Event Format, JSON.

One process a node, one thread a rank, with another for work that overlaps compute. The coordinator is a process too:
its recoveries with their phases, the steps, the events. Times are microseconds since the first of them; a node's clock
is mapped to wall-clock time by the pair of clock readings that its agent sent.
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from everstep.agents.analysis.series import PHASES as RECOVERY_PHASES
from everstep.agents.base.strict_json import dumps
from everstep.agents.monitoring.story import tell
from everstep.comms.control import everstep_pb2 as pb
from everstep.elastic.contract.telemetry import (
    PHASES,
    RECORD_LAYOUT,
    Span,
    Spent,
    spans,
)

COORDINATOR = 0  # its process; nodes count from 1
LANES = 16  # threads of a rank: 0 is its main one
BEHIND = 8  # the lane of work that overlaps compute
TRANSFERS = frozenset({Spent.SEND, Spent.WAIT, Spent.RECEIVE})
_NAMES = {Spent.SEND: "send to {peer}", Spent.WAIT: "wait for {peer}", Spent.RECEIVE: "receive from {peer}"}
_COLOURS = {  # of the format's fixed list
    Spent.FORWARD: "thread_state_running",
    Spent.BACKWARD: "thread_state_runnable",
    Spent.WAIT: "thread_state_iowait",
    Spent.BLOCKED: "terrible",
    Spent.RECOVER: "bad",
    Spent.RESTORE: "bad",
}

Event = dict[str, Any]


@dataclass
class _Rank:
    """One rank on one node: all its incarnations there."""

    node: int
    spans: list[Span] = field(default_factory=list)


@dataclass
class Trace:
    """A coordinator's answer, parsed. Times are wall-clock nanoseconds."""

    job: str
    silent: list[str]  # nodes that did not answer
    left_out: int  # spans that were too many
    nodes: list[tuple[str, str]]  # name, host
    ranks: dict[tuple[int, int], _Rank]  # (node, rank)
    keepers: dict[int, list[tuple[int, int, int]]]  # node -> (when, bytes held, bytes encoded)
    coordinator: list[Event]  # without ts, which is in "_ns"

    @classmethod
    def of(cls, parts: Iterable[pb.GetTraceResponse]) -> Trace:
        head: dict[str, Any] = {}
        tail: dict[str, Any] = {}
        trace = cls("", [], 0, [], {}, {}, [])
        numbers: dict[str, int] = {}
        for part in parts:
            if part.head:
                head = json.loads(part.head)
                trace.nodes = sorted(head["nodes"].items())
                numbers = {name: number for number, (name, _) in enumerate(trace.nodes, 1)}
            elif part.tail:
                tail = json.loads(part.tail)
            elif part.node in numbers:
                trace._add(numbers[part.node], part.spans)
        trace.job, trace.silent = head.get("job", ""), tail.get("silent", [])
        for rank in trace.ranks.values():
            rank.spans.sort(key=lambda span: (span.start_ns, -span.end_ns, span.kind != Spent.STEP))
        first_ns = min((rank.spans[0].start_ns for rank in trace.ranks.values()), default=0)
        trace.coordinator = list(_coordinator(tail, _offset(head), first_ns)) if tail else []
        return trace

    def _add(self, node: int, message: Any) -> None:
        import numpy as np

        offset = _offset({"at_s": message.at_s, "unix_s": message.unix_s})
        self.left_out += message.left_out
        if message.records:
            whole = len(message.records) // RECORD_LAYOUT.itemsize
            records = np.frombuffer(message.records, dtype=RECORD_LAYOUT, count=whole).copy()
            records = records[np.isin(records["kind"], [int(kind) for kind in Spent])]  # of another version: left out
            self.left_out += whole - len(records)
            records["start_ns"] += offset
            records["end_ns"] += offset
            self.ranks.setdefault((node, message.rank), _Rank(node)).spans.extend(spans(records))
        for work in message.keeper:
            at_ns = int(work.at_s * 1e9) + offset
            self.keepers.setdefault(node, []).append((at_ns, work.bytes, work.parity_bytes))

    @property
    def span_count(self) -> int:
        return sum(len(rank.spans) for rank in self.ranks.values())

    @property
    def steps(self) -> list[int]:
        """The steps whose end is in the trace."""
        return sorted({s.step for rank in self.ranks.values() for s in rank.spans if s.kind == Spent.STEP})

    # ------------------------------------------------------------ as events

    def events(self) -> Iterator[Event]:
        """All events; the metadata events with the names of processes and threads first."""
        first_ns = min([r.spans[0].start_ns for r in self.ranks.values()] + [e["_ns"] for e in self.coordinator] or [0])
        yield _named("process_name", COORDINATOR, 0, name=f"coordinator of {self.job}")
        for tid, name in enumerate(("steps", "recoveries", "events")):
            yield _named("thread_name", COORDINATOR, tid, name=name)
        for number, (name, host) in enumerate(self.nodes, 1):
            yield _named("process_name", number, 0, name=f"node {name} ({host})")
            yield _named("process_sort_index", number, 0, sort_index=number)
        for event in self.coordinator:
            at_ns = event.pop("_ns")
            yield {**event, "ts": _microseconds(at_ns - first_ns)}
            event["_ns"] = at_ns
        arrows = _Arrows()
        for (node, rank), found in sorted(self.ranks.items()):
            yield from _rank_events(node, rank, found.spans, first_ns, arrows)
        yield from arrows.events()
        yield from self._counters(first_ns)

    def _counters(self, first_ns: int) -> Iterator[Event]:
        for node, readings in self.keepers.items():
            before: tuple[int, int] | None = None
            for at_ns, held, encoded in readings:
                if at_ns >= first_ns:
                    counter: Event = {"ph": "C", "pid": node, "tid": 0, "ts": _microseconds(at_ns - first_ns)}
                    yield {**counter, "name": "keeper", "args": {"MiB held": held / (1 << 20)}}
                    if before is not None and at_ns > before[0]:
                        rate = max(0, encoded - before[1]) * 1e3 / (at_ns - before[0])
                        yield {**counter, "name": "parity encoded", "args": {"MB/s": rate}}
                before = (at_ns, encoded)

    def write(self, file: Any) -> None:
        """The whole trace, one event a line."""
        other = {"job": self.job, "nodes without an answer": self.silent, "spans left out": self.left_out}
        file.write('{"displayTimeUnit": "ms", "otherData": ' + dumps(other) + ', "traceEvents": [\n')
        separator = ""
        for event in self.events():
            file.write(separator + dumps(event))
            separator = ",\n"
        file.write("\n]}\n")


def _offset(clock: Mapping[str, float]) -> int:
    """The offset of a node's monotonic clock, in nanoseconds."""
    return int((clock["unix_s"] - clock["at_s"]) * 1e9)


def _microseconds(ns: int) -> float:
    return ns / 1000


def _named(kind: str, pid: int, tid: int, **args: Any) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "ts": 0, "args": args}


# ---------------------------------------------------------------- ranks


def lanes(found: Sequence[Span]) -> list[int]:
    """The thread of its rank that shows each span, such that a thread's spans nest. Spans are sorted by start.

    Spans of the main thread are on lane 0. Copies that overlap compute have lanes of their own, as has the rare span
    that crosses the end of another span.
    """
    open_ends: defaultdict[int, list[int]] = defaultdict(list)
    chosen = []
    for span in found:
        lane = BEHIND if span.kind == Spent.SNAPSHOT else 0
        last = (BEHIND if lane == 0 else LANES) - 1
        while True:
            ends = open_ends[lane]
            while ends and ends[-1] <= span.start_ns:
                ends.pop()
            if not ends or span.end_ns <= ends[-1] or lane == last:
                ends.append(span.end_ns)
                chosen.append(lane)
                break
            lane += 1
    return chosen


def _rank_events(node: int, rank: int, found: list[Span], first_ns: int, arrows: _Arrows) -> Iterator[Event]:
    chosen = lanes(found)
    for lane in sorted(set(chosen) | {0}):
        name = f"rank {rank}" + ("" if lane == 0 else ": behind compute" if lane >= BEHIND else ": beside")
        yield _named("thread_name", node, rank * LANES + lane, name=name)
        yield _named("thread_sort_index", node, rank * LANES + lane, sort_index=rank * LANES + lane)
    for span, lane in zip(found, chosen, strict=True):
        event: Event = {
            "ph": "X",
            "name": _name(span),
            "cat": "phase" if span.kind in PHASES else "transfer" if span.kind in TRANSFERS else "work",
            "pid": node,
            "tid": rank * LANES + lane,
            "ts": _microseconds(span.start_ns - first_ns),
            "dur": _microseconds(span.end_ns - span.start_ns),
            "args": _arguments(span),
        }
        if span.kind in _COLOURS:
            event["cname"] = _COLOURS[span.kind]
        arrows.see(rank, span, event)
        yield event


def _name(span: Span) -> str:
    if span.kind == Spent.STEP:
        return f"step {span.step}"
    if span.kind in _NAMES and span.peer >= 0:
        return _NAMES[span.kind].format(peer=span.peer)
    name = span.kind.name.lower()
    return f"{name} {span.micro_batch}" if span.micro_batch >= 0 else name


def _arguments(span: Span) -> dict[str, Any]:
    found: dict[str, Any] = {"step": span.step, "generation": span.generation}
    if span.micro_batch >= 0:
        found["micro_batch"] = span.micro_batch
    if span.kind in (Spent.SEND, Spent.RECEIVE, Spent.SNAPSHOT):
        found["bytes"] = span.amount
    if span.kind == Spent.SNAPSHOT:
        found["busy_s"] = span.value
    if span.kind == Spent.STEP and span.value == span.value:
        found["loss"] = span.value
    if span.kind == Spent.FETCH:
        found["tokens"], found["samples"] = span.amount, span.value
    return found


class _Arrows:
    """From each send to the receive of the same message: the n-th of its kind there is the n-th here."""

    def __init__(self) -> None:
        self._sent: defaultdict[tuple[int, ...], deque[Event]] = defaultdict(deque)
        self._received: defaultdict[tuple[int, ...], deque[Event]] = defaultdict(deque)

    def see(self, rank: int, span: Span, event: Event) -> None:
        key = (span.step, span.generation, span.micro_batch, span.amount)
        if span.kind == Spent.SEND:
            self._sent[(*key, rank, span.peer)].append(event)
        elif span.kind == Spent.RECEIVE:
            self._received[(*key, span.peer, rank)].append(event)

    def events(self) -> Iterator[Event]:
        number = 0
        for key, sent in self._sent.items():
            received = self._received.get(key, deque())
            if len(sent) != len(received):  # some are missing in the trace: the rest cannot be paired
                continue
            for source, sink in zip(sent, received, strict=True):
                number += 1
                shared = {"name": "message", "cat": "transfer", "id": number}
                place = {"pid": source["pid"], "tid": source["tid"], "ts": source["ts"]}
                yield {**shared, "ph": "s", **place}
                place = {"pid": sink["pid"], "tid": sink["tid"], "ts": sink["ts"] + sink["dur"] / 2}
                yield {**shared, "ph": "f", "bp": "e", **place}


# ---------------------------------------------------------------- the coordinator


def _coordinator(tail: Mapping[str, Any], offset: int, first_ns: int) -> Iterator[Event]:
    """Its steps, recoveries and events, of the time that the spans are from."""

    def at(seconds: float) -> int:
        return int(seconds * 1e9) + offset

    for point in tail["series"]:
        start_ns = at(point["at_s"] - point["step_s"])
        if start_ns >= first_ns:
            args = {"step": point["step"], "loss": point["loss"], "generation": point["generation"]}
            yield _slice(f"step {point['step']}", 0, start_ns, point["step_s"], args)
    for recovery in tail["recoveries"]:
        start_s = recovery["at_s"] - recovery["total_s"]
        if at(recovery["at_s"]) < first_ns:
            continue
        args = {name: recovery[name] for name in ("why", "ranks", "nodes", "step", "redone_micro_batches")}
        yield _slice(f"recovery: {recovery['reason']}", 1, at(start_s), recovery["total_s"], args)
        left_s = recovery["total_s"]
        for phase in RECOVERY_PHASES:
            seconds = min(recovery["phases"][phase], left_s)
            yield _slice(phase, 1, at(start_s), seconds, {})
            start_s, left_s = start_s + seconds, left_s - seconds
    for line in tail["events"]:
        story = tell(line)
        if story is not None and at(line["at_s"]) >= first_ns:
            shared = {"ph": "i", "s": "g", "pid": COORDINATOR, "tid": 2, "_ns": at(line["at_s"])}
            yield {**shared, "name": line["event"], "cat": "event", "args": {"text": story.text}}


def _slice(name: str, tid: int, start_ns: int, seconds: float, args: Mapping[str, Any]) -> Event:
    place = {"ph": "X", "cat": "coordinator", "pid": COORDINATOR, "tid": tid}
    return {**place, "name": name, "_ns": start_ns, "dur": int(seconds * 1e9) / 1000, "args": dict(args)}
