"""A real Prometheus watches a real job while workers and a node are killed: panels have data, alerts fire."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from pathlib import Path

import pytest

from deploy.grafana.generate import DASHBOARDS
from deploy.prometheus.generate import Speed, alerts, recordings, rules
from tests.jobs import JOBS, everstep
from tests.jobs.watched import CONFIGURATIONS, FAST, STEPS, WatchedJob, needs_prometheus, watched

WINDOW = "10s"
WITHOUT_GPU = "everstep_gpu_"  # no value exists without a GPU; the names are checked elsewhere
NOT_FIRING: set[str] = set()


def promtool(*arguments: str | Path) -> str:
    """Run promtool; returns its output, and fails if it does."""
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_prometheus
def test_rules_are_right(tmp_path: Path) -> None:
    promtool("check", "rules", CONFIGURATIONS / "everstep.rules.yml")
    promtool("test", "rules", CONFIGURATIONS / "everstep.rules.test.yml")
    fast = tmp_path / "fast.yml"
    fast.write_text(rules(FAST))
    promtool("check", "rules", fast)


@needs_prometheus
@pytest.mark.parametrize("kind", ["static", "file", "http", "kubernetes", "secure"])
def test_configurations_are_right(kind: str, tmp_path: Path) -> None:
    text = (CONFIGURATIONS / f"prometheus.{kind}.yml").read_text()
    if kind == "kubernetes":  # Debian's promtool is built without it: what it finds is taken as given
        text = re.sub(r"    kubernetes_sd_configs:\n(?:      .*\n)+", "    static_configs: []\n", text)
        assert "relabel_configs" in text
    for name in re.findall(r"/etc/prometheus/(certs/\w+\.pem|token)", text):  # it looks whether they are there
        text = text.replace(f"/etc/prometheus/{name}", str(tmp_path / name))
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "prometheus.yml").write_text(text)
    (tmp_path / "everstep.rules.yml").write_text(rules())
    promtool("check", "config", tmp_path / "prometheus.yml")


@pytest.mark.soak
@needs_prometheus
def test_a_job_is_watched_through_its_failures(tmp_path: Path) -> None:
    with watched(tmp_path) as job:
        job.history()
        time.sleep(1.5)  # the last of it is scraped
        _every_panel_has_data(job)
        _every_recording_has_data(job)
        wanted = {alert.name for alert in alerts(Speed())}
        assert job.prometheus.fired() == wanted - NOT_FIRING
        _numbers_are_those_of_the_log(job)


def _every_panel_has_data(job: WatchedJob) -> None:
    empty = []
    for dashboard in DASHBOARDS:
        for panel in dashboard.panels():
            for line in panel.lines:
                if WITHOUT_GPU in line.expression:
                    continue
                if not _has_data(job, line.prometheus("watched", WINDOW)):
                    empty.append((dashboard.title, panel.title, line.expression))
    assert not empty


def _every_recording_has_data(job: WatchedJob) -> None:
    assert [r.record for r in recordings(FAST) if not _has_data(job, r.record)] == []


def _has_data(job: WatchedJob, expression: str) -> bool:
    found = job.prometheus.series(expression, job.started_s, time.time())
    return any(value != "NaN" for series in found for _, value in series["values"])


def _numbers_are_those_of_the_log(job: WatchedJob) -> None:
    """The counters agree with the events, which tests elsewhere compare with what happened."""
    value = job.prometheus.value
    recovered = job.events("recovered")
    assert value("sum(everstep_recoveries_total)") == len(recovered)
    assert value('everstep_recoveries_total{reason="node_lost"}') == 1
    assert (value('everstep_recoveries_total{reason="corruption"}') or 0) >= 1
    assert value('sum(everstep_host_failures_total{kind="worker_died"})') == len(job.events("worker_died"))
    redone = sum(event["redone_micro_batches"] for event in recovered)
    assert value("everstep_lost_micro_batches_total") == redone
    assert value("everstep_planned_steps") == STEPS
    assert value("everstep_world_size_ranks") == 2
    assert value("everstep_checkpoints_total") == len(job.events("checkpoint_saved"))
    assert (value("everstep_checkpoint_size_bytes") or 0) > 10_000
    goodput = value("everstep_goodput_ratio")
    assert goodput is not None
    assert 0.1 < goodput < 1
    batch, context = 16, 32
    tokens, samples = value("everstep_tokens_total"), value("everstep_samples_total")
    assert tokens == context * (samples or 0)
    assert (samples or 0) % batch == 0


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flag in ("--es-metrics", "--es-coordinator-metrics"):
            ended = everstep("run", "--nproc-per-node=1", f"{flag}=127.0.0.1:{port}", str(JOBS / "gpt_job.py"), "{}")
            assert ended.status == 2, ended
            assert f"{flag} 127.0.0.1:{port}: Address already in use" in ended.error()
    ended = everstep("run", "--es-metrics=nowhere", str(JOBS / "gpt_job.py"), "{}")
    assert (ended.status, "not HOST:PORT" in ended.error()) == (2, True)
