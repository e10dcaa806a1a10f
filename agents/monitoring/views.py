"""The view of a job as JSON values: one dictionary for `everstep status`, the terminal view and the web page.

Made from a copy of the observer's data, in the caller's thread, so that no writer waits for it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from everstep.agents.analysis.health import odd
from everstep.agents.analysis.series import RecoveryPoint, StepPoint
from everstep.agents.analysis.verdicts import Finding
from everstep.agents.base.strict_json import dumps
from everstep.comms.control import telemetry_pb2 as pb
from everstep.elastic.protocol.protection import describe_protection, survival_of
from everstep.elastic.protocol.state import Node, State, Worker

FRESH_S = 60.0  # older telemetry does not show a node's present state

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The observer's knowledge at a moment. Nothing in it changes any more."""

    job: str
    state: State
    at_s: float  # the event log's clock
    state_at_s: float  # the state's clock
    undecided: str
    waits: Sequence[str]  # waits between ranks, and ranks without progress
    typical_s: float
    committed_s: float
    started_s: float
    rate: float
    tokens_per_s: float
    goodput: float
    lost_s: float
    interval: int
    exposure: Mapping[str, float | None] | None
    reprotection_s: float  # the longest time that the job took to be protected again; 0: not known
    checkpoint: Mapping[str, Any] | None
    checkpoint_s: float
    saving: Mapping[str, Any] | None
    told: Mapping[str, tuple[float, pb.Telemetry]]
    steps: Sequence[StepPoint]
    rank_steps: Mapping[int, Sequence[pb.StepTimes]]
    ratios: Mapping[int, float]
    slow: frozenset[int]
    per_micro_batch_s: Mapping[int, float]
    findings: Sequence[Finding]
    recoveries: Sequence[RecoveryPoint]
    events: Sequence[Mapping[str, Any]]


def newest(items: Sequence[T], count: int) -> list[T]:
    """The last items of a deque, oldest first, without looking at the others."""
    found = list(itertools.islice(reversed(items), max(0, count)))
    found.reverse()
    return found


def view_of(seen: Seen) -> dict[str, Any]:
    """Everything there is to show."""
    state, job, layout = seen.state, seen.state.job, seen.state.layout
    last = seen.steps[-1] if seen.steps else None
    unlike = odd({name: node.health for name, node in state.nodes.items()})
    return {
        "job": seen.job,
        "at_s": seen.at_s,
        "unix_s": time.time(),
        "phase": state.phase.value,
        "undecided": seen.undecided,
        "waits": list(seen.waits),
        "recovering": _recovering(seen),
        "generation": layout.generation if layout else 0,
        "layout": layout.describe() if layout else None,
        "world_size": len(layout.ranks) if layout else 0,
        "stages": [{"layers": [s.start, s.stop], "ranks": list(s.ranks)} for s in layout.stages] if layout else [],
        "stages_asked": state.stages_asked or None,
        "step": state.committed,
        "steps": job.steps if job else None,
        "loss": last.loss if last else None,
        "loss_amiss": _loss_amiss(seen.steps),
        "step_s": last.step_s if last else None,
        "typical_step_s": seen.typical_s or None,
        "commit_age_s": seen.at_s - seen.committed_s if seen.committed_s else None,
        "running_s": seen.at_s - seen.started_s if seen.started_s else None,
        "steps_per_s": seen.rate,
        "samples_per_s": seen.rate * (job.global_batch_size if job else 0),
        "tokens_per_s": _number(seen.tokens_per_s),
        "goodput": seen.goodput,
        "lost_s": seen.lost_s,
        "protection": describe_protection(job.protection, state.placement) if job and state.placement else None,
        "survival": _survival(seen),
        "snapshot_interval": seen.interval,
        "exposure": seen.exposure,
        "checkpoint": _checkpoint(seen),
        "resumable": {"steps": state.saved[0].version, "name": state.saved[0].name} if state.saved else None,
        "saving": _saving(seen),
        "quarantined": len(state.quarantined),
        "quarantine": [_kept_out(seen, host) for host in state.quarantined],
        "troubles": [_troubles(seen, host) for host in state.troubles],
        "stragglers": [_straggler(seen, finding) for finding in seen.findings],
        "nodes": [_node(seen, name, unlike.get(name, [])) for name in state.nodes],
        "spares": [_spare(seen, name) for name in state.spares],
        "workers": [_worker(seen, rank, worker) for rank, worker in sorted(state.workers.items())],
        "series": [point._asdict() for point in seen.steps],
        "recoveries": [{**point._asdict(), "phases": dict(point.phases)} for point in seen.recoveries],
        "events": list(seen.events),
    }


def summary_of(view: Mapping[str, Any]) -> dict[str, Any]:
    """The view's most important parts, under the names that scripts rely on."""
    same = ("job", "phase", "generation", "steps", "layout", "protection", "exposure")
    return {
        **{name: view[name] for name in same},
        "committed_step": view["step"],
        "checkpoint": view["resumable"],
        "nodes": sorted(node["node"] for node in view["nodes"]),
        "spares": sorted(spare["node"] for spare in view["spares"]),
        "workers": {str(worker["rank"]): worker["status"] for worker in view["workers"]},
    }


