"""A loss that is not finite: all outputs of it are JSON, and a warning names it."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from pathlib import Path

from tests.jobs import HANG_S, JOBS, everstep, finish, launch
from tests.jobs.ports import free_ports
from tests.unit.test_strictjson import strictly


def test_everything_that_is_shown_is_json_and_says_so(tmp_path: Path) -> None:
    port, page = free_ports(2)
    events, trace = tmp_path / "events", tmp_path / "trace.json"
    at = f"127.0.0.1:{port}"
    flags = ["--nproc-per-node=2", f"--rdzv-endpoint={at}", f"--es-events={events}", "--es-log=json"]
    job = launch(JOBS / "diverging_job.py", [], [*flags, f"--es-coordinator-metrics=127.0.0.1:{page}"])
    try:
        deadline_s = time.monotonic() + HANG_S
        while "loss-not-finite" not in (events.read_text() if events.exists() else ""):
            assert time.monotonic() < deadline_s, "no warning of the loss"
            assert job.poll() is None
        while strictly(everstep("status", at, "--json").stdout)["view"]["loss_amiss"] is None:
            assert time.monotonic() < deadline_s, "the status does not say so"
        shown = everstep("status", at)
        assert "the loss is " in shown.stdout.partition("LOOK AT")[2], shown
        assert "the loss is " in everstep("top", at, "--once").stdout
        with urllib.request.urlopen(f"http://127.0.0.1:{page}/view.json") as answer:
            assert any("the loss is" in concern for concern in strictly(answer.read().decode())["concerns"])
        assert everstep("trace", at, "-o", str(trace)).status == 0
        strictly(trace.read_text())
        for line in everstep("events", at, "--json").stdout.splitlines():
            strictly(line)
    finally:
        os.killpg(job.pid, signal.SIGINT)
        output = finish(job)
    for line in events.read_text().splitlines():
        strictly(line)
    told = [strictly(line) for line in output.splitlines() if line.startswith("{")]
    texts = [line["text"] for line in told if line["event"] == "warning" and "the loss is" in line["text"]]
    assert texts, output
    assert len(texts) == len(set(texts)) <= 2, "once for each word"
