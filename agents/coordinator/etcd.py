"""A coordinator's rows in etcd, and the election of a leader among the standby coordinators of a job.

    /everstep/JOB/leader            the leader's name, attached to its lease: etcd deletes it when the lease expires
    /everstep/JOB/head              the last commit in the log, and the snapshot that the log starts from
    /everstep/JOB/log/N/PART        the rows written by the N-th commit, compressed
    /everstep/JOB/snapshot/N/PART   all rows, as of the N-th commit
    /everstep/JOB/over              for a minute after the job's end, for the standby coordinators

Every write is a transaction on the condition that the leader's key is the one that this coordinator created. So a
coordinator that was stopped or partitioned, and does not know that it was replaced, can write nothing; nor can it send
decisions, since each is written before it is sent. A commit may have any size: its parts are written before the head.

etcd keeps every former value of a key until its history is compacted, and refuses all writes once its quota is used
up. So the leader compacts revisions older than some minutes, as the API servers of Kubernetes do.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import re
import threading
import time
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from everstep.comms.base import addresses
from everstep.comms.base.security import FILES, Security

from .store import StateStoreError, Superseded

SCHEMES = ("etcd://", "etcds://")
LEASE_S = 4
RENEW_S = 1.0
LOOK_S = 0.25  # how often a standby checks whether there is a leader
OVER_S = 60
TIMEOUT_S = 2.0  # of one request
PART_BYTES = 512 << 10  # etcd refuses requests of more than 1.5 MiB
READ_PARTS = 4  # in one answer
SNAPSHOT_COMMITS = 200
HISTORY_S = 300.0  # of etcd, which others may still read or watch
DEFAULT_PORT = 2379

log = logging.getLogger("everstep.coordinator")


def _library() -> tuple[Any, type[Exception]]:
    """The client of the optional library, and the root of its errors. Raises ImportError."""
    from etcd3gw.client import Etcd3Client
    from etcd3gw.exceptions import Etcd3Exception

    return Etcd3Client, Etcd3Exception


def is_etcd(store: str) -> bool:
    """Whether a store is given as a URL of etcd."""
    return store.startswith(SCHEMES)


class EtcdMembers:
    """A cluster's members: a request goes to the member that answered last, then to the others."""

    def __init__(self, url: str, security: Security) -> None:
        """Of `etcd://HOST:PORT,...`; `etcds://` is TLS with this process's certificates. Raises StateStoreError."""
        try:
            client, self._errors = _library()
        except ImportError:
            raise StateStoreError(f"{url} needs the etcd client: pip install 'everstep[etcd]'") from None
        scheme, _, places = url.partition("://")
        options: dict[str, Any] = {"timeout": TIMEOUT_S, "api_path": "/v3/", "protocol": "http"}
        if scheme == "etcds":
            if security.folder is None:
                raise StateStoreError(f"{url} needs certificates: set EVERSTEP_CERTS")
            authority, certificate, key = (str(security.folder / name) for name in FILES)
            options |= {"protocol": "https", "ca_cert": authority, "cert_cert": certificate, "cert_key": key}
        self._clients = []
        for place in places.rstrip("/").split(","):
            try:
                host, port = addresses.parse(place, port=DEFAULT_PORT)
            except addresses.BadAddress:
                raise StateStoreError(f"--es-store must be etcd://HOST:PORT[,HOST:PORT...], got {url!r}") from None
            shown = f"[{host}]" if ":" in host else host  # it becomes part of a URL
            self._clients.append(client(host=shown, port=port, **options))
        self._url = url

    def ask(self, request: Callable[[Any], Any]) -> Any:
        """The answer of the first that has one. Raises StateStoreError."""
        why = ""
        for client in list(self._clients):
            try:
                answer = request(client)
            except self._errors as error:
                why = why or _why(error)
                self._clients.append(self._clients.pop(0))  # begins with the next member
            else:
                return answer
        raise StateStoreError(f"{self._url}: no member of etcd answers as it should ({why})")


def reach(url: str, security: Security) -> None:
    """See that etcd is there. Raises StateStoreError."""
    EtcdMembers(url, security).ask(lambda client: client.status())


