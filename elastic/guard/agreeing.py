"""One rank's part in the agreement of a step: its share, merged with those of all members, and the result.

In nearly every step it takes one exchange of at most 1 KiB a message, whatever the model. More exchanges follow in
steps that need them, and all ranks learn from the first one whether they do: `Details` where ranks differ about
settings, missing gradients or the runs before this one; the search for replicas that differ; the gradient norm of each
layer where lost shards may be approximated from their neighbours.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from everstep.comms.mesh.communicator import Communicator, Key, Kind
from everstep.comms.mesh.gather import all_gather
from everstep.comms.mesh.tensors import host_bytes, of_bytes
from everstep.elastic.contract import stateful
from everstep.elastic.contract.errors import UsageError
from everstep.elastic.holding.adjustments import Adjustments
from everstep.elastic.holding.stack import LayerStack
from everstep.elastic.protocol.agreement import (
    SHARE_BYTES,
    Details,
    Imbalances,
    Send,
    Share,
    SharedText,
    Sums,
    digest,
    exchange,
)
from everstep.elastic.protocol.exact import ExactSum
from everstep.elastic.protocol.replicas import Digests
from everstep.elastic.protocol.wire import decode, encode
from everstep.resharding.layout import Layout

from .checkpoint_agreement import Checkpoints
from .protection import Protection
from .replicas import Replicas

T = TypeVar("T")

DETAILS_BYTES = 16 << 20  # limit of a message with details
PARTS = 48  # sets of shards whose copies are compared in one message


@dataclass(frozen=True, kw_only=True)
class Own:
    """The results of this rank's part of a step.

    `norms`: the norm of the gradient of each shard owned here. `summed`: the parameters of whose sum this rank holds a
    part, and `touched` those that had a gradient. `idle_before`: those without a gradient in the step before.
    """

    step: int
    norms: Mapping[int, float]
    losses: Mapping[int, float]
    tokens: int = 0
    summed: Collection[int]
    touched: Collection[int]
    idle_before: tuple[int, ...]
    digest: int
    skip_nonfinite: bool
    join: int
    waits: bool = False  # for shards that it is to own by that plan
    suspects: Mapping[int, int]
    end: str = ""  # why the script asked for the end after this step
    state: Mapping[str, Any] = field(default_factory=dict)  # what has to be equal on all ranks, as JSON values, by name
    carries: bool = False  # a turn here has left something in run.stream_state


@dataclass(frozen=True, kw_only=True)
class Settled:
    """The agreement of all members. `partly`: changes that only some ranks made, and these ranks."""

    share: Share
    settings: Mapping[str, Any]
    partly: Mapping[str, list[int]]
    idle: tuple[int, ...]
    ancestors: tuple[tuple[str, float], ...]


class Agreeing:
    """Agrees with the other members, step by step."""

    def __init__(
        self,
        stack: LayerStack,
        comm: Communicator,
        adjustments: Adjustments,
        protection: Protection,
        checkpoints: Checkpoints,
        replicas: Replicas,
    ) -> None:
        self._stack = stack
        self._comm = comm
        self._adjustments = adjustments
        self._protection = protection
        self._checkpoints = checkpoints
        self._replicas = replicas
        self.trained = [[p.index for p in layer.parameters if p.rule is None] for layer in stack.layers]
        self._said: dict[str, Any] = {}  # this rank's changes of settings in this step
        self._expected: dict[str, Any] = {}  # the agreement about settings if all ranks made the same changes
        self._step = 0
        self._exchanges = 0  # in this step, so far: equal on all ranks

    # ------------------------------------------------------------ exchanges

    def merged(self, value: T) -> T:
        """Merge the values of all members, up the tree and down it. Raises Aborted."""
        up, down = self._keys()
        steps, answer = exchange(self._comm.rank, self._comm.members, value), None
        encoded: tuple[object, list[Tensor]] = (None, [])  # caches the result, which goes to several
        try:
            while True:
                asked = steps.send(answer)
                key, answer = up if asked.up else down, None
                if isinstance(asked, Send):
                    if encoded[0] is not asked.value:
                        encoded = (asked.value, [of_bytes(_checked(encode(asked.value), asked.value))])
                    self._comm.send(asked.to, key, encoded[1])
                else:
                    answer = decode(type(value), host_bytes(self._comm.receive(asked.source, key)))
        except StopIteration as end:
            result: T = end.value
            return result

    def gathered(self, value: T) -> dict[int, T]:
        """Gather the value of each member. Raises Aborted."""
        self._keys()
        table = all_gather(self._comm, self._step, self._exchanges, of_bytes(encode(value)))
        return {rank: decode(type(value), host_bytes(data)) for rank, data in table.items()}

    def texts(self, text: str) -> dict[int, str]:
        """Gather a text of each member. Raises Aborted."""
        return {rank: item.text for rank, item in self.gathered(SharedText(text)).items()}

    def contents(self, data: Tensor) -> dict[int, Tensor]:
        """Gather bytes of each member, of any number. Raises Aborted."""
        self._keys()
        return all_gather(self._comm, self._step, self._exchanges, data)

    def _keys(self) -> tuple[Key, Key]:
        self._exchanges += 1
        place = (self._step, 0, self._exchanges)
        return Key(Kind.GATHER, *place), Key(Kind.SCATTER, *place)

    # ------------------------------------------------------------ a step

    def begin(self, own: Own, layout: Layout) -> tuple[Share, dict[int, Digests]]:
        """Merge the shares; where replicas may differ, also collect the digests of those that do, by rank."""
        self._step, self._exchanges = own.step, 0
        due = self._replicas.due(own.step)
        self._said = self._adjustments.share(own.step)
        self._expected = self._adjustments.merge({self._comm.rank: self._said})[0]
        digests = self._replicas.digests(own.suspects) if due or own.suspects else Digests()
        kept, step_s = self._protection.share(own.step, self._comm.rank)
        share = Share(
            ranks=1,
            norm=self._norm(own, self._expected),
            loss=ExactSum.of(own.losses.values()),
            losses=len(own.losses),
            tokens=own.tokens,
            digest=own.digest,
            terms=self._terms(own),
            idle=set(own.summed) - set(own.touched) == set(own.summed) & set(own.idle_before),
            skip_nonfinite=own.skip_nonfinite,
            join=own.join,
            waits=own.waits,
            kept=kept,
            step_s=step_s,
            timed=step_s > 0,
            saving=self._checkpoints.share(layout.generation, self._comm.rank),
            replicas=self._replicas.imbalance(digests, layout, self._comm.rank) if due else 0,
            suspects=bool(own.suspects),
            end=(self._comm.rank, own.end) if own.end else None,
            state=digest(json.dumps(own.state, sort_keys=True)),
            carries=own.carries,
        )
        merged = self.merged(share)
        assert merged.ranks == len(self._comm.members)
        if not merged.replicas and not merged.suspects:
            return merged, {}
        if not due and not own.suspects:
            digests = self._replicas.digests({})
        return merged, self.gathered(digests.of(self._differing(digests, layout)))

    def settle(self, own: Own, merged: Share) -> Settled:
        """The agreement about settings in the merged shares. Raises UsageError where ranks contradict each other."""
        if merged.state is None:
            texts = self.texts(json.dumps(own.state, sort_keys=True))
            raise UsageError(_state_differs(own.step, {rank: json.loads(text) for rank, text in texts.items()}))
        settings, partly = self._expected, dict[str, list[int]]()
        idle, ancestors = own.idle_before, self._checkpoints.lineage.ancestors
        if merged.terms is None or not merged.idle:
            bits = sum(1 << index for index in own.touched)
            here = Details(
                settings={json.dumps(self._said, sort_keys=True): (self._comm.rank,)},
                touched=bits.to_bytes(len(self._stack.spec.parameters) // 8 + 1, "little"),
                ancestors=(self._comm.rank, ancestors),
            )
            details = self.merged(here)
            shares = {rank: json.loads(text) for text, ranks in details.settings.items() for rank in ranks}
            settings, partly = self._adjustments.merge(shares)
            touched = int.from_bytes(details.touched, "little")
            idle = tuple(i for i in sorted({i for layer in self.trained for i in layer}) if not touched >> i & 1)
            ancestors = details.ancestors[1]
        if merged.terms is None:  # a parameter that some ranks have frozen counts on none
            (norm,) = self.merged(Sums((self._norm(own, settings),))).sums
            merged = replace(merged, norm=norm)
        return Settled(share=merged, settings=settings, partly=partly, idle=idle, ancestors=ancestors)

    def layer_norms(self, own: Own, settings: Mapping[str, Any]) -> dict[str, float]:
        """Layer -> its gradient's squared norm: the weight of a neighbour in an approximation."""
        spec = self._stack.spec
        squares: list[list[float]] = [[] for _ in range(spec.layers)]
        for shard, square in self._squares(own, settings).items():
            squares[spec.home(spec.shards[shard])].append(square)
        sums = self.merged(Sums(tuple(map(ExactSum.of, squares)))).sums
        return {str(layer): total.rounded() for layer, total in enumerate(sums)}

    def _terms(self, own: Own) -> int:
        """A digest of what the step's agreement presupposes, equal on all ranks in nearly every step."""
        settings = json.dumps(self._expected, sort_keys=True)
        return digest(settings, own.idle_before, self._checkpoints.lineage.ancestors)

    def _norm(self, own: Own, settings: Mapping[str, Any]) -> ExactSum:
        return ExactSum.of(self._squares(own, settings).values())

    def _squares(self, own: Own, settings: Mapping[str, Any]) -> dict[int, float]:
        spec, frozen = self._stack.spec, set(settings.get("frozen", ()))
        names = {index: spec.parameters[spec.shards[index].parameter].name for index in own.norms}
        return {index: norm * norm for index, norm in own.norms.items() if names[index] not in frozen}

    # ------------------------------------------------------------ replicas

    def _differing(self, digests: Digests, layout: Layout) -> list[int]:
        """The shards whose copies differ: sets of shards are bisected while few sets contain any."""
        shards = self._replicas.compared()
        while True:
            size = -(-len(shards) // PARTS) or 1
            parts = [shards[at : at + size] for at in range(0, len(shards), size)]
            here = Imbalances(
                tuple(self._replicas.imbalance(digests.of(part), layout, self._comm.rank) for part in parts)
            )
            differing = [part for part, word in zip(parts, self.merged(here).words, strict=True) if word]
            shards = [shard for part in differing for shard in part]
            if size == 1 or 2 * len(differing) > len(parts) or not shards:
                return shards


def _state_differs(step: int, states: Mapping[int, Mapping[str, Any]]) -> str:
    """The first name whose value is not the same on all ranks, with two that differ."""
    first, *others = sorted(states)
    for rank in others:
        for name in sorted({*states[first], *states[rank]}):
            both = [json.dumps(states[r][name]) if name in states[r] else "" for r in (first, rank)]
            if both[0] != both[1]:
                expected, got = (stateful.in_words(json.loads(text)) if text else "not set" for text in both)
                return (
                    f"{name} differs in step {step}: expected the same on all ranks, got {expected[:120]} on "
                    f"rank {first} and {got[:120]} on rank {rank}. Set it on every rank, between steps, from what is "
                    "equal on all of them, such as the loss of a step or run.mean(...)"
                )
    raise AssertionError("states of one digest differ")


def _checked(data: bytes, value: object) -> bytes:
    """`data`, unless it exceeds the limit of a message. Raises UsageError."""
    if isinstance(value, Share | Imbalances):
        assert len(data) <= SHARE_BYTES, f"a {type(value).__name__} of {len(data)} bytes"
    elif isinstance(value, Details) and len(data) > DETAILS_BYTES:
        raise UsageError(
            f"what ranks changed in the optimizer's parameter groups takes {len(data) / 2**20:.1f} MiB, and the limit "
            f"is {DETAILS_BYTES >> 20} MiB: make the same changes on every rank, which then need not travel"
        )
    return data
