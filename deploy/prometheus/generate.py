"""Writes Prometheus's recording and alert rules: python -m deploy.prometheus.generate. A test compares the files.

`Speed` holds every window, threshold and delay, so that a test can run the same rules in seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
RUNBOOK = "docs/runbook.md"


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The timing of alerts, by default for people on call. Times in seconds unless they are Prometheus durations."""

    evaluate: str = "15s"
    rate: str = "5m"
    goodput_window: str = "1h"
    counting_window: str = "1h"
    soon: str = "1m"
    later: str = "10m"
    stalled_steps: int = 10
    stalled_least_s: float = 60
    goodput: float = 0.9
    exposure_s: float = 600
    checkpoint_s: float = 7200
    failures: int = 3
    memory: float = 0.9
    lost_after: str = "1m"


@dataclass(frozen=True)
class Recording:
    """A recording rule: a precomputed series."""

    record: str
    expression: str


@dataclass(frozen=True)
class Alert:
    """An alert rule: a condition that needs an operator's attention. `summary` is its headline."""

    name: str
    expression: str
    wait: str
    severity: str
    summary: str
    about: str

    @property
    def anchor(self) -> str:
        return self.name.lower()


def recordings(speed: Speed) -> Sequence[Recording]:
    w = speed.rate

    def per_step(activity: str) -> str:
        return (
            f'sum by (run, rank) (rate(everstep_worker_activity_seconds_total{{activity="{activity}"}}[{w}])) '
            f"/ sum by (run, rank) (rate(everstep_worker_steps_total[{w}]))"
        )

    return (
        Recording(
            "everstep:step_seconds:mean",
            f"sum by (run) (rate(everstep_step_seconds_sum[{w}])) "
            f"/ sum by (run) (rate(everstep_step_seconds_count[{w}]))",
        ),
        Recording("everstep:tokens:per_second", f"sum by (run) (rate(everstep_tokens_total[{w}]))"),
        Recording("everstep:samples:per_second", f"sum by (run) (rate(everstep_samples_total[{w}]))"),
        Recording(
            "everstep:goodput:ratio",
            f"sum by (run) (rate(everstep_productive_seconds_total[{speed.goodput_window}])) "
            f"/ sum by (run) (rate(everstep_training_seconds_total[{speed.goodput_window}]))",
        ),
        Recording("everstep:worker_compute_seconds:per_step", per_step("compute")),
        Recording("everstep:worker_wait_seconds:per_step", per_step("wait")),
        Recording("everstep:worker_send_seconds:per_step", per_step("send")),
        Recording("everstep:worker_receive_seconds:per_step", per_step("receive")),
        Recording(
            "everstep:snapshot_copy_bytes:per_second",
            f"sum by (run) (rate(everstep_snapshot_copied_bytes_total[{w}])) "
            f"/ sum by (run) (rate(everstep_snapshot_copy_seconds_total[{w}]))",
        ),
        Recording(
            "everstep:parity_encode_bytes:per_second",
            f"sum by (run) (rate(everstep_parity_encoded_bytes_total[{w}])) "
            f"/ sum by (run) (rate(everstep_parity_encode_seconds_total[{w}]))",
        ),
        Recording(
            "everstep:host_failures:recent",
            "sum by (run, host) "
            f'(increase(everstep_host_failures_total{{kind!="corruption"}}[{speed.counting_window}]))',
        ),
        Recording(
            "everstep:keeper_memory:ratio",
            "max by (run, instance) (everstep_keeper_memory_bytes / (everstep_keeper_memory_limit_bytes > 0))",
        ),
    )