def _survival(seen: Seen) -> dict[str, Any] | None:
    """The forecast of how often losses lead back to storage."""
    placement = seen.state.placement
    chance = survival_of(seen.state, placement, seen.reprotection_s) if placement is not None else None
    if chance is None:
        return None
    return {**asdict(chance), "measured": seen.reprotection_s > 0, "text": chance.describe()}


def _loss_amiss(steps: Sequence[StepPoint]) -> dict[str, Any] | None:
    """A loss that is not finite: as text, and the first known step of the series."""
    amiss = list(itertools.takewhile(lambda p: p.loss is not None and not math.isfinite(p.loss), reversed(steps)))
    return {"loss": str(amiss[0].loss), "since_step": amiss[-1].step} if amiss else None


def _straggler(seen: Seen, finding: Finding) -> dict[str, Any]:
    worker = seen.state.workers.get(finding.rank)
    return {**finding.view(seen.at_s), "node": finding.node or (worker.node if worker else "")}


def _kept_out(seen: Seen, host: str) -> dict[str, Any]:
    """A host in quarantine."""
    known = seen.state.quarantined[host]
    nodes = [name for name, node in seen.state.nodes.items() if node.host == host]
    times = {"for_s": max(0.0, seen.state_at_s - known.since_s), "left_s": max(0.0, known.until_s - seen.state_at_s)}
    return {"host": host, **times, "why": known.why, "nodes": nodes}


def _troubles(seen: Seen, host: str) -> dict[str, Any]:
    """Recent failures and slowdowns of a host."""
    known = seen.state.troubles[host]
    last = known[-1]
    ago_s = max(0.0, seen.state_at_s - last.at_s)
    return {"host": host, "count": len(known), "last": last.what, "detail": last.detail, "ago_s": ago_s}


def _recovering(seen: Seen) -> dict[str, Any] | None:
    """The recovery under way."""
    recovery = seen.state.recovery
    if recovery is None:
        return None
    return {"why": recovery.why, "seconds": max(0.0, seen.state_at_s - recovery.killed_s), "step": recovery.step}


def _checkpoint(seen: Seen) -> dict[str, Any] | None:
    if seen.checkpoint is None:
        return None
    fields = {k: v for k, v in seen.checkpoint.items() if k not in ("event", "at_s")}
    return {**fields, "age_s": seen.at_s - seen.checkpoint_s}


def _saving(seen: Seen) -> dict[str, Any] | None:
    """The checkpoint that is being saved now."""
    if seen.saving is None:
        return None
    line = seen.saving
    return {"version": line["version"], "name": line["name"], "for_s": max(0.0, seen.at_s - line["at_s"])}


def _node(seen: Seen, name: str, unlike: Sequence[str]) -> dict[str, Any]:
    leaving = seen.state.leaving.get(name)
    at_s, telemetry = seen.told.get(name, (0.0, pb.Telemetry()))
    fresh = name in seen.told and seen.at_s - at_s < FRESH_S
    return {
        **_known(seen, name, seen.state.nodes[name]),
        "leaving": leaving.why if leaving else None,
        "odd": list(unlike),
        "metrics": telemetry.metrics,
        "reading": fields_of(telemetry.host) if fresh else None,
        "gpus": [fields_of(gpu) for gpu in telemetry.gpus] if fresh else [],
        "links": [fields_of(link) for link in telemetry.links] if fresh else [],
    }


def _spare(seen: Seen, name: str) -> dict[str, Any]:
    """A node that waits for a place."""
    return _known(seen, name, seen.state.spares[name])


def _known(seen: Seen, name: str, node: Node) -> dict[str, Any]:
    """What a node has said of itself, and when it was last heard."""
    heard = seen.state.heard.get(name)
    return {
        "node": name,
        "host": node.host,
        "slots": node.slots,
        "silence_s": max(0.0, seen.state_at_s - heard.at_s) if heard else None,
        "health": dict(node.health),
        "domains": list(node.domains),
    }


def _worker(seen: Seen, rank: int, worker: Worker) -> dict[str, Any]:
    return {
        "rank": rank,
        "incarnation": worker.id.incarnation,
        "node": worker.node,
        "status": worker.status.value,
        "slowdown": seen.ratios.get(rank),
        "straggler": rank in seen.slow,
        "micro_batch_s": seen.per_micro_batch_s.get(rank),
        "steps": [fields_of(step) for step in seen.rank_steps.get(rank, ())],
    }


def fields_of(message: Any) -> dict[str, Any]:
    """A message's own fields, as JSON values."""
    return {
        item.name: [fields_of(one) for one in value] if item.name == "disks" else value
        for item in message.DESCRIPTOR.fields
        if (value := getattr(message, item.name)) is not None
    }


def _number(value: float) -> float | None:
    return value if value == value and value else None


def to_json(values: Mapping[str, Any]) -> str:
    """A view as JSON, in pieces: one call for all of a large job would hold up every other thread meanwhile."""
    return "{" + ", ".join(_pieces(values)) + "}"


def _pieces(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, list):
            yield f"{dumps(name)}: [{', '.join(map(dumps, value))}]"
        else:
            yield f"{dumps(name)}: {dumps(value)}"
