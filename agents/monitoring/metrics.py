"""Every Prometheus metric of everstep: those of a job, which its coordinator serves, and those of a node, its agent.

Each process has a registry of its own. Names are `everstep_<thing>_<unit>`, units are base units, counters end in
`_total`. Labels are bounded: by the world size (`rank`), the cluster (`host`), the machine, or a list here.
`docs/metrics.md` has a line for each; a test compares.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import choose_encoder

from everstep import __version__
from everstep.agents.analysis.series import PHASES
from everstep.agents.analysis.step_times import Totals
from everstep.comms.control import telemetry_pb2 as pb
from everstep.elastic.protocol.causes import Cause
from everstep.elastic.protocol.state import Phase

from .pages import Page

STEP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 150.0)
RECOVERY_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0)
SAVING_BUCKETS = (0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0)
JOB_PHASES = tuple(phase.value for phase in Phase)
FAILURES = (Cause.WORKER_DIED, Cause.WORKER_HUNG, Cause.NODE_LOST, Cause.CORRUPTION)  # of a host
ACTIVITIES = ("compute", "fetch", "wait", "send", "receive", "update", "outside")
SHOWN_STRAGGLERS = 16  # ranks with a series of their own

disable_created_metrics()  # type: ignore[no-untyped-call]


@dataclass
class _Rising:
    """Counters that follow totals kept elsewhere, which may begin again at nothing."""

    seen: dict[tuple[object, ...], float] = field(default_factory=dict)

    def follow(self, counter: Counter, total: float, *labels: object) -> None:
        key = (counter, *labels)
        before = self.seen.get(key, 0.0)
        child = counter.labels(*map(str, labels)) if labels else counter
        child.inc(total - before if total >= before else total)
        self.seen[key] = total

    def forget(self, label: object) -> None:
        """Totals of this label begin at nothing again."""
        self.seen = {key: total for key, total in self.seen.items() if label not in key[1:]}


class _Metrics:
    """A registry, and factories for its metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    def gauge(self, name: str, about: str, *labels: str) -> Gauge:
        return Gauge(name, about, labels, registry=self.registry)

    def counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(name, about, labels, registry=self.registry)

    def histogram(self, name: str, about: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, about, labels, buckets=buckets, registry=self.registry)

    def page(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)

    def answer(self, accept: str) -> Page:
        """The metrics in the format that a request's Accept header selects: OpenMetrics or Prometheus's text format."""
        encode, content_type = choose_encoder(accept)
        return Page(content_type, encode(self.registry), {"Vary": "Accept"})

    def names(self) -> list[str]:
        """The names of the metrics here, counters with their `_total`."""
        return sorted(m.name + ("_total" if m.type == "counter" else "") for m in self.registry.collect())


