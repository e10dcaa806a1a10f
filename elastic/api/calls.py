"""The script's calls in which all ranks take part, between steps: complete on all live ranks, or made again by them.

A call is a gather to the lowest rank, which works out the result, and a message back. A rank returns from it only when
all members have entered it, so ranks are never further apart than one call. If the generation ends in a call, some
ranks may have completed it and continued: the plan of the recovery says which rank sends the results to those without
(`Plan.caller`), and these do not make the call again. See `call_log`.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from everstep.comms.mesh.communicator import Aborted, Communicator, Key, Kind
from everstep.comms.mesh.tensors import host_bytes, of_bytes
from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.progress import Progress
from everstep.elastic.contract.stateful import decode, encode
from everstep.elastic.engine.call_log import CallLog, MadeCall, Place

Combine = Callable[[Mapping[int, Any]], Any]  # the values of the ranks (ascending) -> the result, both as JSON values
Exchange = Callable[[Any, Combine], Any]  # takes a rank's value, and combines those of all
BEFORE = Place("before the loop")
AFTER = Place("behind the loop")
SAME_CALLS = (
    "all ranks have to make the same calls in the same order; make none that depends on the rank or on what a rank "
    "computes by itself"
)
END = "the end of the training function"


class Turn(NamedTuple):
    """A rank's part of a call: the call in words, its place, and the rank's value as JSON."""

    call: str
    place: str
    number: int  # of the calls at this place, from 0
    site: str
    value: Any

    def words(self) -> str:
        """What the rank does."""
        if self.call == END:
            return "has ended its training function"
        return f"calls {self.call} {self.place} ({self.site})"


class Calls:
    """Makes calls on one rank. `version` is that of the model, `interrupted` recovers after `Aborted`.

    `reach` computes steps again that a recovery has taken back, up to a version: a rank that joined meanwhile makes the
    call behind them.
    """

    def __init__(
        self,
        comm: Communicator,
        log: CallLog,
        progress: Progress,
        version: Callable[[], int],
        interrupted: Callable[[], None],
        reach: Callable[[int], None],
    ) -> None:
        self._comm = comm
        self._log = log
        self._progress = progress
        self._version = version
        self._interrupted = interrupted
        self._reach = reach
        self._place: Place | None = BEFORE
        self._index = 0
        self._arrived = 0  # the version at which the script came to this place
        self._due: Callable[[], None] | None = None

    def at(self, place: Place) -> None:
        """The script is at a place at which every rank comes by, and may make calls."""
        self._place, self._index, self._arrived = place, 0, self._version()

    def away(self) -> None:
        """The script's code runs in the middle of a step, or for a part of its micro-batches."""
        self._place = None

    def make(self, call: str, value: Any, combine: Combine) -> Any:
        """Make a call with this rank's value: returns the result, equal on all ranks. Raises UsageError."""
        said = encode(value, call)
        return self.carry_out(call, lambda exchange: exchange(said, combine))

    def put_off(self, due: Callable[[], None]) -> None:
        """`due` makes a call that belongs here, where this rank must not wait: in front of the next call."""
        self._due = due

    def make_due(self) -> None:
        """Make the call that was put off."""
        due, self._due = self._due, None
        if due is not None:
            due()

    def carry_out(self, call: str, attempt: Callable[[Exchange], Any], *, at: Place | None = None) -> Any:
        """Make a call of several exchanges, each of which takes a rank's value and combines those of all.

        `attempt` is repeated after a recovery; its result, JSON values, is what the last exchange returns. `at`: the
        place of a call that the script does not make itself.
        """
        self.make_due()
        place, index = (self._place, self._index) if at is None else (at, 0)
        if place is None:
            raise UsageError(
                f"{call} was called in the middle of a step, where ranks have different micro-batches: call it between "
                "steps, in a function of run.on_step, in the loop over run.steps, or before or behind the loop"
            )
        self._index += at is None
        site = _site()
        with self._progress.called():
            while (made := self._log.find(place, index)) is None:
                self._reach(self._arrived)
                try:
                    result = attempt(_Exchanges(self, Turn(call, place.name, index, site, None)))
                except Aborted:
                    self._interrupted()
                    self._progress.leave()
                else:
                    self._log.add(MadeCall(place.name, index, call, json.dumps(result), place.until))
        if made.call != call:
            raise UsageError(
                f"{call} was called {place.name} ({site}), where the other ranks have called {made.call}: {SAME_CALLS}"
            )
        return decode(json.loads(made.result))

    def exchange(self, part: int, turn: Turn, combine: Combine) -> Any:
        """Send this rank's turn to the lowest rank, which answers with the combined values. Raises Aborted."""
        up, down = self._keys(part)
        root, message = self._comm.members[0], of_bytes(json.dumps(turn).encode())
        if self._comm.rank != root:
            self._comm.send(root, up, [message])
            _, key, data = self._comm.receive_any([(root, down), (root, self._next_step())])
            if key != down:
                raise UsageError(_left_behind(self._comm.rank, turn, root, self._version()))
            answer = json.loads(bytes(host_bytes(data)))
        else:
            answer = self._combined(turn, up, combine)
            reply = of_bytes(json.dumps(answer).encode())
            for rank in self._comm.members[1:]:
                self._comm.send(rank, down, [reply])
        if "error" in answer:
            raise UsageError(answer["error"])
        return answer["result"]

    def _combined(self, turn: Turn, up: Key, combine: Combine) -> dict[str, Any]:
        """Take the turns of all ranks; the answer to them."""
        turns = {self._comm.rank: turn}
        while missing := [rank for rank in self._comm.members if rank not in turns]:
            # What a rank sends arrives in order: a part of the next step without its turn means that there is none.
            wanted = [(rank, up) for rank in missing] + [(rank, self._next_step()) for rank in missing]
            rank, key, data = self._comm.receive_any(wanted)
            if key != up:
                raise UsageError(_left_behind(self._comm.rank, turn, rank, self._version()))
            turns[rank] = Turn(*json.loads(bytes(host_bytes(data))))
        try:
            for rank, other in turns.items():
                if other[:3] != turn[:3]:
                    raise UsageError(_differ(self._comm.rank, turn, rank, other))
            return {"result": combine({rank: turns[rank].value for rank in sorted(turns)})}
        except UsageError as error:
            return {"error": str(error)}

    def _next_step(self) -> Key:
        """What a rank sends in the step that follows, if it does not make the call."""
        return Key(Kind.PARTIAL, self._version())

    # ------------------------------------------------------------ the end

    def announce_end(self) -> None:
        """This rank's training function has ended: in each generation, ranks that wait for it are informed."""
        root = self._comm.members[0]
        if self._comm.rank != root:
            with contextlib.suppress(Aborted):
                self._comm.send(root, self._keys(1)[0], [of_bytes(json.dumps(_ENDED).encode())])

    def answer_late(self) -> None:
        """While this rank waits for the end of training: a rank that makes a call gets an error. Never waits."""
        up, down = self._keys(1)
        others = [(rank, up) for rank in self._comm.members[1:]]
        if self._comm.rank != self._comm.members[0] or not others:
            return
        with contextlib.suppress(Aborted):
            while (found := self._comm.ready(others)) is not None:
                turn = Turn(*json.loads(bytes(host_bytes(self._comm.receive(*found)))))
                if turn.call != END:
                    answer = {"error": _differ(self._comm.rank, _ENDED, found[0], turn)}
                    self._comm.send(found[0], down, [of_bytes(json.dumps(answer).encode())])

    def _keys(self, part: int) -> tuple[Key, Key]:
        """The keys of the way to the lowest rank and back."""
        up, down = (Key(Kind.USER, self._log.count, part, leg) for leg in (0, 1))
        return up, down


_ENDED = Turn(END, "", 0, "", None)


class _Exchanges:
    """The exchanges of one attempt, one after the other."""

    def __init__(self, calls: Calls, turn: Turn) -> None:
        self._calls = calls
        self._turn = turn
        self._part = 0

    def __call__(self, value: Any, combine: Combine) -> Any:
        self._part += 1
        return self._calls.exchange(self._part, self._turn._replace(value=value), combine)


def _differ(rank: int, turn: Turn, other_rank: int, other: Turn) -> str:
    return f"rank {rank} {turn.words()}, and rank {other_rank} {other.words()}: {SAME_CALLS}"


def _left_behind(rank: int, turn: Turn, other: int, step: int) -> str:
    return f"rank {rank} {turn.words()}, and rank {other} continues with step {step} without it: {SAME_CALLS}"


def _site() -> str:
    """The line of the script that makes the call."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith("everstep."):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}, line {frame.f_lineno}"
