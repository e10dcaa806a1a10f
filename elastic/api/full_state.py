"""The whole state of a model and its optimizer, joined from the states of its shards."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.engine.engine import Engine
from everstep.elastic.engine.recovery import Recovery
from everstep.elastic.holding.stack import LayerStack
from everstep.elastic.holding.user_optimizer import AVERAGE
from everstep.resharding.units import Shard

from .interruptible import Interruptible

GATHER_TIMEOUT_S = 120.0


class FullState:
    """Reads the whole state on one rank, from the snapshot keepers: no other rank need do anything for it.

    `alone`: without the launcher there are no keepers, and this rank holds everything.
    """

    def __init__(self, engine: Engine, recovery: Recovery, parts: Interruptible, *, alone: bool) -> None:
        self._engine = engine
        self._recovery = recovery
        self._parts = parts
        self._alone = alone

    def read(self, *, recovers: bool = True) -> dict[str, Any]:
        """The state as `Run.full_state_dict` returns it. Raises UsageError if shards do not appear.

        After the end of a generation it recovers and continues, or, without `recovers`, raises Aborted.
        """
        engine = self._engine
        states = self._states([shard.index for shard in engine.stack.spec.shards], recovers=recovers)
        return assemble(engine.stack, states, averaged=engine.optimizer.decay is not None)

    def values(self, parameters: Collection[int]) -> dict[int, Tensor]:
        """The values of these parameters, in one dimension. Raises Aborted after the end of a generation."""
        shards = [shard for shard in self._engine.stack.spec.shards if shard.parameter in parameters]
        states = self._states([shard.index for shard in shards], recovers=False)
        parts: dict[int, list[Tensor]] = {}
        for shard in shards:
            parts.setdefault(shard.parameter, []).append(states[shard.index]["value"].detach().reshape(-1).cpu())
        return {parameter: torch.cat(values) for parameter, values in parts.items()}

    def _states(self, shards: Sequence[int], *, recovers: bool) -> dict[int, dict[str, Any]]:
        deadline = time.monotonic() + GATHER_TIMEOUT_S
        while True:
            states = self._shard_states(shards)
            if len(states) == len(shards):
                return states
            if time.monotonic() > deadline:
                raise UsageError(
                    f"full_state_dict: {len(shards) - len(states)} shards of version {self._engine.version} did not "
                    f"appear in any snapshot keeper within {GATHER_TIMEOUT_S:g} s"
                )
            if recovers:
                self._parts.do(self._pause)
            else:
                self._pause()

    def _shard_states(self, shards: Sequence[int]) -> dict[int, dict[str, Any]]:
        engine = self._engine
        engine.progress.tick()
        engine.snapshots.wait(engine.progress.tick)
        if self._alone:
            engine.check_values(thorough=True)
            return {s.index: dict(engine.store.state(s.index)) for s in engine.store.owned}
        return self._recovery.loader.kept(shards, engine.version, engine.progress.tick)

    def _pause(self) -> None:
        """Let 20 ms pass, unless the generation ends."""
        self._engine.progress.tick()
        self._engine.comm.ready(())
        time.sleep(0.02)


def assemble(stack: LayerStack, states: Mapping[int, Mapping[str, Any]], *, averaged: bool = False) -> dict[str, Any]:
    """Shard -> its state ("value", and the optimizer's) as `Run.full_state_dict` returns it.

    `averaged`: with the moving averages, which are the values before the first step and for batch-norm statistics.
    """
    spec = stack.spec
    model: dict[str, Tensor] = {}
    masters: dict[str, Tensor] = {}
    averages: dict[str, Tensor] = {}
    optimizer: dict[str, dict[str, Any]] = {}
    shards_of: dict[int, list[Shard]] = {}
    for shard in spec.shards:
        shards_of.setdefault(shard.parameter, []).append(shard)
    for index, parameter in enumerate(spec.parameters):
        shards = shards_of[index]
        columns: dict[str, list[Any]] = {}
        for shard in shards:
            for name, value in states[shard.index].items():
                columns.setdefault(name, []).append(value)
        joined = {
            name: _join(values, [s.elements for s in shards], parameter.shape) for name, values in columns.items()
        }
        value = joined.pop("value")
        model[parameter.name] = value.to(getattr(torch, parameter.dtype))
        if value.dtype != model[parameter.name].dtype:
            masters[parameter.name] = value
        averages[parameter.name] = joined.pop(AVERAGE, value).to(getattr(torch, parameter.dtype))
        if joined:
            optimizer[parameter.name] = joined
    for name, tensor in stack.constants():
        model[name] = tensor.detach().to("cpu", copy=True)
    for name, original in stack.aliases.items():
        model[name] = model[original]
    found = {"model": model, "optimizer": optimizer, **({"masters": masters} if masters else {})}
    return {**found, "average": averages} if averaged else found


def _join(values: list[Any], elements: list[int], shape: tuple[int, ...]) -> Any:
    """Join rows into a parameter; a state that is one scalar per shard has the same value in all of them."""
    cut = [
        isinstance(v, Tensor) and v.numel() == count and v.dim() > 0 for v, count in zip(values, elements, strict=True)
    ]
    if all(cut):
        return torch.cat([v.detach().reshape(-1).cpu() for v in values]).view(shape)
    return values[0].detach().cpu().clone() if isinstance(values[0], Tensor) else values[0]
