"""ZeRO-1: the user's torch optimizer, run on the shards that this rank owns.

A shard is a parameter of its own to the optimizer, a view into the live parameter; torch's optimizer code runs on it
unchanged, so the state has torch's names and the arithmetic torch's bits. Shards are cut by the model alone, never by
the layout, so those bits do not depend on who owns what. (Rajbhandari et al., 2020.)
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from everstep.checkpointing.memory.record import ShardState, record_bytes
from everstep.elastic.contract.errors import UsageError
from everstep.resharding.units import Shard

from .hyperparameters import (
    Groups,
    pack,
    plain,
    same,
    settings_of,
    unpack,
)
from .stack import LayerStack

_ELEMENTWISE = frozenset(
    {"SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "ASGD", "Rprop"}
)
_PROBE = 7  # elements of the dummy parameter that shows what state an optimizer keeps


def is_elementwise(optimizer: Optimizer) -> bool:
    """Whether the optimizer treats every element by itself, so that a parameter may be cut."""
    kind = type(optimizer)
    return kind.__module__.startswith("torch.optim") and kind.__name__ in _ELEMENTWISE


def check_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Raise UsageError for an optimizer that cannot drive this model's shards."""
    known = {id(p) for p in model.parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in known:
                raise UsageError(
                    f"the optimizer's group {number} has a parameter of shape {tuple(parameter.shape)} that the model "
                    "lacks: build the optimizer from model.parameters() of the model you pass"
                )
    if type(optimizer).__name__ in ("LBFGS", "SparseAdam"):
        raise UsageError(f"{type(optimizer).__name__} is not supported: it needs a closure or sparse gradients")
    if optimizer.state:
        raise UsageError("the optimizer has state already: pass a new one (resuming is the checkpoint's business)")


class ShardedOptimizer:
    """The optimizer of the shards owned here. `groups` of the user's optimizer give the hyper-parameters."""

    def __init__(self, optimizer: Optimizer, stack: LayerStack) -> None:
        self.user = optimizer
        self.stack = stack
        of_tensor = {
            id(parameter): number
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }
        self._group = {index: of_tensor.get(id(tensor)) for index, tensor in stack.parameter_of.items()}
        self._parameters: dict[int, nn.Parameter] = {}
        self._shards: dict[int, Shard] = {}
        self._inner = self._clone()
        self._templates: dict[int, dict[str, Any]] = {}

    def _clone(self) -> Optimizer:
        """The same optimizer with no parameters and no state."""
        clone: Optimizer = type(self.user).__new__(type(self.user))
        clone.__dict__.update(self.user.__dict__)
        clone.__dict__.pop("step", None)  # a scheduler's patch of the user's instance
        clone.state = defaultdict(dict)
        clone.param_groups = [{**group, "params": []} for group in self.user.param_groups]
        return clone

    @property
    def owned(self) -> tuple[Shard, ...]:
        return tuple(self._shards[index] for index in sorted(self._shards))

    def own(self, shards: Iterable[Shard]) -> None:
        """Own exactly these shards: keep the state of those owned already, drop the others', add the new stateless."""
        shards = sorted(shards)
        parameters: dict[int, nn.Parameter] = {}
        for shard in shards:
            view = self._view(shard)
            kept = self._parameters.get(shard.index)
            if kept is not None:
                kept.data = view
            parameters[shard.index] = kept if kept is not None else nn.Parameter(view, requires_grad=False)
        for index, parameter in self._parameters.items():
            if index not in parameters:
                self._inner.state.pop(parameter, None)
        self._parameters = parameters
        self._shards = {shard.index: shard for shard in shards}
        members: dict[int | None, list[nn.Parameter]] = {}
        for shard in shards:
            members.setdefault(self._group[shard.parameter], []).append(parameters[shard.index])
        for number, group in enumerate(self._inner.param_groups):
            group["params"] = members.get(number, [])

    def _view(self, shard: Shard) -> Tensor:
        view = self.stack.view(shard)
        return view.view(self.stack.spec.parameters[shard.parameter].shape) if self.stack.spec.whole else view

    def hyper_parameters(self) -> Groups:
        """The groups' present settings (lr, betas, ...), as JSON values."""
        return [settings_of(group) for group in self.user.param_groups]

    def describe(self) -> str:
        """The optimizer's type and settings, to be compared between ranks."""
        return f"{type(self.user).__name__} {json.dumps(pack(self.hyper_parameters())['settings'])}"

    def set_hyper_parameters(self, groups: Groups) -> None:
        """Give the user's groups these settings."""
        for group, settings in zip(self.user.param_groups, groups, strict=True):
            for name, value in settings.items():
                present = group.get(name)
                if name in group and same(plain(present), value):
                    continue
                if isinstance(present, Tensor):
                    present.fill_(value)
                else:
                    group[name] = tuple(value) if isinstance(present, tuple) else value

    def update(self, gradients: Mapping[int, Tensor], terms: Mapping[str, Any]) -> None:
        """One step of the shards named in `gradients` (shard -> one-dimensional gradient), on these agreed terms.

        `scale` is what clipping multiplies gradients with, `clip` has the limit of an element, the parameters in
        `frozen` are left alone, as torch's optimizers leave those (`idle`, by number) that no micro-batch of the step
        had a gradient of, and a step that is skipped (`skip`) leaves everything. The tensors given stay as they
        are.
        """
        if terms.get("skip"):
            return
        idle = terms.get("idle", ())
        scale, limit, frozen = terms["scale"], terms.get("clip", {}).get("value"), set(terms.get("frozen", ()))
        for index, parameter in self._parameters.items():
            gradient = gradients.get(index)
            shard = self._shards[index]
            if gradient is None or shard.parameter in idle:
                continue
            if self.stack.averaged(shard.parameter):
                parameter.copy_(
                    gradient.view(parameter.shape).round() if not parameter.is_floating_point() else gradient
                )
            elif self._group[shard.parameter] is not None:
                if self.stack.spec.parameters[shard.parameter].name in frozen:
                    continue
                clipped = gradient if scale is None or scale >= 1.0 else gradient * scale
                clipped = clipped if limit is None else clipped.clamp(-limit, limit)
                parameter.grad = clipped.to(parameter.device, parameter.dtype).view(parameter.shape)
        for group, settings in zip(self._inner.param_groups, unpack(terms["groups"]), strict=True):
            group.update(settings)
        try:
            self._inner.step()
        finally:
            for parameter in self._parameters.values():
                parameter.grad = None

    def state(self, shard: int) -> ShardState:
        """A shard's parameter values and optimizer state, sharing their memory."""
        parameter = self._parameters[shard]
        return {"value": parameter.data, **self._inner.state.get(parameter, {})}

    def load(self, shard: int, state: ShardState) -> None:
        """Set a shard's parameter values (in the live parameter) and optimizer state."""
        parameter = self._parameters[shard]
        parameter.data.copy_(state["value"])
        rest = {name: value for name, value in state.items() if name != "value"}
        self._inner.state.pop(parameter, None)
        if rest:
            self._inner.state[parameter] = {
                name: self._place(value, shard) if isinstance(value, Tensor) else value for name, value in rest.items()
            }

    def _place(self, value: Tensor, shard: int) -> Tensor:
        """As torch does it: scalar state, such as Adam's step, stays on the CPU unless the kernel reads it."""
        group = self.user.param_groups[self._group[self._shards[shard].parameter] or 0]
        on_device = value.dim() or group.get("fused") or group.get("capturable")
        return value.to(self._parameters[shard].device) if on_device else value

    def state_bytes(self, shard: Shard) -> int:
        """How many bytes the record of a shard's state takes once the optimizer has stepped."""
        value = self._view(shard)
        if self.stack.averaged(shard.parameter) or self._group[shard.parameter] is None:
            return record_bytes({"value": value}) + 256
        if self.stack.spec.whole:
            state = self._probe(torch.zeros_like(value), shard)
        else:
            group = self._group[shard.parameter] or 0
            if group not in self._templates:
                self._templates[group] = self._probe(value.new_zeros(_PROBE, dtype=torch.float32), shard)
            state = {
                name: torch.empty(value.shape, dtype=value.dtype, device="meta")
                if isinstance(item, Tensor) and item.numel() == _PROBE
                else item
                for name, item in self._templates[group].items()
            }
        return record_bytes({"value": value, **state}) + 256

    def _probe(self, like: Tensor, shard: Shard) -> dict[str, Any]:
        dummy = nn.Parameter(like)
        dummy.grad = torch.zeros_like(like)
        clone = self._clone()
        clone.param_groups = [{**clone.param_groups[self._group[shard.parameter] or 0], "params": [dummy]}]
        clone.step()
        return dict(clone.state.get(dummy, {}))
