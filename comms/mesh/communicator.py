"""The communicator: what a training step needs from the network, and nothing else.

A communicator moves *keyed* messages between the ranks of one generation.  A key says what a message is (kind,
step, micro-batch, index), so a message is an idempotent value, not a position in a stream: after a failure it is
simply sent again.  Payloads are tensors, taken from the memory in which they lie; bytes are tensors of uint8
(`tensors.py`).  Every call that can block is woken by `abort`; after an abort every call raises `Aborted` until
`edit` names the next generation.  Messages of older generations are dropped on arrival, those of newer ones wait.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor  # processes that never import torch use the names of this module


class Kind(enum.IntEnum):
    """What a message is."""

    ACTIVATION = 1  # index = the layer whose input it is
    GRADIENT = 2  # index = the layer with respect to whose input it is
    PARTIAL = 3  # partial sums of a layer's gradient; index = layer
    VALUES = 4  # new parameter values; index = layer
    GATHER = 5  # one leg of an all-gather; index = sequence
    SCATTER = 6  # the other leg
    SWITCH = 7  # tells a joining rank at which version it joined
    USER = 8
    BACKUP = 9  # reduced gradients, from their owner to who keeps a copy of the shards


class Key(NamedTuple):
    """The name of a message between two ranks; unique per (generation, source, destination)."""

    kind: Kind
    step: int
    micro_batch: int = 0
    index: int = 0  # type: ignore[assignment]  # hides tuple.index, which a key does not need


@dataclass(frozen=True)
class Peer:
    """Where a rank can be reached.

    `incarnation` tells the replacement of a rank from its predecessor; `host_id` is equal for ranks that can share
    memory; `local_name` is an abstract unix socket name (without the leading NUL); `address` is `host:port`.
    """

    rank: int
    incarnation: int
    host_id: str
    local_name: str
    address: str


@dataclass(frozen=True)
class EditReport:
    """What an edit touched: links closed, links opened during the edit, and links left as they were."""

    generation: int
    closed: int
    opened: int
    kept: int


class Aborted(Exception):
    """The generation was declared over while (or before) a call waited: recovery is due, the call itself is sound."""

    def __init__(self, generation: int) -> None:
        super().__init__(f"generation {generation} was aborted")
        self.generation = generation


class Communicator(abc.ABC):
    """Keyed messages between the ranks of one generation. Not thread-safe, except `abort`."""

    rank: int
    generation: int
    devices: frozenset[str] = frozenset({"cpu"})
    """Types of the devices (`torch.device.type`) in whose memory the tensors of a payload may lie."""

    def __init__(self, rank: int, on_wait: Callable[[], None] | None = None) -> None:
        self.rank = rank
        self.generation = 0
        self.on_wait = on_wait or (lambda: None)  # called at least every 50 ms while a call waits

    @property
    @abc.abstractmethod
    def members(self) -> tuple[int, ...]:
        """The ranks of this generation, ascending, this one included."""

    @abc.abstractmethod
    def send(self, to: int, key: Key, payload: Sequence[Tensor]) -> None:
        """Send the elements of all tensors in `payload`, one after the other, to rank `to`.

        They may be of any type, and are read where they lie; on return they may be changed. Neither types nor shapes
        travel. Raises ValueError for a tensor that is not contiguous or lies on a device that is none of `devices`.

        May wait for the receiver to drain earlier messages, stale ones included, which it does in any call of its own;
        takes in this rank's messages while it does. Sending to oneself is allowed. A message to a peer that has died is
        dropped: its death is reported by the control plane, not here.
        """

    def post(self, to: int, key: Key, payload: Sequence[Tensor]) -> None:
        """The same, without waiting for the receiver: what cannot go now is copied, and goes in later calls.

        It keeps its place before what is sent to the same rank afterwards. An edit drops what has not gone by then.
        This is `send` where that does not wait for the receiver.
        """
        self.send(to, key, payload)

    def is_remote(self, rank: int) -> bool:
        """Whether messages to a member take a network, so that their time may pass while this rank computes."""
        return rank != self.rank

    @abc.abstractmethod
    def receive_any(self, wanted: Collection[tuple[int, Key]]) -> tuple[int, Key, Tensor]:
        """Wait for the first of the `wanted` (source, key) messages; returns it with what was sent.

        That is a tensor of uint8 in one dimension, in host memory, which the caller owns.
        """

    def receive(self, source: int, key: Key, into: Tensor | None = None) -> Tensor:
        """Wait for one message; returns it as `receive_any` does, or `into`, a tensor that is to take it.

        `into` may lie on any device. It is written once the message is here in full, so an abort leaves it as it was.
        Raises ValueError for a message of another size.
        """
        data = self.receive_any(((source, key),))[2]
        if into is None:
            return data
        if data.nbytes != into.nbytes:
            raise ValueError(f"{key} from rank {source} has {data.nbytes} bytes, and is to fill {into.nbytes}")
        into.detach().copy_(data.view(into.dtype).view(into.shape))
        return into

    @abc.abstractmethod
    def ready(self, wanted: Collection[tuple[int, Key]]) -> tuple[int, Key] | None:
        """One of the `wanted` messages that has arrived in full, or None; makes progress, never waits."""

    @abc.abstractmethod
    def abort(self) -> None:
        """End the generation: blocked calls raise `Aborted` within 20 ms. Callable from any thread, idempotent."""

    @abc.abstractmethod
    def edit(self, generation: int, peers: Mapping[int, Peer]) -> EditReport:
        """Go to `generation` with `peers` (this rank included) as members, and clear the abort.

        Links to incarnations that are no longer members are closed; new ones are opened at first use; no other link
        is touched. Raises ValueError if `generation` is not greater than the present one.
        """

    def damage(self) -> None:
        """Inject a fault, where the backend can: the next part that is sent arrives damaged."""
        raise NotImplementedError

    @abc.abstractmethod
    def close(self) -> None:
        """Release every socket, thread and mapping. Idempotent."""
