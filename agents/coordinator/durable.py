"""The durable state of a coordinator, from which another coordinator can take over, as rows of a store.

state/...        the protocol's state (elastic/protocol/codec.py)
node/NAME        the numbers of the node's last processed message and of the last order sent to it
order/NAME/N     an order that the node has not acknowledged
record/N         a line of the event log, for the newest `REMEMBERED_RECORDS`
about            the version that wrote these rows: `Writer`
token, clock     the job's secret; the coordinator's clock and the wall clock at the same moment
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from everstep import __version__
from everstep.comms.control import everstep_pb2 as pb
from everstep.comms.control.attach import PROTOCOL
from everstep.elastic.protocol.codec import Unreadable, changed_rows, schema, state_of
from everstep.elastic.protocol.state import Config, State

from .store import StateStore, StateStoreError, Superseded

REMEMBERED_RECORDS = 2000
FORMAT = 2  # of the rows; 1 had no `about`


class Writer(NamedTuple):
    """The format and version of the store's writer. Only the same format can be read, from any release."""

    format: int
    state: str  # a digest of the state's types
    protocol: int  # of the orders in it
    release: str = ""

    @classmethod
    def this(cls) -> Writer:
        return cls(FORMAT, schema(), PROTOCOL, __version__)

    @classmethod
    def of(cls, rows: Mapping[str, bytes]) -> Writer:
        """Of these rows; raises ValueError."""
        about = json.loads(rows["about"]) if "about" in rows else [1, "unknown", 0, "of an earlier release"]
        return cls(*about)

    def __str__(self) -> str:
        return f"everstep {self.release} (format {self.format}, state {self.state}, protocol {self.protocol})"


def _refuse_another(store: StateStore, rows: Mapping[str, bytes]) -> None:
    """Raises StateStoreError for what another everstep has written."""
    writer, this = Writer.of(rows), Writer.this()
    if writer[:3] != this[:3]:
        raise StateStoreError(
            f"{store.url} was written by {writer}, and this is {this}: continue with the version that wrote it, or "
            "move the store away to start the job again"
        )


@dataclass
class NodeChannel:
    """Progress of the message and order streams between a node and its coordinators."""

    seen: int = 0  # the number of its last message that was taken in
    kept: int = 0  # and that the store has
    ordered: int = 0  # the number of the last order
    pending: dict[int, bytes] = field(default_factory=dict)  # orders that it has not acknowledged


