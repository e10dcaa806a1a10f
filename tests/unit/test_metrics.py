"""Metrics, dashboards, rules and docs name the same things, and the checked-in files match their generators."""

from __future__ import annotations

import base64
import json
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as text_format

from deploy.grafana import generate as grafana
from deploy.grafana import model
from deploy.prometheus import generate as prometheus
from everstep.agents.monitoring.metrics import JobMetrics, NodeMetrics
from everstep.agents.monitoring.pages import (
    AddressTaken,
    Negotiated,
    Page,
    PageServer,
)
from everstep.comms.base.security import Security

ROOT = Path(__file__).parents[2]
LABELS = {
    *("run", "version", "node", "phase", "reason", "stage", "host", "kind", "where"),
    *("rank", "activity", "place", "gpu", "signs"),
}
UNITS = (
    *("seconds", "bytes", "ratio", "info", "steps", "ranks", "nodes", "layers", "watts", "celsius", "copies", "spans"),
    *("samples", "tokens", "micro_batches", "versions", "recoveries", "failures", "restarts", "corruptions"),
    *("checkpoints", "heartbeats", "links", "found", "kills", "loss", "load", "phase", "generation", "decides"),
)
_NAME = re.compile(r"\beverstep_[a-z_]+")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPEN_METRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


def registries() -> tuple[JobMetrics, NodeMetrics]:
    return JobMetrics("job"), NodeMetrics("job", "node")


def series() -> set[str]:
    """Every name that an expression may use."""
    found: set[str] = set()
    for metrics in registries():
        for metric in metrics.registry.collect():
            ends = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(metric.type, [""])
            found |= {metric.name + end for end in ends}
    return found


def test_docs_have_a_line_for_each_metric_and_no_other() -> None:
    lines = re.findall(r"^\| `(everstep_[a-z_]+)` \| (\w+) \|", (ROOT / "docs" / "metrics.md").read_text(), re.M)
    names = [name for metrics in registries() for name in metrics.names()]
    assert sorted(name for name, _ in lines) == sorted(names)
    assert len(set(names)) == len(names)
    kinds = {
        m.name + ("_total" if m.type == "counter" else ""): m.type for r in registries() for m in r.registry.collect()
    }
    assert dict(lines) == kinds


def test_names_and_labels_follow_the_rules() -> None:
    for metrics in registries():
        for metric in metrics.registry.collect():
            assert metric.name.startswith("everstep_")
            assert metric.name.endswith(UNITS), metric.name
            assert metric.documentation
        for collector in metrics.registry._collector_to_names:
            assert set(collector._labelnames) <= LABELS, collector


def test_a_page_is_what_prometheus_reads() -> None:
    job, node = registries()
    job.recoveries.labels("node_lost").inc()
    assert b'everstep_recoveries_total{reason="node_lost"} 1.0\n' in job.page()
    assert b"_created" not in job.page() + node.page()


@pytest.mark.parametrize("dashboard", grafana.DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_dashboards_are_what_the_code_generates(dashboard) -> None:
    path = grafana.FOLDER / f"{dashboard.uid}.json"
    assert path.read_text() == model.text(dashboard), "run python -m deploy.grafana.generate"
    shown = json.loads(path.read_text())
    places = [panel["gridPos"] for panel in shown["panels"]]
    assert len({panel["id"] for panel in shown["panels"]}) == len(places)
    taken = {(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])}
    assert len(taken) == sum(p["w"] * p["h"] for p in places), "panels overlap"
    for panel in shown["panels"]:
        for target in panel.get("targets", []):
            assert set(_NAME.findall(target["expr"])) <= series(), target["expr"]
            assert target["expr"].count('run=~"$run"') == len(_NAME.findall(target["expr"]))


def test_rules_are_what_the_code_generates() -> None:
    assert (prometheus.FOLDER / "everstep.rules.yml").read_text() == prometheus.rules(), (
        "run python -m deploy.prometheus.generate"
    )
    speed = prometheus.Speed()
    recorded = {recording.record for recording in prometheus.recordings(speed)}
    for rule in (*prometheus.recordings(speed), *prometheus.alerts(speed)):
        assert set(_NAME.findall(re.sub(r"everstep:[a-z_:]+", "", rule.expression))) <= series(), rule
        assert set(re.findall(r"everstep:[a-z_:]+", rule.expression)) <= recorded, rule


def test_every_alert_has_a_place_in_the_runbook() -> None:
    headings = re.findall(r"^## (\w+)$", (ROOT / "docs" / "runbook.md").read_text(), re.M)
    assert sorted(headings) == sorted(alert.name for alert in prometheus.alerts(prometheus.Speed()))
    assert [alert.anchor for alert in prometheus.alerts(prometheus.Speed())] == [
        alert.name.lower() for alert in prometheus.alerts(prometheus.Speed())
    ]


def test_counters_go_on_when_a_worker_is_replaced() -> None:
    from everstep.agents.analysis.step_times import Totals

    metrics = NodeMetrics("job", "node")
    first, second = Totals(), Totals()
    first.steps = 10
    metrics.worker(3, first, [])
    metrics.worker_ended(3)
    second.steps = 12
    metrics.worker(3, second, [])
    metrics.worker(3, second, [])
    assert b'everstep_worker_steps_total{rank="3"} 22.0\n' in metrics.page()


def fetched(url: str, **headers: str) -> tuple[int, str, Mapping[str, str]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), error.headers


