"""The messages between workers and the coordinator, as text: the protocol's own events and effects.

A message is one line of JSON: `{"kind": the name of the class, ...the fields}`. The field `worker` is left out, since
the channel that carries the message identifies the worker. Types are those that the classes declare; see `codec`.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping
from typing import Any

from . import events as e
from .codec import Unreadable, decode_record, encode_record

FromWorker = (
    e.WorkerDeclaredElastic
    | e.WorkerReady
    | e.WorkerReported
    | e.WorkerLacking
    | e.CorruptionFound
    | e.WorkerResumed
    | e.WorkerSwitched
    | e.WorkerIdled
    | e.WorkerCommitted
    | e.WorkerNoted
    | e.CheckpointSaved
    | e.CheckpointUnreadable
    | e.WorkerLeft
    | e.WorkerWentOn
    | e.WorkerFinished
    | e.WorkerConcluded
    | e.WorkerRaised
)
ToWorker = e.AbortGeneration | e.CarryOut | e.AskSave | e.TellLeft | e.Conclude | e.EndTraining | e.EndWorker
FROM_WORKER = {kind.__name__: kind for kind in typing.get_args(FromWorker)}
TO_WORKER = {kind.__name__: kind for kind in typing.get_args(ToWorker)}


def write(message: FromWorker | ToWorker) -> str:
    """A message as one line, without the line break."""
    fields = encode_record(message, leave=("worker",))
    return json.dumps({"kind": type(message).__name__, **fields}, separators=(",", ":"))


def read_event(worker: e.WorkerId, text: str) -> FromWorker:
    """A message of a worker. Raises Unreadable."""
    event: FromWorker = _read(FROM_WORKER, worker, text)
    return event


def read_order(worker: e.WorkerId, text: str) -> ToWorker:
    """A message to a worker. Raises Unreadable."""
    order: ToWorker = _read(TO_WORKER, worker, text)
    return order


def _read(kinds: Mapping[str, type[Any]], worker: e.WorkerId, text: str) -> Any:
    try:
        raw = json.loads(text)
        kind = kinds[raw.pop("kind")]
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise Unreadable(f"no message starts with {text[:80]!r}: {error!r}") from None
    return decode_record(kind, raw, worker=worker)
