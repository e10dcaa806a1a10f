"""The dashboard of workers: which rank, link or machine delays the others."""

from __future__ import annotations

from .model import Dashboard, Line, Panel, Row

WORKERS = Dashboard(
    "everstep-workers",
    "Everstep: workers and hosts",
    "Which rank, link or machine delays the others.",
    (
        Row(
            "Time of a step by activity",
            (
                Panel(
                    "Compute per step",
                    "Forward and backward. A rank with a high value is itself slow; the others wait for it.",
                    "s",
                    (
                        Line(
                            'sum by (rank) (rate(everstep_worker_activity_seconds_total{activity="compute"}[$w])) '
                            "/ sum by (rank) (rate(everstep_worker_steps_total[$w]))",
                            "rank {{rank}}",
                        ),
                    ),
                ),
                Panel(
                    "Wait per step",
                    "For the first byte of others' messages. The others wait for a rank with a low value.",
                    "s",
                    (
                        Line(
                            'sum by (rank) (rate(everstep_worker_activity_seconds_total{activity="wait"}[$w])) '
                            "/ sum by (rank) (rate(everstep_worker_steps_total[$w]))",
                            "rank {{rank}}",
                        ),
                    ),
                ),
                Panel(
                    "Send and receive per step",
                    "In calls that send, and from a message's first byte to its last: both grow on a slow link.",
                    "s",
                    (
                        Line(
                            "sum by (rank, activity) (rate(everstep_worker_activity_seconds_total"
                            '{activity=~"send|receive"}[$w])) '
                            "/ on (rank) group_left sum by (rank) (rate(everstep_worker_steps_total[$w]))",
                            "rank {{rank}} {{activity}}",
                        ),
                    ),
                ),
                Panel(
                    "All ranks: seconds a second",
                    "The mean worker's time by activity; the remainder to 1 is sums, agreement and recoveries.",
                    "percentunit",
                    (
                        Line(
                            "sum by (activity) (rate(everstep_worker_activity_seconds_total[$w])) "
                            "/ scalar(count(count by (rank) (everstep_worker_steps_total)))",
                            "{{activity}}",
                        ),
                    ),
                    stacked="normal",
                ),
                Panel(
                    "Straggler: slowdown of the slowest ranks",
                    "Own compute for a micro-batch over the median of the stage.",
                    "none",
                    (
                        Line("everstep_straggler_slowdown_ratio", "rank {{rank}}"),
                        Line("sum(everstep_straggler_ranks)", "stragglers"),
                        Line("sum(everstep_quarantined_nodes)", "nodes in quarantine"),
                    ),
                ),
                Panel(
                    "Longest micro-batch of the last step",
                    "",
                    "s",
                    (Line("max by (rank) (everstep_worker_longest_micro_batch_seconds)", "rank {{rank}}"),),
                ),
                Panel(
                    "Traffic between workers",
                    "",
                    "Bps",
                    (
                        Line("sum by (rank) (rate(everstep_worker_sent_bytes_total[$w]))", "rank {{rank}} sent"),
                        Line(
                            "-sum by (rank) (rate(everstep_worker_received_bytes_total[$w]))", "rank {{rank}} received"
                        ),
                    ),
                ),
                Panel(
                    "Time in recoveries",
                    "Of each worker's time.",
                    "percentunit",
                    (Line("sum by (rank) (rate(everstep_worker_recovering_seconds_total[$w]))", "rank {{rank}}"),),
                ),
            ),
        ),
        Row(
            "Hosts",
            (
                Panel(
                    "CPU", "Of all cores.", "percentunit", (Line("everstep_host_cpu_ratio", "{{instance}}"),), width=8
                ),
                Panel(
                    "Memory and /dev/shm",
                    "In use, of what there is.",
                    "percentunit",
                    (
                        Line("everstep_host_memory_used_bytes / everstep_host_memory_bytes", "{{instance}} memory"),
                        Line("everstep_host_shm_used_bytes / everstep_host_shm_bytes", "{{instance}} /dev/shm"),
                    ),
                    width=8,
                ),
                Panel(
                    "Disk",
                    "In use, of the disks with the working directory and the temporary files.",
                    "percentunit",
                    (Line("everstep_host_disk_used_bytes / everstep_host_disk_bytes", "{{instance}} {{place}}"),),
                    width=8,
                ),
                Panel(
                    "Network",
                    "All interfaces but loopback.",
                    "Bps",
                    (
                        Line("rate(everstep_host_network_sent_bytes_total[$w])", "{{instance}} sent"),
                        Line("-rate(everstep_host_network_received_bytes_total[$w])", "{{instance}} received"),
                    ),
                    width=8,
                ),
                Panel("Load", "One-minute average.", "none", (Line("everstep_host_load", "{{instance}}"),), width=8),
                Panel(
                    "Telemetry that was missed",
                    "Spans overwritten before the agent read them, and steps left out of its messages.",
                    "none",
                    (
                        Line("sum(everstep_telemetry_missed_spans_total)", "spans"),
                        Line("sum(everstep_telemetry_left_out_steps_total)", "steps"),
                    ),
                    width=8,
                ),
            ),
        ),
        Row(
            "GPUs",
            (
                Panel(
                    "GPU busy", "", "percentunit", (Line("everstep_gpu_busy_ratio", "{{instance}} {{gpu}}"),), width=8
                ),
                Panel(
                    "GPU memory",
                    "In use, of what there is.",
                    "percentunit",
                    (Line("everstep_gpu_memory_used_bytes / everstep_gpu_memory_bytes", "{{instance}} {{gpu}}"),),
                    width=8,
                ),
                Panel(
                    "GPU power and temperature",
                    "Watts, degrees Celsius.",
                    "none",
                    (
                        Line("everstep_gpu_power_watts", "{{instance}} {{gpu}} W"),
                        Line("everstep_gpu_temperature_celsius", "{{instance}} {{gpu}} °C"),
                    ),
                    width=8,
                ),
            ),
        ),
    ),
)
