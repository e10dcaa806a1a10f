"""From a worker's spans to one line per step: the sums that metrics, `status` and straggler detection work with."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ..comms import telemetry_pb2 as pb
from ..elastic.telemetry import Records, Spent

OPEN_STEPS = 64  # steps of one rank whose end is awaited; older ones are given up
_SUMS = {
    "compute_s": (Spent.FORWARD, Spent.BACKWARD, Spent.COMPUTE),
    "fetch_s": (Spent.FETCH,),
    "wait_s": (Spent.WAIT,),
    "send_s": (Spent.SEND,),
    "receive_s": (Spent.RECEIVE,),
    "update_s": (Spent.UPDATE,),
    "blocked_s": (Spent.BLOCKED,),
    "outside_s": (Spent.OUTSIDE,),
}
_KINDS = max(Spent) + 1


@dataclass
class Totals:
    """What one rank has done since its worker was started. Seconds, bytes and counts."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_SUMS, 0.0))
    steps: int = 0
    step_s: float = 0.0
    micro_batches: int = 0
    tokens: int = 0
    samples: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    snapshots: int = 0
    snapshot_bytes: int = 0
    snapshot_s: float = 0.0
    recover_s: float = 0.0
    loss: float = float("nan")


@dataclass
class _Open:
    """A step that has not ended."""

    spent_ns: np.ndarray = field(default_factory=lambda: np.zeros(_KINDS))
    compute_ns: dict[int, int] = field(default_factory=dict)  # micro-batch -> forward and backward
    tokens: int = 0
    samples: int = 0


@dataclass
class _Link:
    sent_bytes: int = 0
    received_bytes: int = 0
    send_ns: int = 0
    receive_ns: int = 0
    wait_ns: int = 0


class StepSums:
    """Adds up the spans of one rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.totals = Totals()
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._links: dict[int, _Link] = {}

    def add(self, records: Records) -> list[pb.StepTimes]:
        """Take in records in their order; returns the steps that have ended with them."""
        if not len(records):
            return []
        self._count(records)
        self._add_links(records)
        ended: list[pb.StepTimes] = []
        bounds = np.flatnonzero(records["kind"] == Spent.STEP)
        first = 0
        for at in bounds.tolist():
            self._take(records[first:at])
            ended.append(self._end(records[at]))
            first = at + 1
        self._take(records[first:])
        return ended

    def _take(self, records: Records) -> None:
        for step in np.unique(records["step"]).tolist():
            part = records[records["step"] == step]
            found = self._open.setdefault(step, _Open())
            took = part["end_ns"] - part["start_ns"]
            found.spent_ns += np.bincount(part["kind"], weights=took, minlength=_KINDS)
            computed = np.isin(part["kind"], _SUMS["compute_s"])
            for micro_batch, spent in zip(part["micro_batch"][computed].tolist(), took[computed].tolist(), strict=True):
                found.compute_ns[micro_batch] = found.compute_ns.get(micro_batch, 0) + spent
            fetched = part[part["kind"] == Spent.FETCH]
            found.tokens += int(fetched["amount"].sum())
            found.samples += int(fetched["value"].sum())
        while len(self._open) > OPEN_STEPS:
            self._open.popitem(last=False)

    def _end(self, record: np.void) -> pb.StepTimes:
        step = int(record["step"])
        found = self._open.pop(step, None) or _Open()
        for older in [n for n in self._open if n < step]:  # interrupted: it had no end of its own here
            del self._open[older]
        step_s = (int(record["end_ns"]) - int(record["start_ns"])) / 1e9
        self.totals.steps += 1
        self.totals.step_s += step_s
        self.totals.micro_batches += len(found.compute_ns)
        self.totals.tokens += found.tokens
        self.totals.samples += found.samples
        if record["value"] == record["value"]:
            self.totals.loss = float(record["value"])
        sums = {name: float(sum(found.spent_ns[kind] for kind in kinds)) / 1e9 for name, kinds in _SUMS.items()}
        return pb.StepTimes(
            rank=self.rank,
            step=step,
            generation=int(record["generation"]),
            ended_s=int(record["end_ns"]) / 1e9,
            step_s=step_s,
            micro_batches=len(found.compute_ns),
            tokens=found.tokens,
            samples=found.samples,
            longest_s=max(found.compute_ns.values(), default=0) / 1e9,
            **sums,
        )

    def _count(self, records: Records) -> None:
        """What goes up all the time, interrupted steps included."""
        totals, took = self.totals, records["end_ns"] - records["start_ns"]
        spent = np.bincount(records["kind"], weights=took, minlength=_KINDS) / 1e9
        for name, kinds in _SUMS.items():
            totals.seconds[name] += float(sum(spent[kind] for kind in kinds))
        amount = np.bincount(records["kind"], weights=records["amount"], minlength=_KINDS)
        totals.sent_bytes += int(amount[Spent.SEND])
        totals.received_bytes += int(amount[Spent.RECEIVE])
        copies = records[records["kind"] == Spent.SNAPSHOT]
        totals.snapshots += len(copies)
        totals.snapshot_bytes += int(copies["amount"].sum())
        totals.snapshot_s += float(copies["value"].sum())
        totals.recover_s += float(spent[Spent.RECOVER])

    def _add_links(self, records: Records) -> None:
        moved = records[np.isin(records["kind"], (Spent.SEND, Spent.WAIT, Spent.RECEIVE)) & (records["peer"] >= 0)]
        for record in moved.tolist():
            _, start_ns, end_ns, amount, *_, peer, kind, _, _ = record
            link = self._links.setdefault(peer, _Link())
            if kind == Spent.SEND:
                link.send_ns += end_ns - start_ns
                link.sent_bytes += amount
            elif kind == Spent.RECEIVE:
                link.receive_ns += end_ns - start_ns
                link.received_bytes += amount
            else:
                link.wait_ns += end_ns - start_ns

    def links(self) -> Iterator[pb.LinkTimes]:
        """What went to and came from each peer since the last time this was asked."""
        links, self._links = self._links, {}
        for peer, link in links.items():
            yield pb.LinkTimes(
                rank=self.rank,
                peer=peer,
                sent_bytes=link.sent_bytes,
                send_s=link.send_ns / 1e9,
                received_bytes=link.received_bytes,
                receive_s=link.receive_ns / 1e9,
                wait_s=link.wait_ns / 1e9,
            )