class Durable:
    """Collects the rows that a decision changes, and writes them together."""

    def __init__(self, store: StateStore, token: str) -> None:
        self._store = store
        self.token = token
        self.channels: dict[str, NodeChannel] = {}
        self.records: deque[dict[str, Any]] = deque(maxlen=REMEMBERED_RECORDS)
        self.recorded = 0  # the number of the last record
        self._state: State | None = None  # as written
        about = json.dumps(Writer.this()).encode()
        self._rows: dict[str, bytes | None] = {"token": token.encode(), "about": about}
        self._acknowledged: list[str] = []  # rows of orders that may go, with the next that is written

    # ------------------------------------------------------------ reading

    @classmethod
    def load(cls, store: StateStore, config: Config, token: str) -> tuple[Durable, State | None, float]:
        """Load the store: (this object, state or None for a new job, this clock's offset). Raises StateStoreError."""
        rows = store.load()
        durable = cls(store, token)
        if "token" not in rows:
            return durable, None, 0.0
        try:
            _refuse_another(store, rows)
            state = durable._read(config, rows)
            saved = json.loads(rows["clock"])
            passed_s = max(0.0, time.time() - saved["wall_s"])
            return durable, state, saved["now_s"] + passed_s - time.monotonic()
        except (Unreadable, KeyError, ValueError, TypeError) as error:
            raise StateStoreError(
                f"{store.url} is not whole ({error}): move the store away to start the job again"
            ) from None

    def _read(self, config: Config, rows: Mapping[str, bytes]) -> State:
        texts = {name[6:]: data.decode() for name, data in rows.items() if name.startswith("state/")}
        state = state_of(config, texts)
        self.token, self._state = rows["token"].decode(), state
        self._rows.clear()
        for name, data in rows.items():
            if name.startswith("node/"):
                seen, ordered = json.loads(data)
                self.channels[name[5:]] = NodeChannel(seen, seen, ordered)
        for name in sorted(name for name in rows if name.startswith("order/")):
            node, _, number = name[6:].rpartition("/")
            if node in self.channels:
                self.channels[node].pending[int(number)] = rows[name]
        lines = sorted((int(name[7:]), data) for name, data in rows.items() if name.startswith("record/"))
        self.records.extend({**json.loads(data), "number": number} for number, data in lines)
        self.recorded = lines[-1][0] if lines else 0
        return state

    # ------------------------------------------------------------ gathering

    def open(self, node: str) -> NodeChannel:
        """Add a node that connects for the first time."""
        channel = self.channels[node] = NodeChannel()
        self._note(node, channel)
        return channel

    def close(self, node: str) -> None:
        """Mark a node as lost: an agent that connects under its name is refused with this reason."""
        channel = self.channels.pop(node, None)
        if channel is not None:
            self._rows[f"node/{node}"] = None
            self._rows.update({_order(node, number): None for number in channel.pending})

    def saw(self, node: str, number: int) -> None:
        """A message was taken in."""
        self.channels[node].seen = number
        self._note(node, self.channels[node])

    def order(self, node: str, message: pb.AttachResponse) -> bool:
        """Give an order the next number; returns whether the node is known."""
        channel = self.channels.get(node)
        if channel is None:
            return False
        channel.ordered += 1
        message.number = channel.ordered
        channel.pending[channel.ordered] = data = message.SerializeToString()
        self._rows[_order(node, channel.ordered)] = data
        self._note(node, channel)
        return True

    def acknowledge(self, node: str, number: int) -> None:
        """The node has received its orders up to this one. This alone causes no write."""
        pending = self.channels[node].pending
        for got in [n for n in pending if n <= number]:
            del pending[got]
            if self._rows.get(_order(node, got)) is not None:
                del self._rows[_order(node, got)]  # never was written
            else:
                self._acknowledged.append(_order(node, got))

    def record(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """A line of the event log; returns it with its number."""
        self.recorded += 1
        numbered = {**line, "number": self.recorded}
        if len(self.records) == REMEMBERED_RECORDS:
            self._rows[f"record/{self.records[0]['number']}"] = None
        self.records.append(numbered)
        self._rows[f"record/{self.recorded}"] = json.dumps(line).encode()
        return numbered

    def _note(self, node: str, channel: NodeChannel) -> None:
        self._rows[f"node/{node}"] = f"[{channel.seen},{channel.ordered}]".encode()

    # ------------------------------------------------------------ writing: in the event loop, but for `write`

    def due(self) -> bool:
        """Whether anything was gathered."""
        return bool(self._rows)

    def gather(self, state: State, now_s: float) -> dict[str, bytes | None]:
        """The rows to write now; each changed row is returned once."""
        rows = self._rows
        rows.update({f"state/{name}": _bytes(text) for name, text in changed_rows(self._state, state).items()})
        rows["clock"] = json.dumps({"now_s": now_s, "wall_s": time.time()}).encode()
        acknowledged, self._acknowledged = self._acknowledged, []
        rows.update(dict.fromkeys(acknowledged))
        self._rows, self._state = {}, state
        return rows

    def check(self) -> None:
        """Raises Superseded if this coordinator knows that another one leads."""
        if self._store.superseded:
            raise Superseded("another coordinator leads this job: this one stands by again")

    def write(self, rows: Mapping[str, bytes | None], *, sync: bool) -> None:
        """Blocks. Raises Superseded and StateStoreError: nothing was written, and this coordinator must not act."""
        self._store.commit(rows, sync=sync)

    def kept(self, seen: Mapping[str, int]) -> None:
        """A commit is complete that covers the nodes' messages up to these numbers."""
        for node, number in seen.items():
            if node in self.channels:
                self.channels[node].kept = number


def _order(node: str, number: int) -> str:
    return f"order/{node}/{number:012}"


def _bytes(text: str | None) -> bytes | None:
    return None if text is None else text.encode()