def test_pages_are_for_who_has_the_token() -> None:
    """As Prometheus presents it, and as a browser does after it has asked its user."""
    server = PageServer("127.0.0.1:0", {"/": lambda: Page(CONTENT_TYPE, b"there\n")}, Security(token="söcret"))

    def basic(text: str) -> str:
        return f"Basic {base64.b64encode(text.encode()).decode()}"

    try:
        for shown in ("Bearer s\xc3\xb6cret", basic("me:söcret"), basic(":söcret")):
            assert fetched(server.url, Authorization=shown)[:2] == (200, "there\n")
        strange = (
            "",
            "Bearer",
            "Bearer ",
            "Bearer other",
            basic("söcret:me"),
            basic("söcret"),
            "Basic !",
            "Basic /w==",
        )
        for shown in (*strange, "söcret".encode().decode("latin-1"), "Digest söcret"):
            status, text, headers = fetched(server.url, Authorization=shown)
            assert (status, "token" in text) == (401, True)
            assert headers["WWW-Authenticate"].startswith("Basic realm=")
    finally:
        server.close()


def posted(url: str, body: bytes, **headers: str) -> tuple[int, str]:
    shown = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=body, headers=shown), timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_orders_are_taken_from_who_has_the_token() -> None:
    """And not from a page of another origin, whose requests a browser would show the token with."""
    taken: list[bytes] = []

    def take(body: bytes) -> tuple[int, str]:
        taken.append(body)
        return 409, "the job is about to end"

    right = {"Authorization": "Bearer secret", "X_Everstep_Order": "1"}
    server = PageServer("127.0.0.1:0", {}, Security(token="secret"), {"/order": take})
    url = f"{server.url}/order"
    try:
        assert posted(url, b"{}", **right) == (409, "the job is about to end\n")
        assert posted(url, b"{}", X_Everstep_Order="1")[0] == 401
        assert posted(url, b"{}", Authorization="Bearer secret")[0] == 403
        assert posted(url, b"{}", **right, Host="example.org")[0] == 421
        assert posted(f"{server.url}/", b"{}", **right)[0] == 404
        assert posted(url, b" " * 5000, **right)[0] == 413
        assert fetched(url, Authorization="Bearer secret")[0] == 404
        assert taken == [b"{}"]
    finally:
        server.close()


def test_no_orders_without_a_token() -> None:
    server = PageServer("127.0.0.1:0", {}, Security(), {"/order": lambda body: (200, "done")})
    try:
        status, text = posted(f"{server.url}/order", b"{}", X_Everstep_Order="1")
        assert (status, "EVERSTEP_JOB_TOKEN" in text) == (403, True)
    finally:
        server.close()


def test_a_name_that_somebody_gave_to_loopback_is_not_answered() -> None:
    """Otherwise another page could read ours in the user's browser, under its own name for our address."""
    server = PageServer("127.0.0.1:0", {"/": lambda: Page(CONTENT_TYPE, b"there\n")}, Security())
    try:
        for host in ("localhost:80", "127.0.0.1", "[::1]:80", "LOCALHOST", ""):
            assert fetched(server.url, Host=host)[0] == 200, host
        for host in ("example.org", "localhost.example.org:80", "[", "127.0.0.1.example.org", "a b"):
            assert fetched(server.url, Host=host)[0] == 421, host
    finally:
        server.close()


def test_pages_are_served_and_others_are_not() -> None:
    server = PageServer("127.0.0.1:0", {"/metrics": lambda: Page(CONTENT_TYPE, b"there\n")}, Security())
    try:
        with urllib.request.urlopen(f"{server.url}/metrics?x=1", timeout=5) as answer:
            assert (answer.read(), answer.headers["Content-Type"]) == (b"there\n", CONTENT_TYPE)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{server.url}/other", timeout=5)
        with pytest.raises(AddressTaken, match="in use"):
            PageServer(server.address, {}, Security())
    finally:
        server.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2])), timeout=5)


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1", "127.0.0.1:http", "127.0.0.1:99999", "192.0.2.1:9400"])
def test_an_address_that_cannot_be_served_is_an_error(address: str) -> None:
    with pytest.raises(AddressTaken):
        PageServer(address, {}, Security())


@pytest.mark.parametrize("module", ["agents.monitoring.observer", "agents.monitoring.metrics", "agents.node.gatherer"])
def test_what_observes_never_imports_torch(module: str) -> None:
    check = f"import sys, everstep.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", CONTENT_TYPE),
        ("*/*", CONTENT_TYPE),
        ("text/html,application/xml;q=0.9", CONTENT_TYPE),
        ("application/openmetrics-text", OPEN_METRICS),
        ("application/openmetrics-text; version=1.0.0; charset=utf-8,text/plain;q=0.5", OPEN_METRICS),
    ],
)
def test_metrics_come_in_the_form_that_is_asked_for(accept: str, content_type: str) -> None:
    job = JobMetrics("run")
    server = PageServer("127.0.0.1:0", {"/metrics": Negotiated(job.answer)}, Security())
    try:
        status, text, headers = fetched(f"{server.url}/metrics", **({"Accept": accept} if accept else {}))
        assert (status, headers["Vary"]) == (200, "Accept")
        assert headers["Content-Type"].startswith(content_type.partition("; charset")[0])
        assert text.endswith("# EOF\n") == (content_type == OPEN_METRICS)
        parse = open_metrics if content_type == OPEN_METRICS else text_format
        assert {family.name for family in parse(text)} >= {"everstep_steps", "everstep_loss"}
    finally:
        server.close()
