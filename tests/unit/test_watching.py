"""Views, screens, the page's data and traces, without a job: any phase, any size, any line."""

from __future__ import annotations

import asyncio
import io
import json
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from everstep.agents.analysis.verdicts import Finding
from everstep.agents.coordinator.span_collector import SpanCollector
from everstep.agents.monitoring import story as story_module
from everstep.agents.monitoring.observer import Observer
from everstep.agents.monitoring.screen import concerns, screen
from everstep.agents.monitoring.story import (
    Grade,
    Narrator,
    ranks_text,
    seconds,
    set_up_log,
    size_text,
    tell,
    text_line,
)
from everstep.agents.monitoring.views import to_json
from everstep.agents.monitoring.web import (
    HEAT_CELLS,
    HEAT_ROWS,
    NODES,
    WebPage,
    digest,
    front_page,
    heat,
)
from everstep.agents.node.tracing import PIECE_RECORDS, EndedSpans, pieces
from everstep.agents.tools.client import Endpoints, NoAnswer
from everstep.agents.tools.live_view import dials, sparkline
from everstep.agents.tools.perfetto import (
    BEHIND,
    LANES,
    Trace,
    lanes,
)
from everstep.comms.base.security import Security
from everstep.comms.control import everstep_pb2 as pb
from everstep.comms.control import telemetry_pb2 as tpb
from everstep.comms.control.rpc import Busy, Server
from everstep.elastic.contract.telemetry import RECORD_LAYOUT, Span, Spent
from everstep.elastic.protocol import coordinator
from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.events import WorkerId
from everstep.elastic.protocol.state import (
    Config,
    Leaving,
    Node,
    Phase,
    Status,
    Worker,
)
from everstep.resharding.layout import Layout, Stage
from everstep.resharding.units import ModelSpec, ParameterSpec


