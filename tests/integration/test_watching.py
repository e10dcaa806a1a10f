"""A job is watched while a worker and the coordinator are killed: status, top, events, a trace, a page in a browser."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import ssl
import subprocess
import sys
import termios
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from everstep.agents.launch.certs import make
from everstep.comms.base.process import die_with_parent
from everstep.elastic.contract.faults import COORDINATOR
from everstep.elastic.contract.telemetry import Spent
from tests.jobs import JOBS, everstep, launch, wait_until
from tests.jobs.browser import browser, needs_chromium
from tests.jobs.ports import free_ports
from tests.jobs.processes import disk_full, named
from tests.jobs.watched import CONFIGURATIONS, Prometheus, needs_prometheus

STEPS = 100_000  # more than the test has time for


class Job:
    """Some nodes of two workers each, and their standard error."""

    def __init__(self, out: Path, nodes: int, token: str = "") -> None:
        self.out = out
        self._environment = {"EVERSTEP_JOB_TOKEN": token}
        port, page = free_ports(2)
        self.endpoint, self.page = f"127.0.0.1:{port}", f"http://127.0.0.1:{page}"
        self.launchers: list[subprocess.Popen[str]] = []
        self.said: list[str] = []
        self._readers: list[threading.Thread] = []
        self._arguments = [json.dumps({"out": str(out), "steps": STEPS, "stages": 2})]
        self._flags = [
            *(f"--nnodes={nodes}", "--nproc-per-node=2", f"--rdzv-endpoint={self.endpoint}", "--rdzv-id=watched"),
            *(f"--es-events={out}/events.jsonl", "--es-snapshot-every=1", f"--log-dir={out}/logs"),
            *(f"--es-coordinator-metrics=127.0.0.1:{page}", "--es-log=json"),
            "--es-rebalance-after=0",  # the layout stays the one that the lines are compared with
        ]

    def start(self, nodes: int) -> None:
        for _ in range(nodes):
            launcher = launch(JOBS / "gpt_job.py", self._arguments, self._flags, self._environment, forked=True)
            self.launchers.append(launcher)
            self._readers.append(threading.Thread(target=self._read, args=(launcher.stdout,), daemon=True))
            self._readers[-1].start()
            wait_until(self.coordinators, 30, "the first node has the coordinator")

    def _read(self, stream: Any) -> None:
        self.said.extend(stream)

    def coordinators(self) -> list[psutil.Process]:
        return named(psutil.Process(self.launchers[0].pid).children(), COORDINATOR)

    def events(self, name: str) -> list[dict[str, Any]]:
        path = self.out / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for line in lines if (event := json.loads(line))["event"] == name]

    def await_steps(self, more: int) -> None:
        goal = len(self.events("committed")) + more
        wait_until(lambda: len(self.events("committed")) >= goal, 60, f"{goal} steps")

    def lose_a_worker(self, rank: int) -> None:
        """Kill one, and wait until its rank is replaced."""
        joined = len(self.events("joined"))
        self.kill(rank)
        with self.explained():
            wait_until(lambda: len(self.events("joined")) > joined, 30, "the rank is back")

    def kill(self, rank: int) -> None:
        newest = max(self.out.glob(f"worker-{rank}-*.jsonl"), key=lambda path: path.stat().st_mtime)
        os.kill(int(newest.stem.split("-")[2]), signal.SIGKILL)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        try:
            yield
        except AssertionError as error:
            said = "".join(line[:400] for line in self.said[-12:])
            raise AssertionError(f"{error}: {self.events('committed')[-1:]}\n{said}") from None

    def close(self) -> None:
        for launcher in self.launchers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
        for launcher, reader in zip(self.launchers, self._readers, strict=True):
            reader.join(timeout=10)
            if launcher.stdout:
                launcher.stdout.close()


@contextlib.contextmanager
def job(out: Path, nodes: int, token: str = "") -> Iterator[Job]:
    found = Job(out, nodes, token)
    try:
        found.start(nodes)
        with found.explained():
            found.await_steps(12)
        yield found
    finally:
        found.close()


@pytest.mark.soak
def test_a_job_is_watched_from_a_terminal(tmp_path: Path) -> None:
    with job(tmp_path, 2) as found:
        found.lose_a_worker(3)
        found.await_steps(3)
        _the_trace_has_the_recovery(found, tmp_path)
        time.sleep(1.2)  # agents tell once a second
        _status_is_one_screen(found)
        _the_story_is_told(found)
        _http_answers(found)
        _nothing_can_be_decided(found)
        _top_goes_on_while_the_coordinator_is_away(found)
        found.await_steps(15)
        _the_trace_adds_up(found, tmp_path)


def _status_is_one_screen(job: Job) -> None:
    shown = everstep("status", job.endpoint)
    assert (shown.status, shown.stderr) == (0, "")
    lines = shown.stdout.splitlines()
    assert len(lines) < 45
    assert re.match(r"watched: running, for \d.* 4 ranks in 2 stages, generation 3", lines[0])
    for text in ("of 100,000", "loss ", "a step", "samples/s", "tokens/s", "goodput", "to go"):
        assert text in lines[1], text
    for pattern in (
        r"stage 0: layers 0-2, ranks 0-1: compute ",
        r"ranks \d-\d +CPU \d+% +memory \d+% +keeper [\d.]+ MiB of .* well",
        r"a lost node would cost up to \d+ step",
        r"checkpoint: none so far",
        r"s ago, in step \d+, rank 3: killed by SIGKILL",
        r"detect .*, abort .*, agree .*, edit .*, restore .*, recompute .*; \d+ micro-batch.* computed again",
        r"warning worker of rank 3 killed by SIGKILL",
    ):
        assert re.search(pattern, shown.stdout), (pattern, shown.stdout)
    found = json.loads(everstep("status", job.endpoint, "--json").stdout)
    assert {"job", "phase", "generation", "committed_step", "steps", "layout", "nodes", "workers"} <= found.keys()
    assert found["workers"] == {str(rank): "member" for rank in range(4)}
    assert [recovery["ranks"] for recovery in found["view"]["recoveries"]] == [[3]]
    assert all(worker["steps"] for worker in found["view"]["workers"])
    once = everstep("top", job.endpoint, "--once", environment={"COLUMNS": "120"})
    assert (once.status, once.stderr) == (0, "")
    assert re.search(r"loss [▁-█ ]{8}", once.stdout)
    assert re.search(r"worker_died [\d.]+ m?s █{4}", once.stdout)
    assert len(re.findall(r"■ \d [\d.]+ m?s", once.stdout)) == 4


def _the_story_is_told(job: Job) -> None:
    """By the coordinator, by its log and by the file of events: the same, sparse, in order."""
    told = everstep("events", job.endpoint).stdout.splitlines()
    names = [line.split()[2].rstrip(":") for line in told]
    story = [name for name in names if name in ("worker_died", "planned", "recovered", "joined")]
    assert [name for name in story if name != "joined"] == ["worker_died", "planned", "recovered"]
    assert story.count("joined") == 1, "with the plan, if it was ready by then, or after it"
    assert len(told) < 15, "no line is of a step"
    assert re.search(
        r"warning worker_died rank=3 step=\d+ node=\S+: worker of rank 3 killed by SIGKILL", "\n".join(told)
    )
    by_file = everstep("events", str(job.out / "events.jsonl")).stdout.splitlines()
    by_file = by_file[: len(told)]  # the job runs on: the file, which is read later, may have more
    assert [line.split(" ", 1)[1] for line in by_file] == [line.split(" ", 1)[1] for line in told]
    logged = [json.loads(line) for line in job.said if line.startswith("{")]
    assert [line["event"] for line in logged[: len(names)]] == names
    (recovered,) = [line for line in logged if line["event"] == "recovered"]
    assert (recovered["ranks"], recovered["generation"], recovered["grade"]) == ([3], 2, "warning")
    assert recovered["step"] >= recovered["interrupted_step"]
    assert abs(recovered["unix_s"] - time.time()) < 60
    as_json = [json.loads(line) for line in everstep("events", job.endpoint, "--json").stdout.splitlines()]
    assert [line["event"] for line in as_json] == names


def _http_answers(job: Job) -> None:
    with urllib.request.urlopen(job.page + "/", timeout=10) as answer:
        policy, text = answer.headers["Content-Security-Policy"], answer.read().decode()
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"(src|href)=[\"']?(https?:)?//|@import|url\(", text), "nothing comes from elsewhere"
    with urllib.request.urlopen(job.page + "/view.json", timeout=10) as answer:
        view = json.load(answer)
    assert (view["phase"], len(view["workers"]), len(view["recoveries"])) == ("running", 4, 1)
    assert view["orders"] is False
    for path, status in (("/", "404"), ("/order", "403")):  # a job without a token takes no orders here
        headers = {"X-Everstep-Order": "1"}
        request = urllib.request.Request(job.page + path, data=b'{"drain": {"node": "x"}}', headers=headers)
        with pytest.raises(urllib.error.HTTPError, match=status) as refused:
            urllib.request.urlopen(request, timeout=10)
        refused.value.close()


# ---------------------------------------------------------------- top


class Terminal:
    """`everstep top` in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.leader, self.follower = pty.openpty()
        termios.tcsetwinsize(self.follower, (45, 120))
        self.before = termios.tcgetattr(self.follower)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "everstep", "top", *arguments],
            stdin=self.follower,
            stdout=self.follower,
            stderr=self.follower,
            env={**os.environ, "TERM": "xterm-256color", "PYTHONWARNINGS": "ignore"},
            start_new_session=True,
            preexec_fn=self._take,
        )
        self.output = ""

    def _take(self) -> None:
        die_with_parent()
        fcntl.ioctl(self.follower, termios.TIOCSCTTY, 0)  # Ctrl-C is a signal to the processes of the terminal

    def until(self, pattern: str, timeout_s: float = 20.0) -> None:
        """Read until it shows something that it has not shown before."""
        seen, deadline = len(self.output), time.monotonic() + timeout_s
        while not re.search(pattern, self.output[seen:]):
            assert time.monotonic() < deadline, (pattern, self.output[-3000:])
            self._read(0.2)

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self.leader], [], [], timeout_s)[0]:
            return False
        self.output += os.read(self.leader, 1 << 16).decode(errors="replace")
        return True

    def end(self, key: str) -> int:
        """Press a key, and see that the terminal is as it was."""
        os.write(self.leader, key.encode())
        deadline = time.monotonic() + 10
        while self.process.poll() is None and time.monotonic() < deadline:
            self._read(0.05)
        while self._read(0.05):
            pass
        status = self.process.wait(timeout=20)
        assert termios.tcgetattr(self.follower) == self.before
        assert "\x1b[?1049l" in self.output[-400:], "the alternate screen is left"
        assert "\x1b[?25h" in self.output[-400:], "the cursor is back"
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.leader)
        os.close(self.follower)


