"""The observed state of a job: fed by the event log, the agents' telemetry and the coordinator's state.

Metrics, `everstep status`, a terminal view and a web page all read this object. It decides nothing, and its memory is
bounded. It never imports torch: it lives in the coordinator's process.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from everstep.agents.analysis.layer_costs import LayerCosts
from everstep.agents.analysis.reprotection import Reprotection
from everstep.agents.analysis.series import Series
from everstep.agents.analysis.suspects import Suspects
from everstep.comms.control import telemetry_pb2 as pb
from everstep.elastic.protocol.causes import Cause
from everstep.elastic.protocol.events import CostsMeasured, SpeedsMeasured, StragglerFound, StragglerGone, WaitNoticed
from everstep.elastic.protocol.job import Job
from everstep.elastic.protocol.state import State

from .holdups import Holdups
from .metrics import (
    FAILURES,
    JOB_PHASES,
    SHOWN_STRAGGLERS,
    JobMetrics,
)
from .pages import Page
from .views import Seen, newest, view_of

RANK_POINTS = 200_000  # steps of ranks kept, of all together
RANK_STEPS = 256  # of one rank at most
COMPARE_S = 1.0  # how often all ranks are looked at together


@dataclass
class _NodeSeen:
    """The last report of a node's agent."""

    at_s: float  # by our clock
    telemetry: pb.Telemetry
    clock_s: float  # unix time minus the node's monotonic clock
    left_out: int = 0


@dataclass
class RankSeries:
    """The newest steps of a rank, oldest first."""

    node: str
    steps: deque[pb.StepTimes] = field(default_factory=lambda: deque(maxlen=RANK_STEPS))

    def take(self, node: str, step: pb.StepTimes) -> None:
        """The rank has made a step on this node."""
        self.node = node
        self.steps.append(step)