class JobMetrics(_Metrics):
    """The coordinator's metrics of its job."""

    def __init__(self, job: str) -> None:
        super().__init__()
        info = self.gauge("everstep_job_info", "1; which job, and which version of everstep", "run", "version")
        info.labels(job, __version__).set(1)
        self.decides = self.gauge(
            "everstep_coordinator_decides", "1 while this coordinator leads, and its store takes what it decides"
        )
        self.phase = self.gauge("everstep_job_phase", "1 for the phase that the job is in", "phase")
        self._training()
        self._recoveries()
        self._protection()
        self._checkpoints()
        self._nodes()

    def _training(self) -> None:
        self.generation = self.gauge("everstep_generation", "how often the membership has changed, counted from 1")
        self.world_size = self.gauge("everstep_world_size_ranks", "workers that train")
        self.stage_ranks = self.gauge("everstep_stage_ranks", "workers of a pipeline stage", "stage")
        self.stage_layers = self.gauge("everstep_stage_layers", "layers of a pipeline stage", "stage")
        self.step = self.gauge("everstep_committed_steps", "steps committed; goes back with a lost version")
        self.planned = self.gauge("everstep_planned_steps", "steps that the job is to train")
        self.steps = self.counter("everstep_steps", "steps committed for the first time")
        self.step_seconds = self.histogram("everstep_step_seconds", "time from commit to commit", STEP_BUCKETS)
        self.typical = self.gauge("everstep_step_typical_seconds", "median time of recent undisturbed steps")
        self.since_commit = self.gauge("everstep_commit_age_seconds", "time since the last commit")
        self.samples = self.counter("everstep_samples", "samples in committed steps")
        self.tokens = self.counter("everstep_tokens", "tokens in committed steps, where inputs are text")
        self.loss = self.gauge("everstep_loss", "mean loss of the last committed step")
        self.productive = self.counter("everstep_productive_seconds", "time that went into steps that were kept")
        self.training = self.counter(
            "everstep_training_seconds", "time since training began, without a step's at the end"
        )
        self.goodput = self.gauge("everstep_goodput_ratio", "productive over training seconds")

    def _recoveries(self) -> None:
        self.recoveries = self.counter("everstep_recoveries", "recoveries, until the next commit", "reason")
        self.recovery_seconds = self.histogram(
            "everstep_recovery_seconds", "time from a fault to the next commit", RECOVERY_BUCKETS, "reason"
        )
        self.recovery_phases = self.histogram(
            "everstep_recovery_phase_seconds", "time in a phase of a recovery", RECOVERY_BUCKETS, "phase", "reason"
        )
        for reason in [cause.value for cause in Cause]:  # from zero on, so that the first count is an increase
            self.recoveries.labels(reason)
            self.recovery_seconds.labels(reason)
            for phase in PHASES:
                self.recovery_phases.labels(phase, reason)
        self.rebalance_stall = self.histogram(
            "everstep_rebalance_stall_seconds",
            "time that members stood still to enter a faster layout",
            RECOVERY_BUCKETS,
        )
        self.rebalance_bytes = self.counter(
            "everstep_rebalance_bytes",
            "bytes moved for faster layouts: while training went on, or at the switch",
            "phase",
        )
        for phase in ("ahead", "switch"):
            self.rebalance_bytes.labels(phase)
        self.lost_micro_batches = self.counter("everstep_lost_micro_batches", "micro-batches computed again")
        self.lost_steps = self.counter("everstep_lost_steps", "committed steps computed again")
        self.lost_seconds = self.counter("everstep_lost_seconds", "time that recoveries, and redone steps, took")
        self.failures = self.counter("everstep_host_failures", "failures on a host", "host", "kind")
        self.hung_kills = self.counter(
            "everstep_hung_kills", "workers killed as hung, by signs of life until then", "signs"
        )
        for signs in ("silent", "alive"):
            self.hung_kills.labels(signs)
        self.restarts = self.counter("everstep_restarts", "restarts of all workers of a script that is not elastic")

    def _protection(self) -> None:
        self.interval = self.gauge("everstep_snapshot_interval_steps", "steps between versions that outlive nodes")
        self.losses = self.gauge("everstep_protected_losses_nodes", "nodes that may be lost at once")
        self.exposure_steps = self.gauge("everstep_exposure_steps", "steps that the loss of a node would lose")
        self.exposure = self.gauge("everstep_exposure_seconds", "age of the newest version that survives lost nodes")
        self.unprotected = self.counter("everstep_unprotected_versions", "versions given up on as not whole in time")
        self.corruptions = self.counter("everstep_corruptions", "damaged bytes found, by where they were", "where")
        for where in ("keeper", "parity", "frame", "replica", "backup"):
            self.corruptions.labels(where)

    def _checkpoints(self) -> None:
        self.checkpoint_age = self.gauge("everstep_checkpoint_age_seconds", "since the newest checkpoint, or the start")
        self.checkpoint_step = self.gauge("everstep_checkpoint_steps", "steps that the newest checkpoint is after")
        self.checkpoint_size = self.gauge("everstep_checkpoint_size_bytes", "size of the newest checkpoint's arrays")
        self.checkpoints = self.counter("everstep_checkpoints", "checkpoints saved")
        self.checkpoint_failures = self.counter("everstep_checkpoint_failures", "parts that could not be saved")
        self.checkpoint_seconds = self.histogram(
            "everstep_checkpoint_seconds", "time to save a checkpoint's last part", SAVING_BUCKETS
        )

    def _nodes(self) -> None:
        self.nodes = self.gauge("everstep_job_nodes", "nodes in the job")
        self.spares = self.gauge("everstep_spare_nodes", "nodes that wait to take the place of one that is lost")
        self.heartbeats = self.counter("everstep_heartbeats", "heartbeats and other messages that agents sent")
        self.silence = self.gauge("everstep_heartbeat_silence_seconds", "longest present silence of a node")
        self.gap = self.gauge("everstep_heartbeat_gap_seconds", "longest silence that a node has shown lately")
        self.stragglers = self.gauge("everstep_straggler_ranks", "ranks whose own compute holds the others up")
        self.slowdown = self.gauge(
            "everstep_straggler_slowdown_ratio", "compute per micro-batch over the stage's median; the slowest", "rank"
        )
        self.slow_links = self.gauge("everstep_straggler_links", "ends of links that are slow themselves")
        self.stragglers_found = self.counter("everstep_stragglers_found", "slow ranks and links found", "kind")
        for kind in ("compute", "link"):
            self.stragglers_found.labels(kind)
        self.quarantined = self.gauge("everstep_quarantined_nodes", "hosts kept out of the job")
        self.telemetry_left_out = self.counter("everstep_telemetry_left_out_steps", "steps whose times were not sent")