class Job:
    """An observer of any number of ranks, 8 to a node, in two stages."""

    def __init__(self, ranks: int = 0) -> None:
        self.now = 100.0
        self.state = coordinator.initial_state(Config(), 0.0)
        if ranks:
            stages = (Stage(0, 1, tuple(range(ranks // 2))), Stage(1, 2, tuple(range(ranks // 2, ranks))))
            model = ModelSpec((1.0, 1.0), (ParameterSpec("w", (4,), "float32", 4, (0,)),))
            self.state = replace(
                self.state,
                phase=Phase.RUNNING,
                layout=Layout(1, 4, stages, (0,), stages),
                job=e.Job(steps=50, stages=2, micro_batches=4, global_batch_size=8, model=model),
                nodes={f"n{i}": Node(f"n{i}", f"10.0.0.{i}", 8, "") for i in range(-(-ranks // 8))},
                workers={r: Worker(WorkerId(r, 0), f"n{r // 8}", Status.MEMBER) for r in range(ranks)},
            )
        self.observer = Observer("unit", lambda: self.state, lambda: self.now, lambda: self.now)

    def line(self, event: str, **fields: Any) -> None:
        self.observer.heard({"at_s": self.now, "event": event, "number": 1, **fields})

    def train(self, steps: int) -> None:
        self.line("started", generation=1, layout="layers 0-1")
        for step in range(steps):
            self.now += 0.5
            self.state = replace(self.state, committed=step)
            self.line("committed", step=step, loss=2.0 - step / 10, generation=1)
            for name in self.state.nodes:
                times = [
                    tpb.StepTimes(rank=r, step=step, step_s=0.5, compute_s=0.1 + r / 1e5, wait_s=0.2, micro_batches=4)
                    for r, worker in self.state.workers.items()
                    if worker.node == name
                ]
                host = tpb.HostReading(cpu_ratio=0.5, memory_used_bytes=1 << 30, memory_bytes=4 << 30, cpus=2)
                gpu = tpb.GpuReading(busy_ratio=0.9, temperature_celsius=70)
                self.observer.told(name, tpb.Telemetry(at_s=self.now, steps=times, host=host, gpus=[gpu]))

    def recover(self) -> None:
        self.line("worker_died", rank=1, node="n0", cause="hung: no progress", hang="silent", phase="reduce", step=3)
        phases = {f"{phase}_s": 0.01 for phase in ("detect", "abort", "agree", "edit", "restore", "recompute")}
        place = {"ranks": [1], "nodes": [], "generation": 2, "interrupted_step": 3, "step": 4, "lost_steps": 0}
        why = {"reason": "worker_hung", "why": "hung: no progress"}
        self.line("recovered", **why, total_s=0.06, redone_micro_batches=1, **phases, **place)


def drawn(view: dict[str, Any], **settings: Any) -> str:
    console = Console(width=120, height=40, file=io.StringIO(), force_terminal=False)
    console.print(dials(view, width=120, **settings))
    return console.file.getvalue()


# ---------------------------------------------------------------- views


def test_a_job_without_anything_can_be_shown() -> None:
    view = Job().observer.view()
    lines = screen(view)
    assert lines[0] == "unit: forming; 0 ranks in 0 stages, generation 0"
    assert "no rank trains yet" in drawn(view)
    found = digest(Job().observer.seen(10, 10))
    assert (found["heat"]["steps"], found["workers"], found["nodes"]) == ([], [], [])
    json.loads(to_json(view))


def test_one_screen_says_what_is_wrong_and_shows_the_evidence() -> None:
    job = Job(16)
    job.train(20)
    job.recover()
    workers = {**job.state.workers, 3: replace(job.state.workers[3], status=Status.STARTING)}
    job.state = replace(job.state, workers=workers, leaving={"n1": Leaving("stopped by SIGTERM")})
    evidence = "0.025 s of compute a micro-batch for 9 steps, the 15 others of its stage 0.01 s (2.50 times)"
    job.observer.stragglers.ratios = {9: 2.5}
    job.observer.stragglers.findings = {9: Finding(what="compute", rank=9, factor=2.5, evidence=evidence)}
    job.now += 30
    text = "\n".join(screen(job.observer.view()))
    for said in (
        f"rank 9 (node n1) is slow itself: {evidence}",
        "ranks 3: starting",
        "node n1: leaving: stopped by SIGTERM",
        "no step was committed for 30.0 s; one takes 0.50 s",
        "step 20 of 50 (40.0%), loss 0.1, 0.50 s a step",
        "CPU 50%  memory 25%",
        "GPUs 90% 70 C",
        "30.0 s ago, in step 3, rank 1: hung: no progress",
        "1 micro-batch computed again",
    ):
        assert said in text, text
    assert digest(job.observer.seen(10, 10))["concerns"] == concerns(job.observer.view())
    shown = drawn(job.observer.view(), note="no coordinator for 3 s")
    assert "! rank 9" in shown
    assert "no coordinator for 3 s" in shown
    assert "3 starting" in shown
    assert "9 0.50 s x2.5" in shown


def test_failure_domains_are_shown_with_their_nodes() -> None:
    job = Job(2)
    nodes = {name: replace(node, domains=("rack=7", "zone=a")) for name, node in job.state.nodes.items()}
    job.state = replace(job.state, nodes=nodes)
    view = job.observer.view()
    assert [node["domains"] for node in view["nodes"]] == [["rack=7", "zone=a"]] * len(nodes)
    assert any("rack=7 zone=a" in line for line in screen(view))
    assert all(row[1].endswith(" rack=7 zone=a") for row in digest(job.observer.seen(10, 10))["nodes"])


def test_many_ranks_and_nodes_fit() -> None:
    job = Job(4000)
    job.train(3)
    job.state = replace(job.state, leaving={"n400": Leaving("full disk")})
    view = job.observer.view(rank_steps=1)
    lines = screen(view)
    assert len(lines) < 40
    assert sum(map(len, lines)) < 6000
    assert "and 499 nodes in which nothing is amiss" in "\n".join(lines)
    assert len(drawn(view).splitlines()) < 60
    found = digest(job.observer.seen(10, 100))
    assert len(found["heat"]["rows"]) <= HEAT_ROWS
    assert len(found["heat"]["rows"]) * len(found["heat"]["steps"]) <= HEAT_CELLS
    assert found["heat"]["group"] == 16
    assert found["heat"]["compute"][0][0] == pytest.approx(0.10015)  # the slowest of ranks 0 to 15
    assert (len(found["nodes"]), found["nodes_left_out"]) == (NODES, 500 - NODES)
    assert found["nodes"][0][0] == "n400", "what is amiss comes first"
    assert len(to_json(found)) < 1 << 20


def test_cells_of_steps_that_a_rank_did_not_take_are_empty() -> None:
    job = Job(4)
    job.train(5)
    job.observer.ranks[2].steps.clear()
    found = heat(job.observer.seen(10, 10))
    assert found["steps"] == [0, 1, 2, 3, 4]
    assert found["wait"][2] == [None] * 5
    assert found["wait"][1] == pytest.approx([0.2] * 5)


def test_the_page_is_made_once_for_all_who_look() -> None:
    job = Job(2)
    shown = WebPage(job.observer, lambda: job.now)
    first = shown.page().body
    job.train(1)
    job.now = 100.4
    assert shown.page().body is first
    job.now = 100.6
    assert shown.page().body != first
    page = front_page()
    assert b"/*STYLE*/" not in page.body
    assert b"/*SCRIPT*/" not in page.body
    assert page.headers["Content-Security-Policy"].count("'sha256-") == 2


def test_json_has_no_words_that_browsers_refuse() -> None:
    found = to_json({"a": math.nan, "b": [{"c": math.inf}, 1.5], "d": {"e": [math.nan]}, "f": "é"})
    assert json.loads(found) == {"a": None, "b": [{"c": None}, 1.5], "d": {"e": [None]}, "f": "é"}


def test_curves_in_one_line() -> None:
    assert sparkline([0.0, 1.0, None, 0.5], 10) == "▁█ ▅"
    assert sparkline([1.0, 1.0], 10) == "▁▁"
    assert sparkline([None, math.nan], 10) == ""
    assert len(sparkline([float(i) for i in range(100)], 20)) == 20


# ---------------------------------------------------------------- the story


def test_every_event_has_words_and_steps_have_none() -> None:
    assert tell({"event": "committed", "step": 1}) is None
    assert tell({"event": "committed_again", "step": 1, "same": True}) is None
    again = tell({"event": "committed_again", "step": 1, "same": False})
    assert again is not None
    assert again.grade is Grade.ALARM
    for event in story_module._WORDS:  # of another version: some fields are missing
        told = tell({"event": event, "at_s": 1.0, "rank": 3})
        assert told is None or told.text
    unknown = tell({"event": "quarantined", "node": "n1", "failures": 3, "at_s": 5.0})
    assert unknown is not None
    assert text_line(unknown, 0.0) == "1970-01-01T00:00:00.000Z news    quarantined node=n1: failures 3"


def test_a_failed_job_is_an_alarm() -> None:
    for succeeded, grade in ((True, Grade.NEWS), (False, Grade.ALARM)):
        told = tell({"event": "ended", "succeeded": succeeded, "why": "all is lost"})
        assert told is not None
        assert told.grade is grade


def test_the_log_has_one_form(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    died = {"event": "worker_died", "at_s": 5.0, "rank": 3, "step": 7, "node": "a", "cause": "killed", "phase": "agree"}
    for kind in ("text", "json"):
        set_up_log(kind)
        Narrator(kind, 100.0).heard(died)
        logging.getLogger("everstep.coordinator").warning("node %s is expelled", "b")
    text, said, *objects = capsys.readouterr().err.splitlines()
    line = "1970-01-01T00:01:45.000Z warning worker_died rank=3 step=7 node=a: worker of rank 3 killed, in agree"
    assert text == f"everstep: {line}"
    assert said.endswith("warning log: node b is expelled")
    first, second = map(json.loads, objects)
    assert (first["rank"], first["step"], first["event"], first["phase"]) == (3, 7, "worker_died", "agree")
    assert (second["event"], second["text"], second["grade"]) == ("log", "node b is expelled", "warning")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "-"),
        (float("inf"), "-"),
        (0.0012, "1.2 ms"),
        (0.05, "50 ms"),
        (0.5, "0.50 s"),
        (12.34, "12.3 s"),
        (100, "1 min 40 s"),
        (3600, "1 h"),
        (93784, "1 d 2 h"),
    ],
)
def test_times_for_people(value: float | None, said: str) -> None:
    assert seconds(value) == said


def test_ranks_and_sizes_for_people() -> None:
    assert ranks_text([3, 0, 1, 2, 7]) == "0-3,7"
    assert ranks_text([]) == ""
    assert [size_text(n) for n in (0, 999, 1 << 20, 5 << 40)] == ["0 B", "999 B", "1.0 MiB", "5.0 TiB"]


# ---------------------------------------------------------------- traces


def records(*rows: tuple[int, Spent, int, int], peer: int = -1, amount: int = 0) -> Any:
    """(step, kind, start, end) as records."""
    found = np.zeros(len(rows), dtype=RECORD_LAYOUT)
    for number, (step, kind, start, end) in enumerate(rows):
        place = (step, 1, -1, peer, int(kind), 0)
        found[number] = (number + 1, start, end, amount, math.nan, *place, number + 1)
    return found


def test_an_agent_answers_in_bounded_pieces() -> None:
    long = records(*[(step, Spent.FORWARD, step, step + 1) for step in range(3 * PIECE_RECORDS)])
    asked = tpb.AskSpans(ticket=7, first_step=10, limit_bytes=4 * PIECE_RECORDS * RECORD_LAYOUT.itemsize)
    former = EndedSpans()
    former.add(WorkerId(1, 0), [records((11, Spent.STEP, 0, 1))])
    former.add(WorkerId(2, 0), [])
    found = list(pieces(asked, [(WorkerId(0, 1), [long]), *former.items()], [tpb.KeeperWork(bytes=5)]))
    assert all(piece.ticket == 7 for piece in found)
    assert [(p.rank, p.incarnation, p.left_out) for p in found[:2]] == [(0, 1, PIECE_RECORDS - 10), (0, 1, 0)]
    assert [(p.rank, len(p.records) // RECORD_LAYOUT.itemsize) for p in found[2:3]] == [(1, 1)]
    assert [piece.last for piece in found] == [False, False, False, True]
    assert found[-1].keeper[0].bytes == 5
    newest = np.frombuffer(found[1].records, RECORD_LAYOUT)["step"][-1]
    assert newest == 3 * PIECE_RECORDS - 1


class Nodes:
    """Answer a collector, except for the silent nodes."""

    def __init__(self, silent: set[str] = frozenset(), gone: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        self.silent, self.gone = silent, gone
        self.collector = SpanCollector(self.send, answer_s=0.1)
        self.asked: list[str] = []

    def send(self, node: str, message: pb.AttachResponse) -> bool:
        self.asked.append(node)
        ticket = message.ask_spans.ticket
        if node not in self.silent | self.gone:
            self.collector.heard(node, tpb.Spans(ticket=ticket - 1, rank=9))  # of an older question
            self.collector.heard(node, tpb.Spans(ticket=ticket, rank=1))
            self.collector.heard(node, tpb.Spans(ticket=ticket, last=True))
        return node not in self.gone


def test_a_coordinator_asks_all_and_names_who_is_silent() -> None:
    nodes = Nodes({"n3"}, {"n5"})
    names = [f"n{i}" for i in range(40)]

    async def collect() -> list[tuple[str, int, bool]]:
        return [(node, spans.rank, spans.last) async for node, spans in nodes.collector.collect(names, 0)]

    began = time.monotonic()
    found = asyncio.run(collect())
    assert time.monotonic() - began < 5
    assert sorted(nodes.collector.silent) == ["n3", "n5"]
    assert sorted(node for node, _, last in found if last) == sorted(set(names) - {"n3", "n5"})
    assert {rank for _, rank, last in found if not last} == {1}


def test_one_trace_at_a_time_and_the_next_one_after_it() -> None:
    nodes = Nodes()

    async def check() -> None:
        first = nodes.collector.collect(["a", "b"], 0)
        await anext(first)
        with pytest.raises(Busy, match="another trace"):
            await anext(nodes.collector.collect(["a"], 0))
        await first.aclose()
        assert [spans.last async for _, spans in nodes.collector.collect(["a"], 0)] == [False, True]

    asyncio.run(check())


def answer(nodes: dict[str, list[tuple[int, Any, float, float]]], **tail: Any) -> list[pb.GetTraceResponse]:
    """The answer of a coordinator: node -> (rank, records, its monotonic clock, the world's)."""
    head = {"job": "unit", "nodes": dict.fromkeys(nodes, "host"), "at_s": 50.0, "unix_s": 1050.0}
    parts = [pb.GetTraceResponse(head=json.dumps(head))]
    for name, ranks in nodes.items():
        for rank, found, at_s, unix_s in ranks:
            spans = tpb.Spans(rank=rank, records=found.tobytes(), at_s=at_s, unix_s=unix_s)
            parts.append(pb.GetTraceResponse(node=name, spans=spans))
    told = {"series": [], "recoveries": [], "events": [], "silent": [], **tail}
    return [*parts, pb.GetTraceResponse(tail=json.dumps(told))]


def written(parts: list[pb.GetTraceResponse]) -> dict[str, Any]:
    file = io.StringIO()
    Trace.of(parts).write(file)
    found: dict[str, Any] = json.loads(file.getvalue())
    return found


def test_clocks_of_nodes_are_brought_together_and_messages_have_arrows() -> None:
    second = 1_000_000_000
    sent = records((4, Spent.SEND, 10 * second, 10 * second + 1000), peer=1, amount=8)
    received = records((4, Spent.RECEIVE, 500 * second + 2000, 500 * second + 4000), peer=0, amount=8)
    died = {"event": "worker_died", "at_s": 11.0, "rank": 1, "node": "b", "cause": "killed"}
    trace = written(
        answer({"a": [(0, sent, 20.0, 1020.0)], "b": [(1, received, 510.0, 1020.0)]}, events=[died], silent=["c"])
    )
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [(one["pid"], one["tid"], one["name"], one["ts"], one["dur"]) for one in slices] == [
        (1, 0, "send to 1", 0.0, 1.0),
        (2, LANES, "receive from 0", 2.0, 2.0),
    ]
    (start, end) = [event for event in trace["traceEvents"] if event["ph"] in "sf"]
    assert (start["id"], start["ts"], end["ts"]) == (end["id"], 0.0, 3.0)
    (mark,) = [event for event in trace["traceEvents"] if event["ph"] == "i"]
    assert (mark["name"], mark["ts"]) == ("worker_died", 1e6)
    assert trace["otherData"]["nodes without an answer"] == ["c"]


def test_slices_of_a_thread_nest() -> None:
    def span(kind: Spent, start: int, end: int) -> Span:
        return Span(1, kind, 1, -1, 1, -1, start, end, 0, 0.0)

    found = [
        span(Spent.STEP, 0, 100),
        span(Spent.FORWARD, 0, 30),
        span(Spent.SNAPSHOT, 10, 60),
        span(Spent.SNAPSHOT, 20, 70),
        span(Spent.SEND, 30, 40),
        span(Spent.REDUCE, 90, 120),  # across the end of its step
        span(Spent.UPDATE, 100, 110),
    ]
    assert lanes(found) == [0, 0, BEHIND, BEHIND + 1, 0, 1, 0]


def test_what_a_trace_does_not_know_is_left_out_and_counted() -> None:
    found = records((1, Spent.STEP, 0, 1), (1, Spent.SEND, 0, 1))
    found["kind"][1] = 99
    parts = answer({"a": [(0, found, 1.0, 2.0)]})
    parts[1].spans.records += b"half a record"
    trace = Trace.of(parts)
    assert (trace.span_count, trace.left_out) == (1, 1)


def test_a_trace_of_nothing_is_one() -> None:
    trace = written(answer({}))
    assert {event["ph"] for event in trace["traceEvents"]} == {"M"}
    assert Trace.of([]).span_count == 0


# ---------------------------------------------------------------- asking


class Shell:
    """A coordinator that receives requests; `why`: the reason for its refusal."""

    def __init__(self, why: str = "", busy: bool = False) -> None:
        self.why, self.busy = why, busy

    def refusal(self) -> str:
        return self.why

    def status(self) -> str:
        return '{"job": "unit"}'

    def view(self, steps: int, rank_steps: int) -> str:
        return json.dumps({"steps": steps, "rank_steps": rank_steps})

    async def trace(self, steps: int) -> AsyncGenerator[pb.GetTraceResponse, None]:
        if self.busy:
            raise Busy("another trace is being made: try again when it is")
        yield pb.GetTraceResponse(head="{}")


@pytest.fixture
def serve() -> Iterator[Callable[[Shell], str]]:
    """Serves shells from a thread, each at its own address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    servers: list[Server] = []

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(timeout=10)

    async def start(shell: Shell) -> int:
        servers.append(Server(shell, Security()))  # type: ignore[arg-type]
        return await servers[-1].start("127.0.0.1:0")

    yield lambda shell: f"127.0.0.1:{run(start(shell))}"
    for server in servers:
        run(server.stop(0))
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_of_several_coordinators_the_one_that_leads_is_asked(serve: Callable[[Shell], str]) -> None:
    waits = Shell("this coordinator stands by: another one leads")
    leads = Shell()
    endpoints = Endpoints(f"{serve(waits)}, {serve(leads)}", Security(), 5.0)
    answer = endpoints.status(7, 2)
    assert json.loads(answer.view) == {"steps": 7, "rank_steps": 2}
    assert endpoints.leader == endpoints.addresses[1]
    assert Endpoints(endpoints.leader, Security()).status().view == "", "nothing is made that nobody wants"
    leads.why, waits.why = waits.why, ""
    endpoints.status()
    assert endpoints.leader == endpoints.addresses[0]
    waits.why = leads.why
    with pytest.raises(NoAnswer, match=r"stands by: another one leads; 127.* stands by") as error:
        endpoints.status()
    assert error.value.away


def test_why_there_is_no_trace_is_told(serve: Callable[[Shell], str]) -> None:
    shell = Shell(busy=True)
    endpoints = Endpoints(serve(shell), Security(), 5.0)
    with pytest.raises(NoAnswer, match="another trace is being made"):
        endpoints.trace(3, 5.0)
    shell.busy = False
    assert [part.head for part in endpoints.trace(3, 5.0)] == ["{}"]


@pytest.mark.parametrize("text", ["nowhere", "host:", ":1", "host:70000", "host:1,", "", "host:1x"])
def test_what_is_no_address_is_said(text: str) -> None:
    with pytest.raises(NoAnswer, match="is not HOST:PORT") as error:
        Endpoints(text, Security())
    assert not error.value.away
