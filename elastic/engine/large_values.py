"""Large tensors and arrays of the script, such as a queue or a replay buffer: their content lies in keepers.

A registered state has a reference in their place: type, shape and the digests of their pieces. So what ranks agree on,
what they tell each other and the coordinator, and what they remember of earlier steps stays small, and the same pieces
mean the same value wherever they are read. All ranks have equal values, so on each node one rank hands the pieces that
its keeper lacks over, before the step is agreed on: then every keeper has what any later state refers to.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from everstep.checkpointing.access.client import KeeperLink
from everstep.checkpointing.access.restore import Keepers
from everstep.checkpointing.memory.contents import PIECE_BYTES, digest_of, pieces_of
from everstep.comms.mesh.tensors import raw
from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.stateful import bytes_of, digests_in

LOST_S = 30.0  # how long pieces that no keeper has are looked for: a keeper may be starting again
AGAIN_S = 0.02  # interval at which keepers are asked again

Read = Callable[[list[str]], Iterable[tuple[str, bytes | bytearray]]]  # the pieces that a place has of these


@dataclass
class _Mark:
    """A value as it was when its pieces were named. `seen`: torch's count of writes to it, None where there is none.

    The value is held, so no other one can have its address meanwhile.
    """

    value: Any
    seen: int | None
    digests: list[str]

    def is_of(self, value: Any) -> bool:
        """Whether this is surely the same content."""
        mine = self.value
        return (
            self.seen is not None
            and isinstance(value, Tensor)
            and value.data_ptr() == mine.data_ptr()
            and (value.dtype, value.shape, value.stride()) == (mine.dtype, mine.shape, mine.stride())
            and value.device == mine.device
            and self.seen == _writes(value) == _writes(mine)
        )

    def piece(self, number: int) -> memoryview:
        """The present bytes of a piece."""
        start = number * PIECE_BYTES
        if isinstance(self.value, Tensor) and self.value.is_contiguous() and not self.value.is_cpu:
            return raw(self.value.view(-1).view(torch.uint8)[start : start + PIECE_BYTES])
        return bytes_of(self.value)[start : start + PIECE_BYTES]


class LargeValues:
    """Those of one rank: names their content, hands it to the node's keeper, and gets it from keepers.

    `link`: to the node's keeper; without one (a script that runs alone) nothing can be lost but the process.
    """

    def __init__(self, link: KeeperLink | None) -> None:
        self._link = link
        self._marks: dict[str, _Mark] = {}
        self._used: set[str] = set()  # where values were seen since the last step
        self._at_keeper: set[str] = set()  # pieces that the keeper has, for the version under way
        self._fetched: dict[str, bytes | bytearray] = {}

    # ------------------------------------------------------------ naming

    def keep(self, where: str, value: Any) -> list[str]:
        """The digests of a value's pieces; of one that was not written to since the last time, without reading it."""
        self._used.add(where)
        mark = self._marks.get(where)
        if mark is None or not mark.is_of(value):
            seen = _writes(value) if isinstance(value, Tensor) else None
            held = value.detach() if isinstance(value, Tensor) else value
            mark = self._marks[where] = _Mark(held, seen, [digest_of(piece) for piece in pieces_of(bytes_of(value))])
        return mark.digests

    def forget(self, where: str) -> None:
        """What lies there, or below, was set again."""
        for known in [known for known in self._marks if known == where or known.startswith(f"{where}[")]:
            del self._marks[known]

    def check(self, step: int) -> None:
        """A part of each value whose writes torch counts, another one in each step, must be what it was.

        Raises UsageError for a value that was changed behind its back. Values that are gone are let go.
        """
        for where, mark in list(self._marks.items()):
            if where not in self._used:
                del self._marks[where]
                continue
            number = step % len(mark.digests)
            if mark.seen is not None and digest_of(mark.piece(number)) != mark.digests[number]:
                raise UsageError(
                    f"{where} was changed in step {step} or before in a way that torch does not count (through .data, "
                    ".numpy() or a kernel of your own): write to it in place under torch.no_grad(), or put a new "
                    "tensor in its place"
                )
        self._used.clear()

    # ------------------------------------------------------------ handing over

    def protect(
        self, states: Any, version: int, oldest: int, on_wait: Callable[[], None], *, begins: bool = False
    ) -> None:
        """Have the node's keeper hold what these states refer to, which are of `version`.

        Versions before `oldest` are of no more use. `begins`: the first states of a version, which the keeper has to be
        told of in any case. Raises ConnectionError where no keeper is there for a long time.
        """
        if self._link is None:
            return
        digests = digests_in(states)
        if begins:
            known, self._at_keeper = self._at_keeper, set()
            if not digests and not known:
                return
        elif self._at_keeper.issuperset(digests):
            return
        lacking = set(self._link.contents(version, oldest, digests, on_wait))
        for mark in self._marks.values():
            mine = [number for number, digest in enumerate(mark.digests) if digest in lacking]
            if mine:
                lacking.difference_update(self._hand_over(mark, mine, version, on_wait))
        self._at_keeper.update(set(digests) - lacking)

    def _hand_over(self, mark: _Mark, numbers: list[int], version: int, on_wait: Callable[[], None]) -> set[str]:
        assert self._link is not None
        fd = os.memfd_create("everstep-contents", os.MFD_CLOEXEC)
        pieces: dict[str, int] = {}
        current = mark.seen is not None and mark.seen == _writes(mark.value)
        whole = bytes_of(mark.value)
        try:
            at = 0
            for number in numbers:
                digest = mark.digests[number]
                piece = whole[number * PIECE_BYTES : (number + 1) * PIECE_BYTES]
                if digest in pieces or not (current or digest_of(piece) == digest):
                    continue
                pieces[digest] = len(piece)
                written = 0
                while written < len(piece):
                    written += os.pwrite(fd, piece[written:], at + written)
                at += len(piece)
            if pieces:
                self._link.hold(version, list(pieces.items()), fd, on_wait)
        finally:
            os.close(fd)
        return set(pieces)

    # ------------------------------------------------------------ getting back

    def fetch(
        self,
        states: Any,
        keepers: Mapping[str, str],
        token: str,
        on_wait: Callable[[], None],
        saved: Read | None = None,
    ) -> None:
        """Get what these states refer to: from the checkpoint that `saved` reads, else from keepers (node -> address).

        Raises UsageError where a piece is nowhere, and what `on_wait` and `saved` raise.
        """
        self.hold(states)
        lacking = self._unfetched(states)
        if lacking and saved is not None:
            self._fetched.update(saved(lacking))
        deadline_s = time.monotonic() + LOST_S
        while lacking := self._unfetched(states):
            found = Keepers(keepers, token, on_wait)
            try:
                self._fetched.update(found.contents(lacking))
            finally:
                found.close()
            if not (lacking := self._unfetched(states)):
                return
            if time.monotonic() > deadline_s:
                raise UsageError(
                    f"{len(lacking)} parts of the large tensors in run.state and in registered states are in no "
                    "snapshot keeper any more: more nodes were lost at once than the job is protected from; start it "
                    "again from its last checkpoint"
                )
            on_wait()
            time.sleep(AGAIN_S)

    def hold(self, states: Any) -> None:
        """Copies of what these states refer to count as fetched, as far as present values have it."""
        self._fetched.update((digest, bytes(piece)) for digest, piece in self._present(self._unfetched(states)))

    def hold_pieces(self, pieces: Mapping[str, bytes]) -> None:
        """These count as fetched, too."""
        self._fetched.update(pieces)

    def _unfetched(self, states: Any) -> list[str]:
        return [digest for digest in digests_in(states) if digest not in self._fetched]

    def _present(self, digests: Iterable[str]) -> Iterator[tuple[str, memoryview]]:
        """Those of the pieces that present values of this rank have."""
        wanted = set(digests)
        for mark in self._marks.values():
            for number, digest in enumerate(mark.digests):
                if digest in wanted:
                    piece = mark.piece(number)
                    if digest_of(piece) == digest:
                        wanted.discard(digest)
                        yield digest, piece

    def give(self, digests: list[str]) -> bytearray:
        """The content of a value; it was fetched, or is present."""
        lacking = {digest for digest in digests if digest not in self._fetched}
        there = {digest: bytes(piece) for digest, piece in self._present(lacking)} if lacking else {}
        return bytearray().join(there.get(digest) or self._fetched[digest] for digest in digests)

    def copies(self, states: Any) -> dict[str, bytes]:
        """Copies of the pieces that these states refer to, as far as present values have them."""
        return {digest: bytes(piece) for digest, piece in self._present(digests_in(states))}

    def release(self) -> None:
        """What was fetched has been put into place."""
        self._fetched.clear()


def _writes(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
