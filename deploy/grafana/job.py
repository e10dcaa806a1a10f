"""The dashboard of a job: whether it trains, its speed, and its losses."""

from __future__ import annotations

from .model import Dashboard, Line, Panel, Row, quantiles, stat

JOB = Dashboard(
    "everstep-job",
    "Everstep: the job",
    "Whether the job trains, its speed, and its losses.",
    (
        Row(
            "Now",
            (
                stat("Steps committed", "", "none", "max(everstep_committed_steps)"),
                stat("Loss", "Mean loss of the last committed step.", "none", "max(everstep_loss)"),
                stat(
                    "Goodput",
                    "Share of the time since training began that was spent on steps that were kept.",
                    "percentunit",
                    "min(everstep_goodput_ratio)",
                    ("red", None),
                    ("orange", 0.8),
                    ("green", 0.95),
                ),
                stat("World size", "Workers that train.", "none", "sum(everstep_world_size_ranks)"),
                stat("Generation", "Rises by one with every change of members.", "none", "max(everstep_generation)"),
                stat(
                    "Since the last commit",
                    "Rises while the job makes no progress.",
                    "s",
                    "max(everstep_commit_age_seconds)",
                ),
            ),
        ),
        Row(
            "Progress",
            (
                Panel("Step time", "From commit to commit.", "s", quantiles("everstep_step_seconds")),
                Panel(
                    "Loss",
                    "Of every committed step, at the scrape interval.",
                    "none",
                    (Line("everstep_loss", "loss"),),
                ),
                Panel(
                    "Throughput: tokens",
                    "Only where the inputs are text.",
                    "none",
                    (Line("sum(rate(everstep_tokens_total[$w]))", "tokens/s"),),
                ),
                Panel(
                    "Throughput: samples",
                    "Samples in committed steps.",
                    "none",
                    (Line("sum(rate(everstep_samples_total[$w]))", "samples/s"),),
                ),
                Panel(
                    "Goodput over the window",
                    "Share of the time spent on steps that were kept, and on recoveries.",
                    "percentunit",
                    (
                        Line(
                            "sum(rate(everstep_productive_seconds_total[$w])) "
                            "/ sum(rate(everstep_training_seconds_total[$w]))",
                            "goodput",
                        ),
                        Line(
                            "sum(rate(everstep_lost_seconds_total[$w])) "
                            "/ sum(rate(everstep_training_seconds_total[$w]))",
                            "lost",
                        ),
                    ),
                ),
                Panel(
                    "Phase of the job",
                    "1 for the current phase.",
                    "none",
                    (Line("max by (phase) (everstep_job_phase)", "{{phase}}"),),
                    stacked="normal",
                ),
            ),
        ),
        Row(
            "Layout",
            (
                Panel(
                    "Workers by stage",
                    "",
                    "none",
                    (Line("sum by (stage) (everstep_stage_ranks)", "stage {{stage}}"),),
                    stacked="normal",
                ),
                Panel(
                    "Layers by stage",
                    "",
                    "none",
                    (Line("sum by (stage) (everstep_stage_layers)", "stage {{stage}}"),),
                    stacked="normal",
                ),
            ),
        ),
    ),
)
