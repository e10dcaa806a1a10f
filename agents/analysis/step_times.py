"""From a worker's spans to one line per step: the sums that metrics, `status` and straggler detection work with."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from everstep.comms.control import telemetry_pb2 as pb
from everstep.elastic.contract.telemetry import Records, Spent

from .verdicts import low_median

OPEN_STEPS = 64  # unfinished steps of a rank; older ones are dropped
LAYER_SAMPLES = 32  # of a layer, between two messages; older ones are dropped
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
_COMPUTE = frozenset(_SUMS["compute_s"])
_MOVES = frozenset({Spent.SEND, Spent.WAIT, Spent.RECEIVE})


@dataclass
class Totals:
    """Totals of one rank since its worker was started: seconds, bytes and counts."""

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

    spent_ns: list[int] = field(default_factory=lambda: [0] * _KINDS)
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
        self._first_timed: int | None = None  # the first step whose layers were timed
        self._layers: dict[int, deque[tuple[int, float]]] = {}  # layer -> nanoseconds forward, seconds backward

    def add(self, records: Records) -> list[pb.StepTimes]:
        """Process records in order; returns the steps that end in them."""
        ended: list[pb.StepTimes] = []
        totals, spent = self.totals, [0] * _KINDS
        for _, start_ns, end_ns, amount, value, step, generation, micro_batch, peer, kind, _, _ in records.tolist():
            took = end_ns - start_ns
            spent[kind] += took
            if kind == Spent.STEP:
                ended.append(self._end(step, generation, took, end_ns, value))
                continue
            if kind == Spent.LAYER:
                self._first_timed = step if self._first_timed is None else self._first_timed
                if step != self._first_timed:  # in which libraries are loaded, and caches filled
                    self._layers.setdefault(amount, deque(maxlen=LAYER_SAMPLES)).append((took, value))
                continue
            found = self._open.get(step)
            if found is None:
                found = self._begin(step)
            found.spent_ns[kind] += took
            if kind in _COMPUTE:
                found.compute_ns[micro_batch] = found.compute_ns.get(micro_batch, 0) + took
            elif kind in _MOVES:
                self._moved(kind, peer, took, amount)
            elif kind == Spent.FETCH:
                found.tokens += amount
                found.samples += int(value)
            elif kind == Spent.SNAPSHOT:
                totals.snapshots += 1
                totals.snapshot_bytes += amount
                totals.snapshot_s += value
        for name, kinds in _SUMS.items():
            totals.seconds[name] += sum(spent[kind] for kind in kinds) / 1e9
        totals.recover_s += spent[Spent.RECOVER] / 1e9
        return ended

    def _begin(self, step: int) -> _Open:
        found = self._open[step] = _Open()
        while len(self._open) > OPEN_STEPS:
            self._open.popitem(last=False)
        return found

    def _moved(self, kind: int, peer: int, took: int, amount: int) -> None:
        link = self._links.setdefault(peer, _Link()) if peer >= 0 else _Link()
        if kind == Spent.SEND:
            link.send_ns += took
            link.sent_bytes += amount
            self.totals.sent_bytes += amount
        elif kind == Spent.RECEIVE:
            link.receive_ns += took
            link.received_bytes += amount
            self.totals.received_bytes += amount
        else:
            link.wait_ns += took

    def _end(self, step: int, generation: int, took: int, end_ns: int, loss: float) -> pb.StepTimes:
        found = self._open.pop(step, None) or _Open()
        for older in [n for n in self._open if n < step]:  # interrupted: it had no end of its own here
            del self._open[older]
        totals = self.totals
        totals.steps += 1
        totals.step_s += took / 1e9
        totals.micro_batches += len(found.compute_ns)
        totals.tokens += found.tokens
        totals.samples += found.samples
        if loss == loss:
            totals.loss = loss
        sums = {name: sum(found.spent_ns[kind] for kind in kinds) / 1e9 for name, kinds in _SUMS.items()}
        return pb.StepTimes(
            rank=self.rank,
            step=step,
            generation=generation,
            ended_s=end_ns / 1e9,
            step_s=took / 1e9,
            micro_batches=len(found.compute_ns),
            tokens=found.tokens,
            samples=found.samples,
            longest_s=max(found.compute_ns.values(), default=0) / 1e9,
            **sums,
        )

    def layers(self) -> pb.LayerTimes:
        """What layers have cost here since the last call: medians."""
        layers, self._layers = self._layers, {}
        found = pb.LayerTimes(rank=self.rank)
        for layer, samples in layers.items():
            found.layer.append(layer)
            found.forward_s.append(low_median([took for took, _ in samples]) / 1e9)
            found.backward_s.append(low_median([backward_s for _, backward_s in samples]))
        return found

    def links(self) -> Iterator[pb.LinkTimes]:
        """Traffic to and from each peer since the last call."""
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
