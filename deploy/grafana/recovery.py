"""The dashboard of recoveries: failures, their cost, and the cost of a loss now."""

from __future__ import annotations

from .model import Dashboard, Line, Panel, Row

PROTECTION = Dashboard(
    "everstep-recovery",
    "Everstep: recoveries and protection",
    "Failures, their cost, and the cost of a loss now.",
    (
        Row(
            "Recoveries",
            (
                Panel(
                    "Recoveries by reason",
                    "Since the coordinator started.",
                    "none",
                    (Line("sum by (reason) (everstep_recoveries_total)", "{{reason}}"),),
                ),
                Panel(
                    "Time of a recovery by phase",
                    "Mean of the window: from the fault to the next commit. `detect` is the detection latency; "
                    "`recompute` is compute: the lost micro-batches and the rest of the step.",
                    "s",
                    (
                        Line(
                            "sum by (phase) (rate(everstep_recovery_phase_seconds_sum[$w])) "
                            "/ sum by (phase) (rate(everstep_recovery_phase_seconds_count[$w]) > 0)",
                            "{{phase}}",
                        ),
                    ),
                    stacked="normal",
                ),
                Panel(
                    "Time from fault to commit, by reason",
                    "",
                    "s",
                    (
                        Line(
                            "histogram_quantile(0.95, "
                            "sum by (le, reason) (rate(everstep_recovery_seconds_bucket[$w])))",
                            "{{reason}} p95",
                        ),
                    ),
                ),
                Panel(
                    "Failures by host",
                    "A host that appears here repeatedly needs attention.",
                    "none",
                    (Line("sum by (host, kind) (everstep_host_failures_total)", "{{host}} {{kind}}"),),
                ),
                Panel(
                    "Lost work",
                    "Micro-batches, and committed steps, computed again.",
                    "none",
                    (
                        Line("sum(everstep_lost_micro_batches_total)", "micro-batches"),
                        Line("sum(everstep_lost_steps_total)", "steps"),
                    ),
                    width=8,
                ),
                Panel(
                    "Lost time",
                    "Time spent on recoveries and redone steps since training began.",
                    "s",
                    (Line("sum(everstep_lost_seconds_total)", "seconds"),),
                    width=8,
                ),
                Panel(
                    "Heartbeats",
                    "The current silence of the quietest node, and the longest recent silence.",
                    "s",
                    (
                        Line("max(everstep_heartbeat_silence_seconds)", "silence"),
                        Line("max(everstep_heartbeat_gap_seconds)", "longest gap"),
                        Line("1 / sum(rate(everstep_heartbeats_total[$w]))", "mean distance of messages"),
                    ),
                    width=8,
                ),
            ),
        ),
        Row(
            "Protection",
            (
                Panel(
                    "Exposure",
                    "Steps that the loss of a node would lose. Empty where the loss of nodes is not covered.",
                    "none",
                    (
                        Line("max(everstep_exposure_steps)", "steps"),
                        Line("max(everstep_snapshot_interval_steps)", "snapshot interval"),
                        Line("min(everstep_protected_losses_nodes)", "nodes that may be lost"),
                    ),
                ),
                Panel(
                    "Age of the newest version that survives the loss of nodes",
                    "",
                    "s",
                    (Line("max(everstep_exposure_seconds)", "age"),),
                ),
                Panel(
                    "Training blocked by snapshots",
                    "Of a worker's time; the mean and the worst of all ranks.",
                    "percentunit",
                    (
                        Line("avg(rate(everstep_snapshot_blocked_seconds_total[$w]))", "mean"),
                        Line("max(rate(everstep_snapshot_blocked_seconds_total[$w]))", "worst"),
                    ),
                    width=8,
                ),
                Panel(
                    "Copy and parity throughput",
                    "Bytes a second of the thread that copies, or encodes, while it is active.",
                    "Bps",
                    (
                        Line(
                            "sum(rate(everstep_snapshot_copied_bytes_total[$w])) "
                            "/ sum(rate(everstep_snapshot_copy_seconds_total[$w]))",
                            "copy",
                        ),
                        Line(
                            "sum(rate(everstep_parity_encoded_bytes_total[$w])) "
                            "/ sum(rate(everstep_parity_encode_seconds_total[$w]))",
                            "parity",
                        ),
                    ),
                    width=8,
                ),
                Panel(
                    "Keeper memory",
                    "Of its limit.",
                    "percentunit",
                    (
                        Line(
                            "max by (instance) (everstep_keeper_memory_bytes "
                            "/ (everstep_keeper_memory_limit_bytes > 0))",
                            "{{instance}}",
                        ),
                    ),
                    width=8,
                ),
            ),
        ),
        Row(
            "Checkpoints",
            (
                Panel(
                    "Age of the newest checkpoint",
                    "Empty in a job without checkpoints.",
                    "s",
                    (Line("max(everstep_checkpoint_age_seconds)", "age"),),
                    width=8,
                ),
                Panel(
                    "Time to save",
                    "Of the part that was written last.",
                    "s",
                    (
                        Line(
                            "sum(rate(everstep_checkpoint_seconds_sum[$w])) "
                            "/ sum(rate(everstep_checkpoint_seconds_count[$w]) > 0)",
                            "mean",
                        ),
                    ),
                    width=8,
                ),
                Panel(
                    "Saved and failed",
                    "",
                    "none",
                    (
                        Line("sum(everstep_checkpoints_total)", "saved"),
                        Line("sum(everstep_checkpoint_failures_total)", "failed parts"),
                    ),
                    width=4,
                ),
                Panel("Size", "", "bytes", (Line("max(everstep_checkpoint_size_bytes)", "arrays"),), width=4),
            ),
        ),
    ),
)
