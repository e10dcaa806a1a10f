"""Partial sums that leave this rank during the backward of its last micro-batch of a step.

Once that backward has accumulated a parameter's gradient, the rank's partial sums of the parameter are what they will
be, and are posted to the owners of its shards on other hosts: to those on this one nothing is under way that compute
could hide. An owner sums none of it before the rank's last message of the step.
That message is sent once the weights were found unchanged. It says which of these parts count: those whose gradients
the runtime has then taken just as they were posted, bit for bit. All others are in the message itself. So a part that
was posted too early costs its bytes and nothing else, and a rank that has posted one posts no more.

Messages of a generation that is given up are dropped at both ends, as all messages are.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from everstep.comms.mesh.communicator import Aborted, Communicator, Key, Kind
from everstep.comms.mesh.tensors import ALIGNMENT_BYTES, of_bytes, on_host
from everstep.elastic.holding.stack import Held, LayerStack
from everstep.elastic.holding.watch import content_of
from everstep.resharding.layout import Layout
from everstep.resharding.units import Shard
from everstep.resharding.work import Leg

from .canonical import TreeNode, accumulation_dtype
from .steps import StepState

LEAST_BYTES = 256 << 10  # of a message; smaller parts wait for others
_COUNT = struct.Struct("<I")
_ENTRY = struct.Struct("<IIII")  # layer, shard, level and index of the node

Name = tuple[int, int]  # (layer, shard)


class EarlyPart(NamedTuple):
    """What a part is the sum of."""

    layer: int
    shard: int
    node: TreeNode


class _Place(NamedTuple):
    """A parameter: where it is in its layer, and its shards that ranks on other hosts own, by owner."""

    layer: int
    at: int
    held: Held
    shards: dict[int, list[Shard]]


@dataclass
class Posted:
    """What an owner was posted in a step: `messages` of them, of whose parts those of `counts` count."""

    messages: int = 0
    counts: set[Name] = field(default_factory=set)


@dataclass
class _Backward:
    """The backward of the last micro-batch of a step."""

    state: StepState
    micro_batch: int
    weight: float
    generation: int
    places: dict[int, _Place]  # id of the parameter -> its place
    thread: int = field(default_factory=threading.get_ident)
    open: bool = True  # parts are posted
    pending: dict[int, dict[int, _Place]] = field(default_factory=dict)  # owner -> id -> a part that waits for others
    digests: dict[Name, list[tuple[int, Shard, int]]] = field(default_factory=dict)  # (layer, position) -> as posted
    posted: dict[int, Posted] = field(default_factory=dict)  # by owner


class EarlyParts:
    """Posts the partial sums of one rank, as long as its gradients are in host memory and final behind one backward."""

    def __init__(self, stack: LayerStack, comm: Communicator, layout: Callable[[], Layout | None]) -> None:
        """`layout`: of the generation that this rank is in."""
        self._stack = stack
        self._comm = comm
        self._layout = layout
        self._hooked: set[int] = set()  # ids of parameters
        self._places: tuple[tuple[int, int, int], dict[int, _Place]] = ((-1, 0, 0), {})  # of (generation, layers)
        self._now: _Backward | None = None
        self._was_wrong = False

    def begin(self, state: StepState, span: Leg, weight: float) -> None:
        """The backward of a leg follows. `weight`: of its micro-batch. Only this rank's last one of a step matters."""
        layout, now = self._layout(), self._now
        if now is not None and (now.generation, now.state.step) == (self._comm.generation, state.step):
            return
        self._now = None
        if self._was_wrong or layout is None or layout.generation != self._comm.generation:
            return
        if any(leg != span for leg in (*state.todo, *state.running)):
            return
        places = self._places_in(layout, span)
        if places:
            self._now = _Backward(state, span.micro_batch, weight, layout.generation, places)

    def _places_in(self, layout: Layout, span: Leg) -> dict[int, _Place]:
        name = (layout.generation, span.start, span.stop)
        if self._places[0] != name:
            found = list(self._look(layout, span))
            posts = any(place.shards for place in found)
            self._places = name, {id(place.held.tensor): place for place in found} if posts else {}
        places = self._places[1]
        for place in places.values():
            tensor = place.held.tensor
            if id(tensor) not in self._hooked and tensor.requires_grad:
                self._hooked.add(id(tensor))
                tensor.register_post_accumulate_grad_hook(self._accumulated)  # type: ignore[no-untyped-call]
        return places

    def _look(self, layout: Layout, span: Leg) -> Iterator[_Place]:
        index, spec = layout.index(self._stack.spec), self._stack.spec
        for number in range(span.start, span.stop):
            shards: dict[int, dict[int, list[Shard]]] = {}  # parameter -> owner ->
            for owner in index.owners_in(number):
                if self._comm.is_remote(owner):
                    for shard in index.owned_in(owner)[number]:
                        shards.setdefault(shard.parameter, {}).setdefault(owner, []).append(shard)
            for at, held in enumerate(self._stack.layers[number].parameters):
                single = held.rule is None and len(spec.parameters[held.index].layers) == 1
                if single and held.tensor.is_cpu:
                    yield _Place(number, at, held, shards.get(held.index, {}))

    # ------------------------------------------------------------ during the backward

    def _accumulated(self, tensor: Tensor) -> None:
        """Torch has accumulated a gradient. Does not raise Aborted, since autograd calls it."""
        now = self._now
        if now is None or not now.open or now.thread != threading.get_ident():
            return
        if now.generation != self._comm.generation:
            return
        place = now.places.get(id(tensor))
        if place is None or tensor.grad is None or tensor.grad.layout != torch.strided:
            return
        if (place.layer, place.at) in now.digests:  # a second backward
            now.open = False
            return
        try:
            for owner in place.shards:
                pending = now.pending.setdefault(owner, {})
                pending[id(tensor)] = place
                if sum(_bytes(waiting, owner) for waiting in pending.values()) >= LEAST_BYTES:
                    self._post(now, owner, pending.values())
                    pending.clear()
            self._comm.ready(())  # what was posted before goes on its way, and what others post is taken in
        except Aborted:
            now.open = False

    def _post(self, now: _Backward, owner: int, places: Iterable[_Place]) -> None:
        entries: list[EarlyPart] = []
        parts: list[Tensor] = []
        for place in places:
            gradient = place.held.tensor.grad
            assert gradient is not None
            flat, dtype = gradient.detach().reshape(-1), accumulation_dtype(place.held.tensor.dtype)
            for shard in place.shards[owner]:
                leaf = flat[shard.start : shard.stop].to(dtype)
                if now.weight != 1:
                    leaf = leaf * now.weight
                as_posted = now.digests.setdefault((place.layer, place.at), [])
                as_posted.append((owner, shard, content_of(leaf)))
                at = place.at, shard.start, shard.stop
                for node, part in now.state.partial_with(place.layer, now.micro_batch, leaf, *at).items():
                    entries.append(EarlyPart(place.layer, shard.index, node))
                    parts.append(on_host(part))
        posted = now.posted.setdefault(owner, Posted())
        posted.messages += 1
        self._comm.post(owner, key_of(now.state.step, posted.messages), [_head(entries), *parts])

    # ------------------------------------------------------------ behind it

    def taken(self, layer: int, at: int, micro_batch: int, leaf: Tensor, *, given: bool) -> None:
        """A leaf is about to be added to a layer's sum: what was posted of it counts, if it was this.

        `given`: there was a gradient; else the leaf is zero.
        """
        now = self._now
        if now is None or (now.micro_batch, now.generation) != (micro_batch, self._comm.generation):
            return
        now.open = False  # another backward of the script's, behind the step, is none of it
        for owner, shard, digest in now.digests.get((layer, at), ()):
            if content_of(leaf[shard.start : shard.stop]) == digest:
                now.posted[owner].counts.add((layer, shard.index))
            elif given:
                self._was_wrong = True

    def posted_to(self, owner: int, step: int) -> Posted:
        """What an owner was posted of a step in this generation."""
        now = self._now
        if now is None or (now.generation, now.state.step) != (self._comm.generation, step):
            return Posted()
        return now.posted.get(owner, Posted())


def key_of(step: int, number: int) -> Key:
    """The key of a message of early parts; those to one owner are numbered from 1."""
    return Key(Kind.PARTIAL, step, 0, number)


def _bytes(place: _Place, owner: int) -> int:
    size = accumulation_dtype(place.held.tensor.dtype).itemsize
    return size * sum(shard.elements for shard in place.shards[owner])


def _head(entries: Sequence[EarlyPart]) -> Tensor:
    head = _COUNT.pack(len(entries)) + b"".join(_ENTRY.pack(e.layer, e.shard, *e.node) for e in entries)
    return of_bytes(head + bytes(-len(head) % ALIGNMENT_BYTES))


def entries_of(head: memoryview) -> tuple[list[EarlyPart], int]:
    """What the parts of a message are, and where the first one begins."""
    (count,) = _COUNT.unpack_from(head)
    found = [_ENTRY.unpack_from(head, _COUNT.size + number * _ENTRY.size) for number in range(count)]
    stop = _COUNT.size + count * _ENTRY.size
    entries = [EarlyPart(layer, shard, TreeNode(level, index)) for layer, shard, level, index in found]
    return entries, stop + -stop % ALIGNMENT_BYTES