def alerts(speed: Speed) -> Sequence[Alert]:
    s = speed
    return (
        Alert(
            "EverstepNoCommit",
            f"everstep_commit_age_seconds > {s.stalled_steps} * everstep_step_typical_seconds "
            f"and everstep_commit_age_seconds > {s.stalled_least_s:g}",
            s.soon,
            "page",
            "run {{ $labels.run }} has committed no step for {{ $value | humanizeDuration }}",
            f"That is more than {s.stalled_steps} times the duration of a step.",
        ),
        Alert(
            "EverstepNothingDecided",
            "max by (run) (everstep_coordinator_decides) == 0",
            s.soon,
            "page",
            "no coordinator of run {{ $labels.run }} makes decisions",
            "Training continues, but failures and joins have to wait: the store is down or full, or none leads.",
        ),
        Alert(
            "EverstepGoodputLow",
            f"everstep:goodput:ratio < {s.goodput:g}",
            s.later,
            "ticket",
            "run {{ $labels.run }} keeps only {{ $value | humanizePercentage }} of its time",
            "The rest was spent on recoveries and on steps that were computed again.",
        ),
        Alert(
            "EverstepUnprotected",
            f"everstep_exposure_seconds > {s.exposure_s:g} and on (instance) everstep_protected_losses_nodes > 0",
            s.soon,
            "page",
            "the newest version of run {{ $labels.run }} that outlives a node is {{ $value | humanizeDuration }} old",
            "The loss of a node now would lose all steps since then.",
        ),
        Alert(
            "EverstepCheckpointOld",
            f"everstep_checkpoint_age_seconds > {s.checkpoint_s:g}",
            s.soon,
            "page",
            "the newest checkpoint of run {{ $labels.run }} is {{ $value | humanizeDuration }} old",
            "The loss of the whole job now would lose all steps since then.",
        ),
        Alert(
            "EverstepCheckpointFailing",
            f"increase(everstep_checkpoint_failures_total[{s.counting_window}]) > 0",
            "0s",
            "ticket",
            "run {{ $labels.run }} could not save parts of a checkpoint",
            "Training continues, and the next checkpoint that is due tries again.",
        ),
        Alert(
            "EverstepStraggler",
            "everstep_straggler_ranks > 0 or everstep_straggler_links > 0",
            s.later,
            "ticket",
            "{{ $value }} rank(s) or link(s) of run {{ $labels.run }} delay the others",
            "straggler_found in the event log names them, with the evidence; everstep_straggler_slowdown_ratio too.",
        ),
        Alert(
            "EverstepHostFailing",
            f"everstep:host_failures:recent >= {s.failures}",
            "0s",
            "ticket",
            "host {{ $labels.host }} of run {{ $labels.run }} fails repeatedly",
            f"{s.failures} or more workers or agents were lost on it within {s.counting_window}.",
        ),
        Alert(
            "EverstepKeeperMemoryTight",
            f"everstep:keeper_memory:ratio > {s.memory:g}",
            s.soon,
            "page",
            "the keeper at {{ $labels.instance }} uses {{ $value | humanizePercentage }} of its limit",
            "Snapshots and parity have no room for a change of members.",
        ),
        Alert(
            "EverstepCorruption",
            f"sum by (run, where) (increase(everstep_corruptions_total[{s.counting_window}])) > 0",
            "0s",
            "ticket",
            "damaged bytes were found in run {{ $labels.run }} ({{ $labels.where }})",
            "They were not used, and the data was restored from intact copies.",
        ),
        Alert(
            "EverstepHostMemoryTight",
            f"everstep_host_memory_used_bytes / everstep_host_memory_bytes > {s.memory:g} "
            f"or everstep_host_shm_used_bytes / everstep_host_shm_bytes > {s.memory:g}",
            s.soon,
            "ticket",
            "memory or /dev/shm is nearly full at {{ $labels.instance }}",
            "The kernel will end a process soon, and most likely a worker.",
        ),
        Alert(
            "EverstepTargetDown",
            'up{job=~"everstep.*"} == 0',
            s.lost_after,
            "ticket",
            "no answer from {{ $labels.instance }}",
            "An agent, or the coordinator, is gone, or cannot be reached from here.",
        ),
    )


def rules(speed: Speed | None = None) -> str:
    """The rules file."""
    speed = speed or Speed()
    out = [
        "# Written by deploy/prometheus/generate.py. Every alert has a line in docs/runbook.md.",
        "groups:",
        "  - name: everstep-recordings",
        f"    interval: {speed.evaluate}",
        "    rules:",
    ]
    for recording in recordings(speed):
        out += [f"      - record: {recording.record}", "        expr: |-", f"          {recording.expression}"]
    out += ["  - name: everstep-alerts", f"    interval: {speed.evaluate}", "    rules:"]
    for alert in alerts(speed):
        out += [
            f"      - alert: {alert.name}",
            "        expr: |-",
            f"          {alert.expression}",
            f"        for: {alert.wait}",
            "        labels:",
            f"          severity: {alert.severity}",
            "        annotations:",
            f"          summary: {_quoted(alert.summary)}",
            f"          description: {_quoted(alert.about)}",
            f"          runbook_url: {_quoted(f'{RUNBOOK}#{alert.anchor}')}",
        ]
    return "\n".join(out) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def main() -> None:
    (FOLDER / "everstep.rules.yml").write_text(rules())


if __name__ == "__main__":
    main()
