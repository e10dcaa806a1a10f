"""An agent's part in a trace: the newest spans of its workers, in pieces of bounded size."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from everstep.comms.control import telemetry_pb2 as pb
from everstep.elastic.contract.telemetry import RECORD_BYTES, Records
from everstep.elastic.protocol.events import WorkerId

PIECE_RECORDS = 8192  # 576 KiB
ENDED_WORKERS = 8  # ended workers of a node whose spans are kept
ENDED_RECORDS = 16384  # of one of them


class EndedSpans:
    """The spans of recently ended workers, which a trace of a recovery shows too."""

    def __init__(self) -> None:
        self._kept: deque[tuple[WorkerId, list[Records]]] = deque(maxlen=ENDED_WORKERS)

    def add(self, worker: WorkerId, kept: Iterable[Records]) -> None:
        records = [part for part in kept if len(part)]
        if records:
            self._kept.append((worker, [np.concatenate(records)[-ENDED_RECORDS:]]))

    def items(self) -> list[tuple[WorkerId, list[Records]]]:
        return list(self._kept)


def pieces(
    asked: pb.AskSpans, workers: Sequence[tuple[WorkerId, Sequence[Records]]], keeper: Sequence[pb.KeeperWork]
) -> Iterator[pb.Spans]:
    """The answer: of each worker the newest records from the wanted step on, then the end of it."""
    at_s, unix_s = time.monotonic(), time.time()
    most = max(1, int(asked.limit_bytes) // RECORD_BYTES // max(1, len(workers)))
    for worker, parts in workers:
        if not parts:
            continue
        records = np.concatenate(parts)
        records = records[records["step"] >= asked.first_step]
        left_out, records = max(0, len(records) - most), records[-most:]
        for start in range(0, len(records), PIECE_RECORDS):
            yield pb.Spans(
                ticket=asked.ticket,
                rank=worker.rank,
                incarnation=worker.incarnation,
                records=records[start : start + PIECE_RECORDS].tobytes(),
                left_out=left_out if start == 0 else 0,
                at_s=at_s,
                unix_s=unix_s,
            )
    yield pb.Spans(ticket=asked.ticket, last=True, keeper=keeper, at_s=at_s, unix_s=unix_s)
