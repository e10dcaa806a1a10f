"""`run.stream_state`: what a script carries from a micro-batch to the micro-batch of the next step in the same place.

A recurrent model's hidden state continues in each of the M micro-batches of a step by itself: micro-batch m of step
t + 1 begins with what m of step t has left, whichever ranks compute them. A rank that has computed a micro-batch has
its new state. The agreement of the step gathers them all, so they are protected, saved and restored with it, and a
micro-batch that is computed again begins with the state of the step before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from typing import Any

import torch

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.stateful import REGISTERED_BYTES, decode, encode, size_text

from .devices import to_device
from .order import DataOrder

STREAM_STATE = "run.stream_state"  # its name among the registered objects


class StreamStates(MutableMapping[str, Any]):
    """The named values of the micro-batch that the script is at. Those of all are agreed on in each step.

    What is read is a copy on the model's device, without gradients. Raises UsageError outside a turn of the loop.
    """

    def __init__(self) -> None:
        self._order: DataOrder | None = None
        self._version = 0  # the step in front of which the agreed states are
        self._agreed: dict[str, str] = {}  # micro-batch -> its values, as JSON
        self._new: dict[tuple[int, int], str] = {}  # (step, micro-batch) -> its values, changed here in this step
        self._place: tuple[int, int] | None = None
        self._values: dict[str, Any] = {}  # of the place, as JSON values
        self._device = torch.device("cpu")

    def begin(self, order: DataOrder, device: torch.device) -> None:
        """The script's own loop is prepared, over data in this order."""
        self._order, self._device = order, device

    # ------------------------------------------------------------ in a turn of the loop

    def enter(self, step: int, micro_batch: int) -> None:
        """The script's turn for a micro-batch begins."""
        self._place = step, micro_batch
        self._new = {key: text for key, text in self._new.items() if key[0] == step and key[1] != micro_batch}
        text = self._states_before(step).get(str(micro_batch))
        self._values = json.loads(text) if text else {}

    def leave(self) -> None:
        """The gradients of the turn are taken: what it leaves is set."""
        self._place = None

    def _here(self) -> tuple[int, int]:
        if self._order is not None and self._order.turns.alternates:
            raise UsageError(
                "run.stream_state: each batch is computed several times, by several optimizers that take turns or for "
                "run.gather_batch (embedding_size=), and a state would be carried on each time: use "
                "run.prepare(..., updates='simultaneous'), or one hand-out of a batch"
            )
        if self._place is None:
            raise UsageError(
                "run.stream_state has values in a turn of the loop over run.prepare's batches, before optimizer.step() "
                "(with accumulation=, anywhere in the turn): read and set it there; what all ranks share is run.state"
            )
        return self._place

    def __getitem__(self, name: str) -> Any:
        self._here()
        return to_device(decode(self._values[name]), self._device)

    def __setitem__(self, name: str, value: Any) -> None:
        self._here()
        if not isinstance(name, str):
            raise UsageError(f"{STREAM_STATE}[{name!r}]: names are text, got a {type(name).__name__}")
        self._change({**self._values, name: encode(value, f"{STREAM_STATE}[{name!r}]")})

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
        text = json.dumps(values)
        if len(text) * count > REGISTERED_BYTES:
            raise UsageError(
                f"run.stream_state: the values of one micro-batch take {size_text(len(text))} (tensors as base64), "
                f"those of all {count} of a step {size_text(len(text) * count)}, and the limit is "
                f"{size_text(REGISTERED_BYTES)} in all, since every step agrees on them: carry the hidden state of the "
                "last time step alone"
            )
        self._values, self._new[place] = values, text

    @property
    def _count(self) -> int:
        return self._order.micro_batches if self._order is not None else 1

    # ------------------------------------------------------------ the agreement of a step

    def _states_before(self, step: int) -> dict[str, str]:
        """What the micro-batches of a step begin with: nothing in the first step of an epoch."""
        order = self._order
        if order is None or self._version == 0:
            return {}
        if order.by_epoch and order.epoch_of(self._version - 1) != order.epoch_of(step):
            return {}
        return self._agreed

    def own(self, step: int, micro_batches: Collection[int]) -> dict[str, str]:
        """What turns on this rank have left in this step, of the micro-batches whose gradients it holds."""
        return {str(m): text for (at, m), text in self._new.items() if at == step and m in micro_batches}

    def share(
        self,
        step: int,
        own: Mapping[str, str],
        registered: dict[str, Any],
        exchange: Callable[[str], Mapping[int, str]],
    ) -> None:
        """A turn on some rank has left something in this step: gather that of all, among the registered states."""
        found = dict(self._states_before(step))
        for text in exchange(json.dumps(own)).values():
            found |= json.loads(text)
        registered[STREAM_STATE] = self._as_state(step + 1, found)

    def commit(self, registered: Mapping[str, Any]) -> None:
        """A step with these registered states is committed."""
        state = registered.get(STREAM_STATE)
        if state is not None and state["version"] != self._version:
            self._version, self._agreed = state["version"], state["states"]

    def _as_state(self, version: int, states: Mapping[str, str]) -> dict[str, Any]:
        return {"count": self._count, "states": dict(sorted(states.items())), "version": version}

    def state_dict(self) -> dict[str, Any]:
        return self._as_state(self._version, self._agreed)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The states at an earlier time, or of other ranks; none where a checkpoint has them for another batch."""
        fits = state["count"] == self._count
        self._version, self._agreed = (state["version"], dict(state["states"])) if fits else (0, {})
        self._new.clear()