class Observer:
    """Watches one job; thread-safe.

    `state` reads the coordinator's state, which is immutable; `state_clock` is the clock of the times in it, and
    `clock` that of the event log. `undecided` returns why the coordinator cannot decide, empty if it can.
    """

    def __init__(
        self,
        job: str,
        state: Callable[[], State],
        state_clock: Callable[[], float] = time.monotonic,
        clock: Callable[[], float] = time.monotonic,
        undecided: Callable[[], str] = lambda: "",
    ) -> None:
        self.job = job
        self.metrics = JobMetrics(job)
        self.series = Series()
        self.suspects = Suspects()
        self.stragglers = self.suspects.stragglers
        self.layer_costs = LayerCosts()
        self.holdups = Holdups()
        self.reprotection = Reprotection()
        self.ranks: dict[int, RankSeries] = {}
        self._state = state
        self._clock = clock
        self._state_clock = state_clock
        self._undecided = undecided
        self._lock = threading.RLock()
        self._seen: dict[str, _NodeSeen] = {}
        self._hosts: dict[str, str] = {}  # node -> host, of nodes that may be gone
        self._counted: dict[str, float] = {"training": 0.0}
        self._tokens_per_sample = math.nan
        self._samples_without = 0  # steps whose tokens are not reported yet
        self._compared_s = 0.0
        self._costs_s = 0.0  # when costs of layers were looked at last
        self._held_up_s = 0.0  # when waits were looked at last
        self._checkpoint_s = 0.0
        self._checkpoint: Mapping[str, Any] | None = None
        self._saving: Mapping[str, Any] | None = None

    # ------------------------------------------------------------ inputs

    def heard(self, line: Mapping[str, Any]) -> None:
        """A line of the event log."""
        with self._lock:
            event = line["event"]
            if event in ("committed", "committed_again"):
                self._committed(line)
                self.reprotection.committed(line)
            else:
                self.series.note(line)
            handler = _HANDLERS.get(event)
            if handler is not None:
                handler(self, line)

    def told(self, node: str, telemetry: pb.Telemetry) -> None:
        """Take the report that a node's agent sends about once a second."""
        now = self._clock()
        with self._lock:
            before = self._seen.get(node)
            clock_s = telemetry.unix_s - telemetry.at_s
            self._seen[node] = _NodeSeen(now, telemetry, clock_s, telemetry.left_out)
            self.metrics.telemetry_left_out.inc(max(0, telemetry.left_out - (before.left_out if before else 0)))
            for step in telemetry.steps:
                series = self.ranks.setdefault(step.rank, RankSeries(node))
                series.take(node, step)
            elapsed_s = telemetry.at_s - before.telemetry.at_s if before else 0.0
            self.suspects.take(telemetry, elapsed_s, now)
            self.layer_costs.take(telemetry, self._state().speeds)
            self.holdups.take(telemetry.ranks, now)
            self._learn_tokens(telemetry)
            if now - self._compared_s >= COMPARE_S:
                self._compared_s = now
                self._bound()
                self._compare()

    def heartbeat(self, count: int = 1) -> None:
        """Heartbeats of agents arrived."""
        self.metrics.heartbeats.inc(count)

    def poll(self) -> StragglerFound | StragglerGone | SpeedsMeasured | CostsMeasured | WaitNoticed | None:
        """New findings of slow ranks, links, costs and waits, one at a time: events for the coordinator."""
        with self._lock:
            found = self.suspects.poll()
            now = self._clock()
            if found is not None or now - self._held_up_s < COMPARE_S:
                return found
            if now - self._costs_s >= COMPARE_S:
                self._costs_s = now
                if (costs := self.layer_costs.news(self._state())) is not None:
                    return costs
            wait = self.holdups.poll(self._state(), now, self.series.typical_s)
            if wait is None:  # else there may be more
                self._held_up_s = now
            return wait

    # ------------------------------------------------------------ queries

    def page(self, accept: str = "") -> Page:
        """The job's metrics, for Prometheus."""
        with self._lock:
            self._compare()
            self._refresh()
        return self.metrics.answer(accept)

    def targets(self) -> Page:
        """The agents' own metrics addresses, as Prometheus's HTTP service discovery wants them."""
        live = self._state().nodes
        with self._lock:
            found = {node: seen.telemetry.metrics for node, seen in self._seen.items() if node in live}
        groups = [
            {"targets": [at], "labels": {"run": self.job, "node": node}} for node, at in sorted(found.items()) if at
        ]
        return Page("application/json", json.dumps(groups).encode())

    def view(self, steps: int = 200, rank_steps: int = 1) -> dict[str, Any]:
        """Everything there is to show, as JSON values: the last `steps` of the job, `rank_steps` of each rank."""
        return view_of(self.seen(steps, rank_steps))

    def seen(self, steps: int, rank_steps: int) -> Seen:
        """The data of a view, copied quickly under the lock, since writers wait meanwhile."""
        with self._lock:
            state, now, series = self._state(), self._clock(), self.series
            rate = series.rate()
            tokens_per_s = rate * (state.job.global_batch_size if state.job else 0) * self._tokens_per_sample
            return Seen(
                job=self.job,
                state=state,
                at_s=now,
                state_at_s=self._state_clock(),
                undecided=self._undecided(),
                waits=self.holdups.shown(state, now),
                typical_s=series.typical_s,
                committed_s=series.committed_s,
                started_s=series.started_s,
                rate=rate,
                tokens_per_s=tokens_per_s,
                goodput=series.goodput(now),
                lost_s=series.lost_s,
                interval=state.snapshot_every,
                exposure=self._exposure(state, now),
                reprotection_s=self.reprotection.longest_s,
                checkpoint=self._checkpoint,
                checkpoint_s=self._checkpoint_s,
                saving=self._saving,
                told={node: (seen.at_s, seen.telemetry) for node, seen in self._seen.items()},
                steps=newest(series.steps, steps),
                rank_steps={rank: newest(of.steps, rank_steps) for rank, of in self.ranks.items()},
                ratios=dict(self.stragglers.ratios),
                slow=frozenset(self.stragglers.slow),
                per_micro_batch_s=dict(self.stragglers.per_micro_batch_s),
                findings=self.suspects.findings(),
                recoveries=list(series.recoveries),
                events=list(series.events),
            )

    def _exposure(self, state: State, now: float) -> dict[str, float | None] | None:
        """The work that the loss of a node would destroy; None if there is no protection against it."""
        if state.placement is None or not state.placement.stripes:
            return None
        made_s = self.series.commit_times.get(state.protected - 1)
        return {"steps": state.committed + 1 - state.protected, "seconds": now - made_s if made_s else None}

    # ------------------------------------------------------------ events

    def _committed(self, line: Mapping[str, Any]) -> None:
        state, metrics = self._state(), self.metrics
        known = self.series.started_s
        layout = state.layout
        commit = self.series.commit(line, len(layout.ranks) if layout else 0)
        metrics.productive.inc(max(0.0, commit.step_s - commit.lost_s))
        metrics.lost_seconds.inc(max(0.0, commit.lost_s))
        if line["event"] == "committed_again":
            metrics.lost_steps.inc()
            return
        metrics.steps.inc()
        if known:
            metrics.step_seconds.observe(commit.step_s)
        if line.get("loss") is not None:
            metrics.loss.set(line["loss"])
        batch = _samples_of(state.job, line["step"]) if state.job else 0
        metrics.samples.inc(batch)
        self._samples_without += batch
        self._count_tokens()

    def _learn_tokens(self, telemetry: pb.Telemetry) -> None:
        samples = sum(step.samples for step in telemetry.steps)
        if samples:
            self._tokens_per_sample = sum(step.tokens for step in telemetry.steps) / samples
            self._count_tokens()

    def _count_tokens(self) -> None:
        if self._tokens_per_sample == self._tokens_per_sample:
            self.metrics.tokens.inc(self._samples_without * self._tokens_per_sample)
            self._samples_without = 0

    def _rebalanced(self, line: Mapping[str, Any]) -> None:
        self.metrics.rebalance_stall.observe(line["stall_s"])
        self.metrics.rebalance_bytes.labels("ahead").inc(line["prefetched_bytes"])
        self.metrics.rebalance_bytes.labels("switch").inc(line["moved_bytes"])

    def _recovered(self, line: Mapping[str, Any]) -> None:
        point, metrics = self.series.recover(line), self.metrics
        self.reprotection.recovered(line)
        metrics.recoveries.labels(point.reason).inc()
        metrics.recovery_seconds.labels(point.reason).observe(point.total_s)
        for phase, seconds in point.phases.items():
            metrics.recovery_phases.labels(phase, point.reason).observe(seconds)
        metrics.lost_micro_batches.inc(point.redone_micro_batches)

    def _failed(self, node: str, kind: Cause) -> None:
        host = self._hosts.get(node) or node
        self.metrics.failures.labels(host, kind.value).inc()

    def _node_joined(self, line: Mapping[str, Any]) -> None:
        self._hosts[line["node"]] = line["host"]
        while len(self._hosts) > RANK_POINTS // 10:
            self._hosts.pop(next(iter(self._hosts)))
        for kind in FAILURES:
            self.metrics.failures.labels(line["host"], kind.value)

    def _node_lost(self, line: Mapping[str, Any]) -> None:
        self._failed(line["node"], Cause.NODE_LOST)
        self._seen.pop(line["node"], None)
        self.reprotection.node_lost(line)

    def _worker_died(self, line: Mapping[str, Any]) -> None:
        self._failed(line["node"], Cause.of_death(line.get("hang", "")))
        if line.get("hang"):
            self.metrics.hung_kills.labels(line["hang"]).inc()

    def _corruption(self, line: Mapping[str, Any]) -> None:
        self.metrics.corruptions.labels(line["where"]).inc()
        if line.get("node"):
            self._failed(line["node"], Cause.CORRUPTION)

    def _straggler_found(self, line: Mapping[str, Any]) -> None:
        self.metrics.stragglers_found.labels(line["what"]).inc()

    def _saved(self, line: Mapping[str, Any]) -> None:
        self._checkpoint, self._checkpoint_s = line, line["at_s"]
        self._saved_or_not(line)
        self.metrics.checkpoints.inc()
        self.metrics.checkpoint_step.set(line["version"])
        self.metrics.checkpoint_seconds.observe(line.get("seconds", 0.0))
        if line.get("bytes"):  # 0: the checkpoint was removed for a newer one before its size was read
            self.metrics.checkpoint_size.set(line["bytes"])

    def _begins_to_save(self, line: Mapping[str, Any]) -> None:
        self._saving = line

    def _failed_to_save(self, line: Mapping[str, Any]) -> None:
        self.metrics.checkpoint_failures.inc()
        self._saved_or_not(line)

    def _saved_or_not(self, line: Mapping[str, Any]) -> None:
        if self._saving is not None and self._saving["name"] == line.get("name"):
            self._saving = None

    # ------------------------------------------------------------ gauges, computed when they are scraped

    def _refresh(self) -> None:
        state, now, metrics, series = self._state(), self._clock(), self.metrics, self.series
        metrics.decides.set(not self._undecided())
        for phase in JOB_PHASES:
            metrics.phase.labels(phase).set(phase == state.phase.value)
        self._refresh_layout(state)
        metrics.step.set(state.committed + 1)
        metrics.typical.set(series.typical_s)
        running = bool(series.started_s) and not series.ended_s
        metrics.since_commit.set(now - series.committed_s if running else 0.0)
        training_s = series.training_s(now)
        metrics.training.inc(max(0.0, training_s - self._counted["training"]))
        self._counted["training"] = training_s
        metrics.goodput.set(series.goodput(now))
        metrics.interval.set(state.snapshot_every)
        metrics.losses.set(state.placement.losses if state.placement is not None else 0)
        exposure = self._exposure(state, now)
        metrics.exposure_steps.set(_or_nan(exposure["steps"] if exposure else None))
        metrics.exposure.set(_or_nan(exposure["seconds"] if exposure else None))
        saves = state.job is not None and state.job.checkpoints and running
        metrics.checkpoint_age.set(now - (self._checkpoint_s or series.started_s) if saves else math.nan)
        silences = [
            max(0.0, self._state_clock() - heard.at_s) for name, heard in state.heard.items() if name in state.nodes
        ]
        metrics.silence.set(max(silences, default=0.0))
        metrics.gap.set(max((heard.gap_s for heard in state.heard.values()), default=0.0))
        metrics.nodes.set(len(state.nodes))
        metrics.spares.set(len(state.spares))
        metrics.quarantined.set(len(state.quarantined))
        metrics.slow_links.set(sum(finding.what == "link" for finding in self.suspects.findings()))
        metrics.stragglers.set(len(self.stragglers.slow))
        metrics.slowdown.clear()
        for rank, ratio in self.stragglers.slowest(SHOWN_STRAGGLERS).items():
            metrics.slowdown.labels(str(rank)).set(ratio)

    def _refresh_layout(self, state: State) -> None:
        metrics, layout = self.metrics, state.layout
        metrics.generation.set(layout.generation if layout else 0)
        metrics.world_size.set(len(layout.ranks) if layout else 0)
        metrics.planned.set(state.job.steps if state.job else 0)
        metrics.stage_ranks.clear()
        metrics.stage_layers.clear()
        for number, stage in enumerate(layout.stages if layout else ()):
            metrics.stage_ranks.labels(str(number)).set(len(stage.ranks))
            metrics.stage_layers.labels(str(number)).set(stage.stop - stage.start)

    def _compare(self) -> None:
        self.suspects.compare(self._state(), self._clock())

    def _bound(self) -> None:
        """Keep fewer steps per rank if there are many ranks, and none of ranks that are gone."""
        live = self._state().workers
        for rank in [r for r in self.ranks if r not in live] if live else ():
            del self.ranks[rank]
        most = max(1, min(RANK_STEPS, RANK_POINTS // max(1, len(self.ranks))))
        for series in self.ranks.values():
            while len(series.steps) > most:
                series.steps.popleft()


def _samples_of(job: Job, step: int) -> int:
    """How many samples a step has: fewer in the last one of an epoch with last_batch="short"."""
    batch = job.global_batch_size
    if not job.epochs or job.last_batch != "short":
        return batch
    batches, steps = -(-job.samples // batch), job.steps // job.epochs  # several optimizers share a batch
    return min(batch, job.samples - step % steps // (steps // batches) * batch)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


_HANDLERS: dict[str, Callable[[Observer, Mapping[str, Any]], None]] = {
    "recovered": Observer._recovered,
    "rebalanced": Observer._rebalanced,
    "node_joined": Observer._node_joined,
    "spare_joined": Observer._node_joined,
    "node_lost": Observer._node_lost,
    "worker_died": Observer._worker_died,
    "corruption": Observer._corruption,
    "straggler_found": Observer._straggler_found,
    "checkpoint_saved": Observer._saved,
    "checkpoint_begun": Observer._begins_to_save,
    "checkpoint_failed": Observer._failed_to_save,
    "unprotected": lambda observer, line: observer.metrics.unprotected.inc(),
    "restarted": lambda observer, line: observer.metrics.restarts.inc(),
}
