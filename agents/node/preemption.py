"""Notices of preemption: what the metadata service of a cloud says about the end of this machine.

A thread asks every few seconds, as the clouds recommend; an answer that is late delays nothing else. Where a provider
says that the machine will be taken away, the node drains, as it does on SIGTERM.

The answers are those that the providers document: AWS, *Spot Instance interruption notices* (with IMDSv2); Google,
*Preemptible VM instances*, `instance/preempted`; Azure, *Scheduled Events for Linux VMs*.
"""

from __future__ import annotations

import http.client
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

EVERY_S = 5.0
TIMEOUT_S = 2.0
MOST_BYTES = 1 << 16  # of an answer
MISSED = 3  # so many looks in a row may fail before a warning


class UnclearAnswer(Exception):
    """A metadata service does not answer, or not as documented. The text is for the user."""


class PreemptionNotice(NamedTuple):
    """The machine will be taken away. `at`: when, in the provider's words; empty if it does not say."""

    what: str
    at: str = ""


class HttpAnswer(NamedTuple):
    """An HTTP answer."""

    status: int
    body: str


class Ask(Protocol):
    """Asks the metadata service. Raises UnclearAnswer if it does not answer."""

    def __call__(self, path: str, headers: Mapping[str, str], method: str = "GET") -> HttpAnswer: ...


class Provider(Protocol):
    """A cloud."""

    endpoint: str

    def look(self, ask: Ask) -> PreemptionNotice | None:
        """The notice that stands, if one does. Raises UnclearAnswer."""


class Aws:
    """AWS gives notice of two minutes. Its answers need a session's token (IMDSv2)."""

    endpoint = "http://169.254.169.254"

    def __init__(self) -> None:
        self._token = ""

    def look(self, ask: Ask) -> PreemptionNotice | None:
        """404: no notice. 401: the token is too old."""
        path = "/latest/meta-data/spot/instance-action"
        answer = HttpAnswer(401, "")
        for _ in range(2):
            if not self._token:
                lasts = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
                self._token = _body("/latest/api/token", ask("/latest/api/token", lasts, "PUT")).strip()
            answer = ask(path, {"X-aws-ec2-metadata-token": self._token})
            if answer.status != 401:
                break
            self._token = ""
        if answer.status == 404:
            return None
        told = _json(path, answer)
        return PreemptionNotice(_text(path, told, "action"), _text(path, told, "time"))


class Google:
    """Google gives notice of 30 seconds."""

    endpoint = "http://metadata.google.internal"

    def look(self, ask: Ask) -> PreemptionNotice | None:
        path = "/computeMetadata/v1/instance/preempted"
        answer = ask(path, {"Metadata-Flavor": "Google"})
        if answer.status == 404:
            return None
        told = _body(path, answer).strip().upper()
        if told not in ("TRUE", "FALSE"):
            raise UnclearAnswer(f"{path} answers {told[:80]!r}")
        return PreemptionNotice("preempted") if told == "TRUE" else None


class Azure:
    """Azure gives notice of 30 seconds (spot) or more. Every machine of a scale set hears the events of all of them."""

    endpoint = "http://169.254.169.254"
    ENDS = ("Preempt", "Terminate", "Redeploy", "Reboot")  # not Freeze: the machine continues

    def __init__(self) -> None:
        self._name = ""

    def look(self, ask: Ask) -> PreemptionNotice | None:
        headers = {"Metadata": "true"}
        path = "/metadata/scheduledevents?api-version=2020-07-01"
        answer = ask(path, headers)
        if answer.status == 404:
            return None
        events = _json(path, answer).get("Events")
        if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
            raise UnclearAnswer(f"{path} answers no list of events")
        ends = [event for event in events if event.get("EventType") in self.ENDS]
        if ends and not self._name:
            about = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
            self._name = _body(about, ask(about, headers)).strip()
        for event in ends:
            if self._name in (event.get("Resources") or ()):
                return PreemptionNotice(_text(path, event, "EventType"), str(event.get("NotBefore") or ""))
        return None


PROVIDERS: Mapping[str, Callable[[], Provider]] = {"aws": Aws, "google": Google, "azure": Azure}


def _body(path: str, answer: HttpAnswer) -> str:
    if answer.status != 200:
        raise UnclearAnswer(f"{path} answers {answer.status}")
    return answer.body


def _json(path: str, answer: HttpAnswer) -> dict[str, Any]:
    try:
        told = json.loads(_body(path, answer))
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise UnclearAnswer(f"{path} answers {answer.body[:80]!r}, which is no JSON object")
    return told


def _text(path: str, told: Mapping[str, Any], key: str) -> str:
    value = told.get(key)
    if not isinstance(value, str) or not value:
        raise UnclearAnswer(f"{path} answers without {key}")
    return value


class MetadataService:
    """Asks over HTTP, never through a proxy."""

    def __init__(self, endpoint: str, timeout_s: float = TIMEOUT_S) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._timeout_s = timeout_s
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __call__(self, path: str, headers: Mapping[str, str], method: str = "GET") -> HttpAnswer:
        request = urllib.request.Request(self._endpoint + path, headers=dict(headers), method=method)
        try:
            with self._opener.open(request, timeout=self._timeout_s) as answer:
                return HttpAnswer(answer.status, answer.read(MOST_BYTES).decode(errors="replace"))
        except urllib.error.HTTPError as error:
            with error:
                return HttpAnswer(error.code, "")
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UnclearAnswer(f"{self._endpoint}{path}: {getattr(error, 'reason', None) or error}") from None


class PreemptionWatch:
    """Looks for a notice until it is closed. A notice is reported each time: the node may join later."""

    def __init__(
        self,
        provider: str,
        endpoint: str,
        told: Callable[[str], None],
        warn: Callable[[str], None],
        every_s: float = EVERY_S,
    ) -> None:
        self._provider, self._name = PROVIDERS[provider](), provider
        self._ask = MetadataService(endpoint or self._provider.endpoint)
        self._told, self._warn, self._every_s = told, warn, every_s
        self._missed = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="everstep-preemption", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.is_set():
            self._look()
            self._closed.wait(self._every_s)

    def _look(self) -> None:
        try:
            notice = self._provider.look(self._ask)
        except UnclearAnswer as error:
            self._missed += 1
            if self._missed == MISSED:
                self._warn(f"warning: notices of preemption by {self._name} cannot be read: {error}; asking on")
            return
        self._missed = 0
        if notice is not None and not self._closed.is_set():
            when = f", not before {notice.at}" if notice.at else ""
            self._told(f"{self._name} gives notice of preemption ({notice.what}{when})")
