"""Orders to workers as differences: on one stream, the difference between a large text and the one before it.

A plan has a few hundred bytes that are new and, in a large job, hundreds of kilobytes that the receiver has: who owns
which shard, where each rank listens, which nodes hold parity. All workers of a node get the same plan, too. So both
ends of a stream remember the last large text, and what travels is how to make the next one of it. A stream begins
without any: the first large text is sent whole.
"""

from __future__ import annotations

import functools
import json
import re
from itertools import accumulate

from . import everstep_pb2 as pb

LARGE = 1024  # characters; shorter texts are sent as they are
WINDOW = 6  # consecutive pieces that have to be the same before they count as copied
PIECES = re.compile(r"[^,\]}]*[,\]}]?")


class BadDifference(ValueError):
    """A difference that cannot be applied to the text before it."""


class DifferenceSender:
    """The sender's end of a stream."""

    def __init__(self) -> None:
        self._last = ""

    def reduce(self, message: pb.AttachResponse) -> pb.AttachResponse:
        """The message as it is sent: an order that is much like the last large one becomes a difference."""
        text = message.to_worker.json if message.WhichOneof("body") == "to_worker" else ""
        if len(text) < LARGE:
            return message
        before, self._last = self._last, text
        changed = difference(before, text) if before else text
        if len(changed) >= len(text):
            return message
        order = pb.ToWorker(worker=message.to_worker.worker, json=changed, differs=True)
        return pb.AttachResponse(number=message.number, to_worker=order)


class DifferenceReceiver:
    """The receiver's end of a stream."""

    def __init__(self) -> None:
        self._last = ""

    def restore(self, message: pb.AttachResponse) -> None:
        """Put the whole text in the place of a difference. Raises BadDifference."""
        if message.WhichOneof("body") != "to_worker":
            return
        order = message.to_worker
        if order.differs:
            order.json, order.differs = apply(self._last, order.json), False
        if len(order.json) >= LARGE:
            self._last = order.json


@functools.lru_cache(maxsize=4)  # every agent of a job gets the same
def difference(before: str, after: str) -> str:
    """How `after` is made of `before`: a JSON list of texts, and of [offset, length] for what is copied.

    Both are cut into pieces at the delimiters of JSON. O(length) where `after` has few pieces that `before` lacks.
    """
    old, new = PIECES.findall(before), PIECES.findall(after)
    offsets = [0, *accumulate(map(len, old))]
    places: dict[tuple[str, ...], int] = {}
    for place in range(len(old) - WINDOW, -1, -1):
        places[tuple(old[place : place + WINDOW])] = place
    found: list[str | list[int]] = []
    literal: list[str] = []
    at = expected = 0  # in `new`; and in `old`, if nothing was inserted or deleted
    while at < len(new):
        window = tuple(new[at : at + WINDOW])
        place = expected if tuple(old[expected : expected + WINDOW]) == window else places.get(window, -1)
        if place < 0 or len(window) < WINDOW:
            literal.append(new[at])
            at, expected = at + 1, expected + 1
            continue
        end = place
        while end < len(old) and at < len(new) and old[end] == new[at]:
            end, at = end + 1, at + 1
        if literal:
            found.append("".join(literal))
            literal.clear()
        found.append([offsets[place], offsets[end] - offsets[place]])
        expected = end
    return json.dumps([*found, *(["".join(literal)] if literal else [])], separators=(",", ":"))


def apply(before: str, changed: str) -> str:
    """The text that `difference` was given after `before`. Raises BadDifference."""
    pieces: list[str] = []
    try:
        for piece in json.loads(changed):
            if isinstance(piece, str):
                pieces.append(piece)
                continue
            offset, length = piece
            if not 0 <= offset <= offset + length <= len(before):
                raise BadDifference(f"[{offset}, {length}] of a text of {len(before)} characters")
            pieces.append(before[offset : offset + length])
    except BadDifference:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise BadDifference(f"{changed[:80]!r}: {error!r}") from None
    return "".join(pieces)