def _nothing_can_be_decided(job: Job) -> None:
    """While the coordinator's disk is full; the loss of a worker meanwhile is handled afterwards."""
    (coordinator,) = job.coordinators()
    with disk_full(coordinator):
        joined = len(job.events("joined"))
        job.kill(2)
        text = "nothing can be decided: "
        wait_until(lambda: text in everstep("status", job.endpoint).stdout, 20, "status says so")
        assert re.search(rf"{text}.*(disk I/O error|disk is full)", everstep("status", job.endpoint).stdout)
        assert len(job.events("joined")) == joined
    with job.explained():
        wait_until(lambda: len(job.events("joined")) > joined, 30, "the rank is back")
    assert text not in everstep("status", job.endpoint).stdout
    assert job.coordinators() == [coordinator]


def _top_goes_on_while_the_coordinator_is_away(job: Job) -> None:
    (unused,) = free_ports(1)
    with contextlib.closing(Terminal(f"127.0.0.1:{unused},{job.endpoint}", "--interval=0.2")) as terminal:
        terminal.until(r"watched: running")
        (coordinator,) = job.coordinators()
        coordinator.send_signal(signal.SIGSTOP)
        terminal.until(r"no coordinator for \d+ s \(training continues without it")
        coordinator.send_signal(signal.SIGKILL)
        wait_until(lambda: job.coordinators() not in ([], [coordinator]), 20, "there is another coordinator")
        terminal.until(r"a coordinator took over")
        assert terminal.end("q") == 0
    with contextlib.closing(Terminal(job.endpoint)) as terminal:
        terminal.until(r"watched: (running|recovering)")
        assert terminal.end("\x03") == 130


