"""The shards that a rank holds: their values and optimizer state, and the optimizer that runs on them (ZeRO-1).

To the optimizer, a shard is a parameter of its own; torch's optimizer code runs on it unchanged, so the state has
torch's names and the arithmetic torch's bits. The model alone determines how shards are cut, never the layout, so those
bits do not depend on the ownership. (Rajbhandari et al., 2020.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from everstep.checkpointing.memory.record import ShardState
from everstep.elastic.protocol.terms import Terms
from everstep.resharding.units import Shard

from .buffer_rules import after_step
from .hyperparameters import unpack
from .several_optimizers import takes_turns
from .user_optimizer import AVERAGE, UserOptimizer


class ShardStore:
    """The values and the optimizer state of some shards, in the type in which the optimizer steps them.

    `live` returns a shard's elements in the model. If they are of that type, they are the values: both share their
    memory. Otherwise the store has its own memory, and writes the rounded values to the model whenever they change.
    Without `live` the shards are not part of the model (backups, approximations).
    """

    def __init__(self, optimizer: UserOptimizer, live: Callable[[Shard], Tensor] | None = None) -> None:
        self.optimizer = optimizer
        self._stack = optimizer.stack
        self._live = live
        self._parameters: dict[int, nn.Parameter] = {}
        self._shards: dict[int, Shard] = {}
        self._rounded: frozenset[int] = frozenset()  # the shards that are masters of the model's
        self._inner = optimizer.clone()
        self._averages: dict[int, Tensor] = {}  # moving averages of the values, where the optimizer has a decay

    @property
    def owned(self) -> tuple[Shard, ...]:
        """The shards in this store, in order."""
        return tuple(self._shards[index] for index in sorted(self._shards))

    def own(self, shards: Iterable[Shard]) -> None:
        """Own exactly these shards: keep the state of those owned already, drop others, add new ones without state."""
        shards = sorted(shards)
        parameters: dict[int, nn.Parameter] = {}
        for shard in shards:
            kept = self._parameters.get(shard.index)
            if kept is None:
                kept = nn.Parameter(self._memory(shard), requires_grad=False)
            elif not self.apart(shard):
                kept.data = self._memory(shard)  # the model's memory may have moved
            parameters[shard.index] = kept
        for index, parameter in self._parameters.items():
            if index not in parameters:
                self._inner.state.pop(parameter, None)
        self._averages = {index: average for index, average in self._averages.items() if index in parameters}
        self._parameters = parameters
        self._shards = {shard.index: shard for shard in shards}
        self._rounded = frozenset(s.index for s in shards if self._live is not None and self.apart(s))
        members: dict[int | None, list[nn.Parameter]] = {}
        for shard in shards:
            members.setdefault(self.optimizer.group_of(shard.parameter), []).append(parameters[shard.index])
        for number, group in enumerate(self._inner.param_groups):
            group["params"] = members.get(number, [])

    def apart(self, shard: Shard) -> bool:
        """Whether a shard's values have memory apart from the model's."""
        live = self._stack.parameter_of[shard.parameter].dtype
        return self._live is None or live != self.optimizer.dtype_of(shard.parameter)

    def _memory(self, shard: Shard) -> Tensor:
        """The memory for a shard's values."""
        shape = self.optimizer.shape_of(shard)
        if self._live is not None and not self.apart(shard):
            return self._live(shard).view(shape)
        device = self._stack.parameter_of[shard.parameter].device
        return torch.empty(shape, dtype=self.optimizer.dtype_of(shard.parameter), device=device)

    def seed(self) -> None:
        """Copy the values of all shards from the model as it was built."""
        for shard in filter(self.apart, self._shards.values()):
            whole = self._stack.parameter_of[shard.parameter].data.reshape(-1)
            self.load(shard.index, {"value": whole[shard.start : shard.stop].view(self.optimizer.shape_of(shard))})

    def update(self, gradients: Mapping[int, Tensor], terms: Terms) -> None:
        """One step of the shards in `gradients` (shard -> one-dimensional gradient), with the agreed settings.

        Gradients are divided by the number of tokens, where these are counted; clipping multiplies them with `scale`,
        and `clip` contains the limit of an element. The parameters in `frozen` do not change; nor do those in `idle`
        (by number), of which no micro-batch of the step had a gradient, as with torch's optimizers; nor any parameter
        in a step that is skipped (`skip`). The tensors in `gradients` are not modified.
        """
        if terms.skip:
            return
        scale, limit, frozen = terms.scale, terms.clip.get("value"), set(terms.frozen)
        for index, parameter in self._parameters.items():
            gradient = gradients.get(index)
            shard = self._shards[index]
            if gradient is None or shard.parameter in terms.idle:
                continue
            if (rule := self._stack.rule(shard.parameter)) is not None:
                parameter.copy_(after_step(rule, parameter.data, gradient))
            elif self.optimizer.group_of(shard.parameter) is not None:
                if self._stack.spec.parameters[shard.parameter].name in frozen:
                    continue
                gradient = gradient / terms.tokens if terms.tokens else gradient
                clipped = gradient
                if not self.optimizer.collects(shard.parameter):
                    clipped = clipped if scale is None or scale >= 1.0 else clipped * scale
                    clipped = clipped if limit is None else clipped.clamp(-limit, limit)
                parameter.grad = clipped.to(parameter.device, parameter.dtype).view(parameter.shape)
        for group, settings in zip(self._inner.param_groups, unpack(terms.groups), strict=True):
            group.update(settings)
        averaged = self._averaged(gradients, terms)
        try:
            self._inner.step()
        finally:
            for parameter in self._parameters.values():
                parameter.grad = None
        for index in averaged:
            assert self.optimizer.decay is not None
            self._averages[index].lerp_(self._parameters[index].data, 1.0 - self.optimizer.decay)
        for index in self._rounded:
            if index in gradients:
                self._round(index)

    def _averaged(self, gradients: Mapping[int, Tensor], terms: Terms) -> list[int]:
        """The shards whose values are averaged; an average begins with the values before the first step.

        Where optimizers take turns, an average goes on in the steps of its parameter's own one.
        """
        if self.optimizer.decay is None:
            return []
        idle = set(terms.idle) if takes_turns(self.optimizer.user) else ()
        parameters = {index: self._shards[index].parameter for index in gradients if index in self._shards}
        found = [
            i for i, parameter in parameters.items() if self.optimizer.averages(parameter) and parameter not in idle
        ]
        for index in found:
            if index not in self._averages:
                self._averages[index] = self._parameters[index].data.clone()
        return found

    def _round(self, index: int) -> None:
        """Write a shard's values to the model."""
        assert self._live is not None
        self._live(self._shards[index]).copy_(self._parameters[index].data.view(-1))

    def state(self, shard: int) -> ShardState:
        """A shard's parameter values and optimizer state, sharing their memory."""
        parameter = self._parameters[shard]
        average = {AVERAGE: self._averages[shard]} if shard in self._averages else {}
        return {"value": parameter.data, **self._inner.state.get(parameter, {}), **average}

    def load(self, shard: int, state: ShardState) -> None:
        """Set a shard's values, in the model too, and its optimizer state, to copies of the given tensors.

        Values of another type are converted, and so are states of that type, element by element.
        """
        parameter = self._parameters[shard]
        parameter.data.copy_(state["value"])
        if shard in self._rounded:
            self._round(shard)
        rest = {name: value for name, value in state.items() if name not in ("value", AVERAGE)}
        self._averages.pop(shard, None)
        if AVERAGE in state and self.optimizer.averages(self._shards[shard].parameter):
            self._averages[shard] = self._placed(state[AVERAGE], shard, state["value"].dtype)
        self._inner.state.pop(parameter, None)
        if rest:
            self._inner.state[parameter] = {
                name: self._placed(value, shard, state["value"].dtype) if isinstance(value, Tensor) else value
                for name, value in rest.items()
            }

    def _placed(self, value: Tensor, shard: int, stored: torch.dtype) -> Tensor:
        parameter = self._parameters[shard]
        states = value.dtype == stored and value.shape == parameter.shape  # a step count is not converted
        on_device = self.optimizer.state_on_device(value, self._shards[shard].parameter)
        dtype = parameter.dtype if states else value.dtype
        return value.to(parameter.device if on_device else "cpu", dtype, copy=True)