class NodeMetrics(_Metrics):
    """An agent's metrics of its workers and its host. Thread-safe, as prometheus_client's metrics are."""

    def __init__(self, job: str, node: str) -> None:
        super().__init__()
        info = self.gauge("everstep_agent_info", "1; which node of which job", "run", "node", "version")
        info.labels(job, node, __version__).set(1)
        self._rising = _Rising()
        self._workers()
        self._keeper()
        self._host()

    def _workers(self) -> None:
        self.activity = self.counter(
            "everstep_worker_activity_seconds", "time of a worker's main thread", "rank", "activity"
        )
        self.blocked = self.counter(
            "everstep_snapshot_blocked_seconds", "time that training waited for snapshots", "rank"
        )
        self.steps = self.counter("everstep_worker_steps", "whole steps of a worker", "rank")
        self.step_seconds = self.counter("everstep_worker_step_seconds", "time in whole steps of a worker", "rank")
        self.last_step = self.gauge("everstep_worker_last_step_seconds", "time of a worker's last whole step", "rank")
        self.micro_batches = self.counter("everstep_worker_micro_batches", "micro-batches computed", "rank")
        self.longest = self.gauge(
            "everstep_worker_longest_micro_batch_seconds", "longest compute of one in the last step", "rank"
        )
        self.tokens = self.counter("everstep_worker_tokens", "tokens of micro-batches begun here", "rank")
        self.samples = self.counter("everstep_worker_samples", "samples of micro-batches begun here", "rank")
        self.sent = self.counter("everstep_worker_sent_bytes", "bytes sent to other workers", "rank")
        self.received = self.counter("everstep_worker_received_bytes", "bytes received from other workers", "rank")
        self.recovering = self.counter("everstep_worker_recovering_seconds", "time in recoveries", "rank")
        self.copied = self.counter("everstep_snapshot_copied_bytes", "bytes copied to keeper memory", "rank")
        self.copying = self.counter("everstep_snapshot_copy_seconds", "time in which they were copied", "rank")
        self.copies = self.counter("everstep_snapshot_copies", "versions copied", "rank")
        self.missed = self.counter("everstep_telemetry_missed_spans", "spans overwritten before they were read")

    def _keeper(self) -> None:
        self.parity = self.counter("everstep_parity_encoded_bytes", "bytes taken into parity blocks")
        self.encoding = self.counter("everstep_parity_encode_seconds", "time of one thread in which they were")
        self.keeper = self.gauge("everstep_keeper_memory_bytes", "snapshots and parity that the keeper holds")
        self.keeper_limit = self.gauge("everstep_keeper_memory_limit_bytes", "memory it may use; 0: not known")

    def _host(self) -> None:
        self.cpu = self.gauge("everstep_host_cpu_ratio", "use of all cores")
        self.load = self.gauge("everstep_host_load", "one-minute load average")
        self.memory_used = self.gauge("everstep_host_memory_used_bytes", "memory that is not available")
        self.memory = self.gauge("everstep_host_memory_bytes", "memory of the host")
        self.shm_used = self.gauge("everstep_host_shm_used_bytes", "/dev/shm in use")
        self.shm = self.gauge("everstep_host_shm_bytes", "size of /dev/shm")
        self.disk_used = self.gauge("everstep_host_disk_used_bytes", "disk in use", "place")
        self.disk = self.gauge("everstep_host_disk_bytes", "size of the disk", "place")
        self.network_sent = self.counter("everstep_host_network_sent_bytes", "sent, all interfaces but loopback")
        self.network_received = self.counter("everstep_host_network_received_bytes", "received, likewise")
        self.gpu_busy = self.gauge("everstep_gpu_busy_ratio", "time in which the GPU had work", "gpu")
        self.gpu_memory_used = self.gauge("everstep_gpu_memory_used_bytes", "GPU memory in use", "gpu")
        self.gpu_memory = self.gauge("everstep_gpu_memory_bytes", "GPU memory", "gpu")
        self.gpu_power = self.gauge("everstep_gpu_power_watts", "power drawn", "gpu")
        self.gpu_temperature = self.gauge("everstep_gpu_temperature_celsius", "temperature", "gpu")

    def worker(self, rank: int, totals: Totals, ended: Iterable[pb.StepTimes]) -> None:
        """What a worker has done so far, and the steps that it has just ended."""
        follow = self._rising.follow
        for name in ACTIVITIES:
            follow(self.activity, totals.seconds[f"{name}_s"], rank, name)
        follow(self.blocked, totals.seconds["blocked_s"], rank)
        follow(self.steps, totals.steps, rank)
        follow(self.step_seconds, totals.step_s, rank)
        follow(self.micro_batches, totals.micro_batches, rank)
        follow(self.tokens, totals.tokens, rank)
        follow(self.samples, totals.samples, rank)
        follow(self.sent, totals.sent_bytes, rank)
        follow(self.received, totals.received_bytes, rank)
        follow(self.recovering, totals.recover_s, rank)
        follow(self.copied, totals.snapshot_bytes, rank)
        follow(self.copying, totals.snapshot_s, rank)
        follow(self.copies, totals.snapshots, rank)
        for step in ended:
            self.last_step.labels(str(rank)).set(step.step_s)
            self.longest.labels(str(rank)).set(step.longest_s)

    def worker_ended(self, rank: int) -> None:
        """The worker of this rank is gone; its counters stay, and its replacement's totals begin at nothing."""
        self._rising.forget(rank)
        for gauge in (self.last_step, self.longest):
            if (str(rank),) in gauge._metrics:
                gauge.remove(str(rank))

    def host(self, reading: pb.HostReading, gpus: Iterable[pb.GpuReading], missed_spans: int) -> None:
        """A reading of the host."""
        follow = self._rising.follow
        follow(self.missed, missed_spans)
        follow(self.parity, reading.parity_bytes)
        follow(self.encoding, reading.parity_s)
        self.keeper.set(reading.keeper_bytes)
        self.keeper_limit.set(reading.keeper_limit_bytes)
        self.cpu.set(reading.cpu_ratio)
        self.load.set(reading.load)
        self.memory_used.set(reading.memory_used_bytes)
        self.memory.set(reading.memory_bytes)
        self.shm_used.set(reading.shm_used_bytes)
        self.shm.set(reading.shm_bytes)
        follow(self.network_sent, reading.network_sent_bytes)
        follow(self.network_received, reading.network_received_bytes)
        for disk in reading.disks:
            self.disk_used.labels(disk.place).set(disk.used_bytes)
            self.disk.labels(disk.place).set(disk.total_bytes)
        for gpu in gpus:
            name = str(gpu.index)
            self.gpu_busy.labels(name).set(gpu.busy_ratio)
            self.gpu_memory_used.labels(name).set(gpu.memory_used_bytes)
            self.gpu_memory.labels(name).set(gpu.memory_bytes)
            self.gpu_power.labels(name).set(gpu.power_watts)
            self.gpu_temperature.labels(name).set(gpu.temperature_celsius)
