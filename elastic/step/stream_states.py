"""`run.stream_state`: what a script carries from a micro-batch to the micro-batch of the next step in the same place.

A recurrent model's hidden state continues in each of the M micro-batches of a step by itself: micro-batch m of step
t + 1 begins with what m of step t has left, whichever ranks compute them. A rank that has computed a micro-batch has
its new state. The agreement of the step gathers them all, so they are protected, saved and restored with it, and a
micro-batch that is computed again begins with the state of the step before. Large tensors and arrays are gathered, too,
so that all ranks have them, as those of `run.state`: the agreement refers to them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from everstep.comms.mesh.tensors import host_bytes, of_bytes
from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.stateful import (
    LARGE_BYTES,
    REGISTERED_BYTES,
    Give,
    Keep,
    bytes_of,
    decode,
    encode,
    outline,
    size_text,
)

from .devices import to_device
from .order import DataOrder

STREAM_STATE = "run.stream_state"  # its name among the registered objects


class Gathering(Protocol):
    """Exchanges in the agreement of a step: what each member has, by rank."""

    def texts(self, text: str) -> Mapping[int, str]:
        """Of texts."""

    def contents(self, data: Tensor) -> Mapping[int, Tensor]:
        """Of bytes, as tensors of uint8 in one dimension."""


class StreamStates(MutableMapping[str, Any]):
    """The named values of the micro-batch that the script is at. Those of all are agreed on in each step.

    What is read is a copy on the model's device, without gradients. Raises UsageError outside a turn of the loop.
    """

    def __init__(self) -> None:
        self._order: DataOrder | None = None
        self._version = 0  # the step in front of which the agreed states are
        # All tensors here are copies on the CPU, which the script does not get.
        self._agreed: dict[str, dict[str, Any]] = {}  # micro-batch -> its values
        self._next: tuple[int, dict[str, dict[str, Any]]] = (0, {})  # the same once this version is committed
        self._new: dict[tuple[int, int], dict[str, Any]] = {}  # (step, micro-batch) -> its values, if changed here
        self._place: tuple[int, int] | None = None
        self._values: dict[str, Any] = {}  # of the place
        self._device = torch.device("cpu")
        self._stages = 1

    def begin(self, order: DataOrder, device: torch.device, stages: int = 1) -> None:
        """Training is prepared, over data in this order."""
        self._order, self._device, self._stages = order, device, stages

    # ------------------------------------------------------------ while a micro-batch is computed

    def enter(self, step: int, micro_batch: int) -> None:
        """The computation of a micro-batch begins: the script's turn for it, or its forward in `run.steps`."""
        self._place = step, micro_batch
        self._new = {key: text for key, text in self._new.items() if key[0] == step and key[1] != micro_batch}
        self._values = self._states_before(step).get(str(micro_batch), {})

    def leave(self) -> None:
        """Its gradients are taken: what it leaves is set."""
        self._place = None

    def _here(self) -> tuple[int, int]:
        if self._order is not None and self._order.turns.alternates:
            raise UsageError(
                "run.stream_state: each batch is computed several times, by several optimizers that take turns or for "
                "run.gather_batch (embedding_size=), and a state would be carried on each time: use "
                "run.prepare(..., updates='simultaneous'), or one hand-out of a batch"
            )
        if self._stages != 1:
            stages = "auto" if self._stages < 1 else self._stages
            raise UsageError(
                f"run.stream_state: a micro-batch is computed by the ranks of stages={stages}, and a state is carried "
                "on by one: use stages=1"
            )
        if self._place is None:
            raise UsageError(
                "run.stream_state has values in a turn of the loop over run.prepare's batches, before optimizer.step() "
                "(with accumulation=, anywhere in the turn), and in run.steps while the model and loss_fn are called: "
                "read and set it there; what all ranks share is run.state"
            )
        return self._place

    def __getitem__(self, name: str) -> Any:
        self._here()
        return to_device(_copied(self._values[name]), self._device)

    def __setitem__(self, name: str, value: Any) -> None:
        self._here()
        if not isinstance(name, str):
            raise UsageError(f"{STREAM_STATE}[{name!r}]: names are text, got a {type(name).__name__}")
        encode(value, f"{STREAM_STATE}[{name!r}]", outline)
        self._change({**self._values, name: _copied(value)})

    def __delitem__(self, name: str) -> None:
        self._here()
        left = dict(self._values)
        del left[name]
        self._change(left)

    def __iter__(self) -> Iterator[str]:
        self._here()
        return iter(self._values)

    def __len__(self) -> int:
        self._here()
        return len(self._values)

    def __repr__(self) -> str:
        return f"{STREAM_STATE}({list(self._values) if self._place is not None else '...'})"

    def _change(self, values: dict[str, Any]) -> None:
        place, count = self._here(), self._count
        size = len(json.dumps(encode(values, STREAM_STATE, outline)))
        if size * count > REGISTERED_BYTES:
            raise UsageError(
                f"run.stream_state: the values of one micro-batch take {size_text(size)} without its large tensors, "
                f"those of all {count} of a step {size_text(size * count)}, and the limit is "
                f"{size_text(REGISTERED_BYTES)} in all, since every step agrees on them: keep what is large in tensors "
                f"or arrays of at least {size_text(LARGE_BYTES)} each, which may have any size"
            )
        self._values = self._new[place] = values

    @property
    def _count(self) -> int:
        return self._order.micro_batches if self._order is not None else 1

    # ------------------------------------------------------------ the agreement of a step

    def _states_before(self, step: int) -> dict[str, dict[str, Any]]:
        """What the micro-batches of a step begin with: nothing in the first step of an epoch."""
        order = self._order
        if order is None or self._version == 0:
            return {}
        if order.by_epoch and order.epoch_of(self._version - 1) != order.epoch_of(step):
            return {}
        return self._agreed

    def own(self, step: int, micro_batches: Collection[int]) -> dict[str, dict[str, Any]]:
        """What has been left here in this step, of the micro-batches whose gradients this rank holds."""
        return {str(m): values for (at, m), values in self._new.items() if at == step and m in micro_batches}

    def share(
        self, step: int, own: Mapping[str, Any], registered: dict[str, Any], gathering: Gathering, keep: Keep
    ) -> None:
        """Some rank has left something in this step: gather that of all, among the registered states."""
        found, large = dict(self._states_before(step)), bytearray()

        def add(where: str, value: Any) -> list[str]:
            start = len(large)
            large.extend(bytes_of(value))
            return [str(start), str(len(large))]

        said = json.dumps(encode(dict(own), STREAM_STATE, add))
        table = {rank: json.loads(text) for rank, text in gathering.texts(json.dumps([len(large), said])).items()}
        contents = gathering.contents(of_bytes(large)) if any(length for length, _ in table.values()) else {}
        for rank, (_, text) in table.items():

            def give(part: list[str], rank: int = rank) -> bytearray:
                return bytearray(host_bytes(contents[rank])[int(part[0]) : int(part[1])])

            found |= decode(json.loads(text), give)
        self._next = step + 1, found
        registered[STREAM_STATE] = encode(self._as_state(*self._next), STREAM_STATE, keep)

    def foresee(self, registered: Mapping[str, Any], give: Give) -> None:
        """These are the registered states of a step that was agreed on, perhaps without this rank."""
        state = registered.get(STREAM_STATE)
        if state is not None and state["version"] != self._next[0]:
            self._next = state["version"], _states(decode(state, give))

    def commit(self, registered: Mapping[str, Any]) -> None:
        """A step with these registered states is committed: those of this object were shared or foreseen."""
        state = registered.get(STREAM_STATE)
        if state is not None and state["version"] != self._version:
            assert state["version"] == self._next[0]
            self._version, self._agreed = self._next

    def _as_state(self, version: int, states: Mapping[str, Any]) -> dict[str, Any]:
        return {"count": self._count, "states": dict(sorted(states.items())), "version": version}

    def state_dict(self) -> dict[str, Any]:
        return self._as_state(self._version, self._agreed)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The states at an earlier time, or of other ranks; none where a checkpoint has them for another batch."""
        fits = state["count"] == self._count
        self._version, self._agreed = (state["version"], _states(state)) if fits else (0, {})
        self._next = self._version, self._agreed
        self._new.clear()


def _states(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The states by micro-batch; an earlier version had them as JSON texts."""
    return {m: decode(json.loads(one)) if isinstance(one, str) else one for m, one in state["states"].items()}


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone(memory_format=torch.contiguous_format)
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, list | tuple):
        items = [_copied(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value
