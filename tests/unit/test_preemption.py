"""Notices of preemption, against a metadata service that answers as each provider documents, and otherwise."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from everstep.agents.node.preemption import (
    MOST_BYTES,
    PROVIDERS,
    MetadataService,
    PreemptionNotice,
    PreemptionWatch,
    UnclearAnswer,
)

TIMEOUT_S = 30.0
ACTION = "/latest/meta-data/spot/instance-action"
PREEMPTED = "/computeMetadata/v1/instance/preempted"
EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
TERMINATE = json.dumps({"action": "terminate", "time": "2026-11-28T15:00:00Z"})


class Service(ThreadingHTTPServer):
    """A fake metadata service: `answers` by path; other paths are not found."""

    daemon_threads = True

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, str]] = {}
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.check: Callable[[str, dict[str, str]], int] = lambda path, headers: 200
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Service

    def _answer(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.asked.append((self.command, self.path, headers))
        status, body = self.server.answers.get(self.path, (404, "not here"))
        refused = self.server.check(self.path, headers)
        status = refused if refused != 200 else status
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    do_GET = do_PUT = _answer

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """Print nothing."""


@contextmanager
def serving() -> Iterator[Service]:
    with Service() as service:
        thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield service
        finally:
            service.shutdown()
            thread.join()


@pytest.fixture
def service() -> Iterator[Service]:
    with serving() as found:
        yield found


def look(name: str, service: Service) -> PreemptionNotice | None:
    return PROVIDERS[name]().look(MetadataService(service.url))


@pytest.mark.parametrize("name", PROVIDERS)
def test_not_found_is_no_notice(name: str, service: Service) -> None:
    service.answers["/latest/api/token"] = (200, "t")
    assert look(name, service) is None


# ---------------------------------------------------------------- AWS


def test_aws_gives_notice(service: Service) -> None:
    service.answers = {"/latest/api/token": (200, "secret"), ACTION: (200, TERMINATE)}
    assert look("aws", service) == PreemptionNotice("terminate", "2026-11-28T15:00:00Z")
    (put, first, lasts), (get, second, with_token) = service.asked
    assert (put, first, lasts["x-aws-ec2-metadata-token-ttl-seconds"]) == ("PUT", "/latest/api/token", "21600")
    assert (get, second, with_token["x-aws-ec2-metadata-token"]) == ("GET", ACTION, "secret")


def test_a_token_of_aws_that_is_too_old_is_replaced(service: Service) -> None:
    aws, ask = PROVIDERS["aws"](), MetadataService(service.url)
    service.answers = {"/latest/api/token": (200, "old")}
    assert aws.look(ask) is None
    service.answers = {"/latest/api/token": (200, "new"), ACTION: (200, TERMINATE)}
    service.check = lambda path, headers: (
        401 if path == ACTION and headers["x-aws-ec2-metadata-token"] == "old" else 200
    )
    assert aws.look(ask) == PreemptionNotice("terminate", "2026-11-28T15:00:00Z")
    assert [path for _, path, _ in service.asked].count("/latest/api/token") == 2
    service.check = lambda path, headers: 401 if path == ACTION else 200
    with pytest.raises(UnclearAnswer, match="answers 401"):
        aws.look(ask)


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (500, "", "instance-action answers 500"),
        (200, "", "no JSON object"),
        (200, "<html>", "no JSON object"),
        (200, "[]", "no JSON object"),
        (200, "[" * 50_000, "no JSON object"),
        (200, '{"time": "2026-11-28T15:00:00Z"}', "answers without action"),
        (200, '{"action": 5, "time": "x"}', "answers without action"),
    ],
)
def test_aws_answers_what_it_should_not(status: int, body: str, message: str, service: Service) -> None:
    service.answers = {"/latest/api/token": (200, "t"), ACTION: (status, body)}
    with pytest.raises(UnclearAnswer, match=message):
        look("aws", service)


def test_aws_refuses_a_token(service: Service) -> None:
    service.answers = {"/latest/api/token": (403, ""), ACTION: (200, TERMINATE)}
    with pytest.raises(UnclearAnswer, match="/latest/api/token answers 403"):
        look("aws", service)


# ---------------------------------------------------------------- Google


@pytest.mark.parametrize(
    ("body", "notice"),
    [("TRUE", PreemptionNotice("preempted")), ("true\n", PreemptionNotice("preempted")), ("FALSE", None)],
)
def test_google_says_whether_it_preempts(body: str, notice: PreemptionNotice | None, service: Service) -> None:
    service.answers = {PREEMPTED: (200, body)}
    service.check = lambda path, headers: 200 if headers.get("metadata-flavor") == "Google" else 403
    assert look("google", service) == notice


@pytest.mark.parametrize(("status", "body"), [(200, "MAYBE"), (200, ""), (503, "TRUE")])
def test_google_answers_what_it_should_not(status: int, body: str, service: Service) -> None:
    service.answers = {PREEMPTED: (status, body)}
    with pytest.raises(UnclearAnswer, match="preempted answers"):
        look("google", service)


# ---------------------------------------------------------------- Azure


def event(kind: str, *machines: str, at: str = "Sat, 28 Nov 2026 15:00:00 GMT") -> dict[str, object]:
    about = {"ResourceType": "VirtualMachine", "EventStatus": "Scheduled", "DurationInSeconds": -1}
    return {"EventId": "A1", "EventType": kind, "Resources": list(machines), "NotBefore": at, **about}


@pytest.mark.parametrize(
    ("events", "notice"),
    [
        ([], None),
        ([event("Preempt", "vm1")], PreemptionNotice("Preempt", "Sat, 28 Nov 2026 15:00:00 GMT")),
        ([event("Preempt", "vm2")], None),
        ([event("Freeze", "vm1")], None),
        (
            [event("Freeze", "vm1"), event("Reboot", "vm2", "vm1")],
            PreemptionNotice("Reboot", "Sat, 28 Nov 2026 15:00:00 GMT"),
        ),
        ([event("Terminate", "vm1", at="")], PreemptionNotice("Terminate")),
    ],
)
def test_azure_lists_events_of_all_machines(
    events: list[object], notice: PreemptionNotice | None, service: Service
) -> None:
    service.answers = {EVENTS: (200, json.dumps({"DocumentIncarnation": 3, "Events": events})), NAME: (200, "vm1")}
    service.check = lambda path, headers: 200 if headers.get("metadata") == "true" else 400
    assert look("azure", service) == notice


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "no JSON object"),
        ("{}", "no list of events"),
        ('{"Events": {}}', "no list of events"),
        ('{"Events": [7]}', "no list of events"),
        (json.dumps({"Events": [event("Preempt", "vm1")]}), "compute/name.* answers 404"),
    ],
)
def test_azure_answers_what_it_should_not(body: str, message: str, service: Service) -> None:
    service.answers = {EVENTS: (200, body)}
    with pytest.raises(UnclearAnswer, match=message):
        look("azure", service)


# ---------------------------------------------------------------- the service, and the thread


def test_a_service_that_is_not_there() -> None:
    with Service() as closed:
        url = closed.url
    with pytest.raises(UnclearAnswer, match=f"{PREEMPTED}: .*refused"):
        MetadataService(url)(PREEMPTED, {})


def test_a_service_that_does_not_answer() -> None:
    with Service() as deaf:  # it listens, and nobody serves
        with pytest.raises(UnclearAnswer, match="timed out"):
            MetadataService(deaf.url, timeout_s=0.05)(PREEMPTED, {})


def test_an_answer_without_end_is_cut(service: Service) -> None:
    service.answers = {PREEMPTED: (200, "x" * (2 * MOST_BYTES))}
    assert len(MetadataService(service.url)(PREEMPTED, {}).body) == MOST_BYTES


def test_no_proxy_is_asked(service: Service, monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    service.answers = {PREEMPTED: (200, "FALSE")}
    assert MetadataService(service.url)(PREEMPTED, {}).body == "FALSE"


def test_a_notice_is_told_at_every_look_and_failing_looks_are_told_once(service: Service) -> None:
    told, warned = queue.Queue[str](), queue.Queue[str]()
    service.answers = {PREEMPTED: (500, "")}
    watch = PreemptionWatch("google", service.url, told.put, warned.put, every_s=0.01)
    watch.start()
    try:
        text = warned.get(timeout=TIMEOUT_S)
        assert text == f"warning: notices of preemption by google cannot be read: {PREEMPTED} answers 500; asking on"
        service.answers = {PREEMPTED: (200, "TRUE")}
        for _ in range(3):
            assert told.get(timeout=TIMEOUT_S) == "google gives notice of preemption (preempted)"
    finally:
        watch.close()
    assert warned.empty()


def test_the_deadline_is_told(service: Service) -> None:
    told = queue.Queue[str]()
    service.answers = {"/latest/api/token": (200, "t"), ACTION: (200, TERMINATE)}
    watch = PreemptionWatch("aws", service.url, told.put, told.put, every_s=0.01)
    watch.start()
    text = told.get(timeout=TIMEOUT_S)
    watch.close()
    assert text == "aws gives notice of preemption (terminate, not before 2026-11-28T15:00:00Z)"