class EtcdStore:
    """A job's rows, while this coordinator leads."""

    def __init__(
        self, url: str, job: str, security: Security, on_waiting: Callable[[str], None], *, stood_by: bool
    ) -> None:
        """Wait until this coordinator leads; `on_waiting` gets the reason. Raises StateStoreError and JobOver.

        `stood_by`: it has been a standby or the leader before, so it ends when the job is over.
        """
        self._etcd, self._renewals = EtcdMembers(url, security), EtcdMembers(url, security)
        self._prefix = f"/everstep/{job}/"
        self.url = f"{url}{self._prefix}"
        self._name = uuid.uuid4().hex
        self._closing = threading.Event()
        self._lease = ""
        self._renewed_s = 0.0
        self._lapsed = threading.Event()
        self._last = self._snapshot = 0
        self._rows: dict[str, bytes] = {}
        self._revision = 0  # etcd's, as of the last transaction
        self._revisions: deque[tuple[float, int]] = deque()  # (time, revision) pairs that are not compacted yet
        self._uncompacted = False  # the last attempt failed, and the failure was logged
        self._stand(on_waiting, stood_by)
        self._keeping = threading.Thread(target=self._renew, name="everstep-lease", daemon=True)
        self._keeping.start()

    # ------------------------------------------------------------ leading

    def _stand(self, on_waiting: Callable[[str], None], stood_by: bool) -> None:
        """Compete for the leader's key until this coordinator holds it."""
        told = False
        while True:
            try:
                if stood_by and self._get("over"):
                    raise JobOver(self._prefix)
                if self._elected(stood_by):
                    return
                leader = self._get("leader")
            except StateStoreError as error:
                if not stood_by:
                    raise
                if not told:
                    on_waiting(str(error))
                told = True
                time.sleep(LOOK_S)
                continue
            stood_by, told = True, False
            on_waiting("another coordinator leads" if leader else "the election is under way")
            time.sleep(LOOK_S)

    def _elected(self, stood_by: bool) -> bool:
        """Try to take the leader's key; True if it was free. A standby is not elected for a job that has ended."""
        asked_s = time.monotonic()
        lease = self._etcd.ask(lambda client: client.lease(LEASE_S))
        absent = [self._absent("leader"), *([self._absent("over")] if stood_by else [])]
        puts = [
            {"request_put": {"key": _b64(self._key("leader")), "value": _b64(self._name), "lease": lease.id}},
            {"request_delete_range": {"key": _b64(self._key("over"))}},
        ]
        if self._transact(absent, puts):
            self._lease, self._renewed_s = lease.id, asked_s
            return True
        self._post("/lease/revoke", {"ID": lease.id})
        return False

    def _renew(self) -> None:
        """Renew the lease for as long as this process runs; an expired lease is not renewed."""
        while not self._closing.wait(RENEW_S):
            asked_s = time.monotonic()
            try:
                answer = self._renewals.ask(
                    lambda client: client.post(client.get_url("/lease/keepalive"), json={"ID": self._lease})
                )
            except StateStoreError:
                continue  # the next write's transaction fails if the lease was lost
            if int(answer.get("result", {}).get("TTL", -1)) <= 0:
                self._lapsed.set()
                return
            self._renewed_s = asked_s

    @property
    def superseded(self) -> bool:
        """Whether this coordinator has to assume that its lease expired: it was not renewed in time."""
        return self._lapsed.is_set() or time.monotonic() - self._renewed_s > LEASE_S

    # ------------------------------------------------------------ rows

    def load(self) -> dict[str, bytes]:
        head = self._get("head")
        if not head:
            return {}
        try:
            place = json.loads(head)
            self._last, self._snapshot = place["last"], place["snapshot"]
            self._rows = {}
            if self._snapshot:
                self._apply(self._read(f"snapshot/{self._snapshot:012}/"))
            for number in range(self._snapshot + 1, self._last + 1):
                self._apply(self._read(f"log/{number:012}/"))
        except (ValueError, KeyError, TypeError, zlib.error) as error:
            raise StateStoreError(f"what etcd has under {self._prefix} is damaged, or not ours: {error!r}") from None
        return dict(self._rows)

    def commit(self, rows: Mapping[str, bytes | None], *, sync: bool) -> None:
        number = self._last + 1
        self._write(f"log/{number:012}/", rows, {"last": number, "snapshot": self._snapshot})
        self._last = number
        self._apply(rows)
        if number - self._snapshot >= SNAPSHOT_COMMITS:
            self._compact()

    def close(self, *, forget: bool) -> None:
        self._closing.set()
        self._keeping.join(timeout=2 * TIMEOUT_S)
        try:
            if forget and not self.superseded:
                self._forget()
            self._post("/lease/revoke", {"ID": self._lease})
        except StateStoreError:
            pass  # the lease lapses by itself

    def _forget(self) -> None:
        lease = self._etcd.ask(lambda client: client.lease(OVER_S))
        over = {"request_put": {"key": _b64(self._key("over")), "value": _b64("over"), "lease": lease.id}}
        gone = [{"request_delete_range": _range(self._key(kind))} for kind in ("log/", "snapshot/")]
        head = {"request_delete_range": {"key": _b64(self._key("head"))}}
        self._transact([self._leads()], [over, head, *gone])

    def _apply(self, rows: Mapping[str, bytes | None]) -> None:
        for name, data in rows.items():
            if data is None:
                self._rows.pop(name, None)
            else:
                self._rows[name] = data

    def _write(self, place: str, rows: Mapping[str, bytes | None], head: Mapping[str, int]) -> None:
        """Write the parts first; the last one together with the head, which commits them."""
        parts = list(_parts(rows))
        for i, part in enumerate(parts):
            puts = [{"request_put": {"key": _b64(self._key(f"{place}{i:04}")), "value": _b64(part)}}]
            if i == len(parts) - 1:
                stale = {"request_delete_range": _between(self._key(f"{place}{i + 1:04}"), self._key(f"{place}9999"))}
                text = json.dumps(head)
                puts += [stale, {"request_put": {"key": _b64(self._key("head")), "value": _b64(text)}}]
            if not self._transact([self._leads()], puts):
                raise Superseded("another coordinator leads this job: this one stands by again")

    def _compact(self) -> None:
        """Write all rows at once, then remove the commits that they are made of."""
        before, self._snapshot = self._snapshot, self._last
        self._write(f"snapshot/{self._last:012}/", self._rows, {"last": self._last, "snapshot": self._last})
        older = _between(self._key("log/"), self._key(f"log/{self._last:012}/~"))
        snapshot = _range(self._key(f"snapshot/{before:012}/"))
        self._transact([self._leads()], [{"request_delete_range": older}, {"request_delete_range": snapshot}])
        self._compact_history()

    def _compact_history(self) -> None:
        """Have etcd forget former values that are older than HISTORY_S."""
        now, revision = time.monotonic(), 0
        self._revisions.append((now, self._revision))
        while self._revisions and now - self._revisions[0][0] >= HISTORY_S:
            revision = self._revisions.popleft()[1]
        if not revision:
            return
        try:
            self._post("/kv/compaction", {"revision": revision})
        except StateStoreError as error:
            if "has been compacted" in str(error):  # by another coordinator
                return
            if not self._uncompacted:
                hint = "tried again; if it never does, it needs --auto-compaction-retention"
                log.warning("etcd does not compact its history, which grows: %s (%s)", error, hint)
            self._uncompacted = True
        else:
            self._uncompacted = False

    def _read(self, place: str) -> dict[str, bytes | None]:
        raw = json.loads(zlib.decompress(b"".join(self._values(place))))
        return {name: None if text is None else base64.b64decode(text) for name, text in raw.items()}

    # ------------------------------------------------------------ requests

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _absent(self, name: str) -> dict[str, Any]:
        return {"key": _b64(self._key(name)), "target": "CREATE", "create_revision": 0}

    def _leads(self) -> dict[str, Any]:
        return {"key": _b64(self._key("leader")), "target": "VALUE", "value": _b64(self._name)}

    def _values(self, place: str) -> Iterator[bytes]:
        """Of all keys below a place, in order, a few in a request: a request has TIMEOUT_S however much there is."""
        key, end = self._key(place), _range(self._key(place))["range_end"]
        more = True
        while more:
            body = {"key": _b64(key), "range_end": end, "limit": READ_PARTS}
            answer = self._post("/kv/range", body)
            found = answer.get("kvs", [])
            yield from (base64.b64decode(pair.get("value", "")) for pair in found)
            if more := bool(found) and bool(answer.get("more")):
                key = base64.b64decode(found[-1]["key"]).decode() + "\0"

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._etcd.ask(lambda client: client.post(client.get_url(path), json=body))

    def _get(self, name: str) -> bytes:
        found = self._etcd.ask(lambda client: client.get(self._key(name)))
        return bytes(found[0]) if found else b""

    def _transact(self, conditions: Sequence[Any], requests: Sequence[Any]) -> bool:
        compare = [{"result": "EQUAL", **condition} for condition in conditions]
        body = {"compare": compare, "success": list(requests), "failure": []}
        answer = self._etcd.ask(lambda client: client.transaction(body))
        self._revision = int(answer["header"]["revision"])
        return bool(answer.get("succeeded", False))