# ---------------------------------------------------------------- traces


def _trace(job: Job, path: Path, steps: int) -> dict[str, Any]:
    done = everstep("trace", job.endpoint, "-o", str(path), f"--steps={steps}")
    assert (done.status, done.stderr) == (0, ""), done
    assert re.search(r"of 4 ranks on 2 nodes, [\d,]+ spans", done.stdout)
    trace: dict[str, Any] = json.loads(path.read_text())
    _is_valid(trace)
    return trace


def _is_valid(trace: dict[str, Any]) -> None:
    """As the format says; and the slices of each thread nest."""
    threads: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    arrows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        assert {"ph", "name", "pid", "tid", "ts"} <= event.keys() or event["ph"] == "M", event
        assert event["ts"] >= 0, event
        if event["ph"] == "X":
            assert event["dur"] >= 0
            threads[event["pid"], event["tid"]].append(event)
        elif event["ph"] in "sf":
            arrows[event["id"]].append(event)
        else:
            assert event["ph"] in "MCi", event
    for events in threads.values():
        open_ends: list[float] = []
        for event in sorted(events, key=lambda one: (one["ts"], -one["dur"])):
            while open_ends and open_ends[-1] <= event["ts"] + 1e-3:
                open_ends.pop()
            assert not open_ends or event["ts"] + event["dur"] <= open_ends[-1] + 1e-2, event
            open_ends.append(event["ts"] + event["dur"])
    assert arrows
    for ends in arrows.values():
        assert sorted(end["ph"] for end in ends) == ["f", "s"]
    named = {(e["pid"], e["tid"]) for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert threads.keys() <= named


def _slices(trace: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def _names(trace: dict[str, Any], kind: str) -> set[str]:
    return {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == kind}


def _the_trace_has_the_recovery(job: Job, folder: Path) -> None:
    trace = _trace(job, folder / "recovery.json", 30)
    names = {event["name"].split()[0] for event in _slices(trace)}
    kinds = {kind.name.lower() for kind in Spent} - {"compute"}  # that of the user's own loop
    assert kinds <= names
    assert {"recovery:", "detect", "abort", "agree", "edit", "restore", "recompute"} <= names
    assert {f"rank {rank}" for rank in range(4)} <= _names(trace, "thread_name")
    assert len(_names(trace, "process_name")) == 3
    recoveries = [event for event in _slices(trace) if event["name"] == "recover"]
    assert {event["tid"] // 16 for event in recoveries} >= {0, 1, 2}
    marks = [event["name"] for event in trace["traceEvents"] if event["ph"] == "i"]
    assert "worker_died" in marks


def _the_trace_adds_up(job: Job, folder: Path) -> None:
    """Undisturbed steps consist of their spans: those directly in a step make up most of it, and never more."""
    trace = _trace(job, folder / "steps.json", 8)
    steps = [event for event in _slices(trace) if event["name"].startswith("step ") and event["pid"] > 0]
    ranks = {event["tid"] // 16 for event in steps}
    assert ranks == {0, 1, 2, 3}
    shares = []
    for step in steps:
        end = step["ts"] + step["dur"]
        inside = [
            e
            for e in _slices(trace)
            if (e["pid"], e["tid"]) == (step["pid"], step["tid"])
            and e is not step
            and step["ts"] <= e["ts"] < end
            and e["args"]["step"] in (step["args"]["step"], step["args"]["step"] - 1)
        ]
        covered, until = 0.0, step["ts"]
        for event in sorted(inside, key=lambda one: one["ts"]):
            covered += max(0.0, event["ts"] + event["dur"] - max(until, event["ts"]))
            until = max(until, event["ts"] + event["dur"])
        shares.append(covered / step["dur"])
    assert max(shares) <= 1.001
    assert sorted(shares)[len(shares) // 2] > 0.5, shares


# ---------------------------------------------------------------- the page


@pytest.mark.soak
@needs_chromium
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """Of a job with a token, which a browser shows as a password."""
    with job(tmp_path, 1, "secret") as found, browser(tmp_path) as page:
        page.open(found.page.replace("//", "//anybody:secret@") + "/")
        page.until("document.querySelectorAll('#layout .rank').length === 2")
        found.lose_a_worker(1)
        page.until("document.querySelectorAll('#recoveries .recovery').length === 1")
        for plot in ("loss", "step-time"):
            page.until(f"document.querySelector('#{plot} .curve')?.dataset.points >= 12")
            page.until(f"document.querySelectorAll('#{plot} .fault').length >= 1")
        assert page.value("[...document.querySelectorAll('.bar i')].filter((i) => i.clientWidth > 0).length") >= 3
        page.until("document.getElementById('heat').dataset.cells >= 24")
        painted = """(() => { const c = document.getElementById('heat');
            const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
            return d.filter((v, i) => i % 4 === 3 && v > 0).length / (c.width * c.height); })()"""
        assert page.value(painted) > 0.5
        events = page.value("document.getElementById('events').innerText")
        assert "worker of rank 1 killed by SIGKILL" in events, events
        before = page.value("getComputedStyle(document.body).backgroundColor")
        page.value("document.getElementById('theme').click()")
        assert page.value("getComputedStyle(document.body).backgroundColor") != before
        page.value("document.getElementById('theme').click()")
        assert page.complaints == []
        node = page.value("document.querySelector('#known option').value")
        order = """confirm = () => true; document.getElementById('whom').value = %s;
            document.querySelector('#order button').click()"""
        for whom in ("nowhere", node):
            page.value(order % json.dumps(whom))
            page.until("document.getElementById('said').innerText")
            said = page.value("document.getElementById('said').innerText")
            assert ("is no node of the job" if whom == "nowhere" else "the job cannot spare node") in said
            page.value("document.getElementById('said').innerText = ''")
        page.complaints.clear()  # a refusal has a status of its own
        for launcher in found.launchers:
            os.killpg(launcher.pid, signal.SIGKILL)
        page.until("!document.getElementById('away').hidden")


# ---------------------------------------------------------------- no coordinator


@pytest.mark.parametrize("command", ["status", "top", "trace", "events"])
def test_what_cannot_be_asked_is_one_line(command: str) -> None:
    (unused,) = free_ports(1)
    for endpoint, said in (
        ("nowhere", "'nowhere' is not HOST:PORT"),
        (f"127.0.0.1:{unused}", f"no coordinator answers at 127.0.0.1:{unused}"),
    ):
        ended = everstep(command, endpoint)
        assert said in ended.error()
        assert ended.status == 2
        assert ("there is no such file" in ended.error()) == (command == "events" and endpoint == "nowhere")
    missing = everstep(command, endpoint, environment={"EVERSTEP_CERTS": "/nowhere"})
    assert "EVERSTEP_CERTS=/nowhere" in missing.error()


@pytest.mark.soak
@needs_prometheus
def test_only_who_has_a_certificate_and_the_token_sees_anything(tmp_path: Path) -> None:
    """The command, a browser's request, and Prometheus by the configuration that is checked in."""
    make(tmp_path / "ours", 1.0)
    make(tmp_path / "theirs", 1.0)
    (tmp_path / "token").write_text("the job's own token\n")
    port, page = free_ports(2)
    endpoint = f"127.0.0.1:{port}"
    certificates = {"EVERSTEP_CERTS": str(tmp_path / "ours")}
    ours = {**certificates, "EVERSTEP_TOKEN_FILE": str(tmp_path / "token")}
    command = ["coordinator", f"--bind={endpoint}", f"--es-store={tmp_path}/store", f"--es-metrics=127.0.0.1:{page}"]
    coordinator = subprocess.Popen(
        [sys.executable, "-m", "everstep", *command],
        env={**os.environ, **ours},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=die_with_parent,
    )
    try:
        assert coordinator.stdout is not None
        assert "coordinator of job" in coordinator.stdout.readline()
        wait_until(lambda: everstep("status", endpoint, environment=ours).status == 0, 20, "it leads")
        assert everstep("status", endpoint, environment=ours).stdout.startswith("none: forming")
        assert "EVERSTEP_CERTS" in everstep("status", endpoint).error()
        theirs = {**ours, "EVERSTEP_CERTS": str(tmp_path / "theirs")}
        assert "TLS with" in everstep("status", endpoint, environment=theirs).error()
        for secret in ({}, {"EVERSTEP_JOB_TOKEN": "another"}):
            for words in (["status", endpoint], ["trace", endpoint]):
                refused = everstep(*words, environment={**certificates, **secret})
                assert "it requires the job's token: set EVERSTEP_JOB_TOKEN or" in refused.error()
                assert refused.status == 2
        context = ssl.create_default_context(cafile=str(tmp_path / "ours" / "ca.pem"))
        context.check_hostname = False
        view = urllib.request.Request(f"https://127.0.0.1:{page}/view.json")
        view.add_header("Authorization", "Bearer the job's own token")
        with pytest.raises(OSError):  # noqa: PT011
            urllib.request.urlopen(view, timeout=10, context=context)
        context.load_cert_chain(tmp_path / "ours" / "cert.pem", tmp_path / "ours" / "key.pem")
        with urllib.request.urlopen(view, timeout=10, context=context) as answer:
            assert json.load(answer)["phase"] == "forming"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(view.full_url, timeout=10, context=context)
        _is_scraped(tmp_path, f"127.0.0.1:{page}")
    finally:
        coordinator.kill()
        coordinator.wait()
        if coordinator.stdout is not None:
            coordinator.stdout.close()


def _is_scraped(folder: Path, address: str) -> None:
    """By the checked-in configuration for jobs with certificates and a token, with this one's addresses and files."""
    config = (CONFIGURATIONS / "prometheus.secure.yml").read_text()
    for there, here in (
        ("/etc/prometheus/certs", str(folder / "ours")),
        ("/etc/prometheus/token", str(folder / "token")),
        ("node-0:9401", address),
        ("15s", "1s"),
    ):
        assert there in config
        config = config.replace(there, here)
    (folder / "prometheus").mkdir()
    prometheus = Prometheus(folder / "prometheus", config)
    try:
        with_metrics = 'everstep_job_info{run="my-run"} and on() up{job="everstep-coordinator"} == 1'
        wait_until(lambda: prometheus.ready() and prometheus.value(with_metrics) is not None, 30, "it is scraped")
    finally:
        prometheus.close()