class JobOver(Exception):
    """The job ended while this coordinator stood by."""


def _why(error: Exception) -> str:
    """The message in the body of etcd's answer: it explains more than the HTTP status."""
    text = str(getattr(error, "detail_text", None) or error) or type(error).__name__
    if system := re.search(r"\[Errno \d+\] ([^'\")]+)", text):  # at the end of a long chain of causes
        return system[1]
    with contextlib.suppress(ValueError, TypeError, KeyError):
        text = str(json.loads(text)["message"])
    return text[:200]


def _parts(rows: Mapping[str, bytes | None]) -> Iterator[bytes]:
    raw = {name: None if data is None else base64.b64encode(data).decode() for name, data in rows.items()}
    packed = zlib.compress(json.dumps(raw).encode(), 1)
    for start in range(0, len(packed), PART_BYTES):
        yield packed[start : start + PART_BYTES]


def _b64(value: str | bytes) -> str:
    return base64.b64encode(value.encode() if isinstance(value, str) else value).decode()


def _between(first: str, end: str) -> dict[str, str]:
    return {"key": _b64(first), "range_end": _b64(end)}


def _range(prefix: str) -> dict[str, str]:
    """All keys that begin so."""
    return _between(prefix, prefix[:-1] + chr(ord(prefix[-1]) + 1))
