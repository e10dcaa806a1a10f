"""The user's torch optimizer: its groups and settings, the type in which it steps, and the state it keeps of a shard.

A parameter of low precision has a *master*: its value in float32, which the optimizer steps with float32 gradients. The
parameter that forwards compute with is the master, rounded. Without it, updates that are smaller than half a unit in
the last place of the parameter are lost (Micikevicius et al., 2018).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from everstep.checkpointing.memory.record import record_bytes
from everstep.elastic.contract.errors import UsageError
from everstep.resharding.units import Shard

from .hyperparameters import Groups, give_settings, same, settings_of
from .several_optimizers import AnyOptimizer, Collector, clone_of, parts_of
from .stack import LayerStack

_ELEMENTWISE = frozenset(
    {"SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "ASGD", "Rprop"}
)
AVERAGE = "ema"  # the name of a parameter's moving average among its states
_PROBE = 7  # elements of the dummy parameter that reveals an optimizer's state
_MARGIN_BYTES = 256  # of a record, beyond the size of its state after the first step


def is_elementwise(optimizer: AnyOptimizer) -> bool:
    """Whether the optimizer treats each element separately, so that a parameter may be cut."""
    kinds = [type(part) for part in parts_of(optimizer)]
    known = {kind for kind in kinds if kind.__module__.startswith("torch.optim") and kind.__name__ in _ELEMENTWISE}
    return known >= {*kinds} - {Collector}


def check_optimizer(optimizer: AnyOptimizer, model: nn.Module) -> None:
    """Raise UsageError for an optimizer that cannot drive this model's shards."""
    kinds = (("model", "Module", model, nn.Module), ("optimizer", "Optimizer", optimizer, AnyOptimizer))
    for what, name, got, kind in kinds:
        if not isinstance(got, kind):
            raise UsageError(
                f"the {what} must be one torch {name}, got {type(got).__name__}: run.prepare([g, d], [opt_g, opt_d], "
                "data) trains several models with their optimizers, run.steps trains one with one"
            )
    for part in parts_of(optimizer):
        _check_part(part, model)


def _check_part(optimizer: Optimizer, model: nn.Module) -> None:
    if "_optimizer_step_pre_hooks" not in vars(optimizer):
        raise UsageError(
            f"{type(optimizer).__name__} is an Optimizer whose __init__ does not call Optimizer.__init__, as of some "
            "that wrap another: ranks step parts of parameters with it, so it needs groups and states of its own. Pass "
            "the optimizer that it wraps, or have it call super().__init__(params, defaults)"
        )
    known = {id(p) for p in model.parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in known:
                raise UsageError(
                    f"the optimizer's group {number} has a parameter of shape {tuple(parameter.shape)} that the model "
                    "lacks: build the optimizer from model.parameters() of the model you pass"
                )
    if type(optimizer).__name__ == "LBFGS":
        raise UsageError(
            "LBFGS is not supported: it evaluates the loss of all data several times a step, and needs sums over all "
            "parameters, of which each rank steps a part. Use AdamW or SGD, or leave the script as it is: everstep run "
            "also runs plain torch scripts, and restarts them"
        )
    if type(optimizer).__name__ == "SparseAdam":
        raise UsageError(
            "SparseAdam is not supported: it steps the rows alone that a batch has used, and the runtime sums "
            'gradients of whole parameters. Use Adam, with sparse=False in the layer or sparse_gradients="dense"'
        )
    if has_state(optimizer):
        raise UsageError(
            "the optimizer has state already, by load_state_dict() or a step() in front of run.prepare or run.steps, "
            "and the job would begin without it. Leave that out, and let the job save and resume by itself: "
            "everstep run --es-checkpoint=FOLDER"
        )
    optimizer.state.clear()  # Adagrad makes it beforehand: ranks make that of the parts which they step


def has_state(optimizer: AnyOptimizer) -> bool:
    """Whether an optimizer has stepped, or was given the state of one that has."""
    states = [state for part in parts_of(optimizer) for state in part.state.values()]
    return any(float(state.get("step", 1)) for state in states)


def master_type(live: torch.dtype, asked: str) -> torch.dtype:
    """The type in which a parameter of type `live` is stepped; `asked`: the setting `master_dtype`."""
    low = live.is_floating_point and live.itemsize < torch.float32.itemsize
    return torch.float32 if low and asked == "float32" else live


class UserOptimizer:
    """The optimizer that the user built. It never steps itself: each `ShardStore` steps a clone of it."""

    def __init__(
        self,
        optimizer: AnyOptimizer,
        stack: LayerStack,
        master_dtype: str = "none",
        decay: float | None = None,
        averaged: nn.Module | None = None,
    ) -> None:
        """`decay`: of the moving average that is kept beside the state of each parameter of `averaged`, by default the
        whole model; None: none is."""
        self.user = optimizer
        self.stack = stack
        self.decay = decay
        of_model = {id(parameter) for parameter in (averaged or stack.model).parameters()}
        self._averaged = {index for index, tensor in stack.parameter_of.items() if id(tensor) in of_model}
        of_tensor = {
            id(parameter): number
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }
        groups = [part for part in parts_of(optimizer) for _ in part.param_groups]
        self._collecting = {number for number, part in enumerate(groups) if isinstance(part, Collector)}
        self._group = {index: of_tensor.get(id(tensor)) for index, tensor in stack.parameter_of.items()}
        self._dtype = {
            index: tensor.dtype if stack.is_buffer(index) else master_type(tensor.dtype, master_dtype)
            for index, tensor in stack.parameter_of.items()
        }
        self._templates: dict[int, dict[str, Any]] = {}

    def clone(self) -> AnyOptimizer:
        """The same optimizer with no parameters and no state."""
        return clone_of(self.user)

    @property
    def name(self) -> str:
        """The type of the optimizer; the types of several, in their order, where they differ."""
        return " and ".join(dict.fromkeys(type(part).__name__ for part in parts_of(self.user)))

    def group_of(self, parameter: int) -> int | None:
        """The number of a parameter's group; None if the optimizer does not have the parameter."""
        return self._group[parameter]

    def steps(self, parameter: int) -> bool:
        """Whether the optimizer steps a parameter: it has it, and it is no statistic of a batch norm."""
        return self._group[parameter] is not None and not self.stack.is_buffer(parameter)

    def collects(self, parameter: int) -> bool:
        """Whether a step takes a parameter's gradient for its value: as it is, not clipped."""
        return self._group[parameter] in self._collecting

    def averages(self, parameter: int) -> bool:
        """Whether a moving average of a parameter is kept."""
        return self.decay is not None and parameter in self._averaged and self.steps(parameter)

    def dtype_of(self, parameter: int) -> torch.dtype:
        """The type in which a parameter is stepped: its own, or that of its master."""
        return self._dtype[parameter]

    def masters(self) -> dict[str, str]:
        """Name -> live type, by torch's name, of the parameters that have a master."""
        specs = self.stack.spec.parameters
        types = {index: str(dtype).removeprefix("torch.") for index, dtype in self._dtype.items()}
        return {specs[index].name: specs[index].dtype for index, dtype in types.items() if dtype != specs[index].dtype}

    # ------------------------------------------------------------ settings

    def hyper_parameters(self) -> Groups:
        """The current settings of the groups (lr, betas, ...), as JSON values."""
        return [settings_of(group) for group in self.user.param_groups]

    def describe(self) -> str:
        """The optimizer's type and what is kept beside its state, for comparison between ranks."""
        masters = " with float32 masters" if self.masters() else ""
        average = f" with an average of decay {self.decay}" if self.decay is not None else ""
        return f"{self.name}{masters}{average}"

    def set_hyper_parameters(self, groups: Groups) -> None:
        """Give the user's groups these settings."""
        give_settings(self.user.param_groups, groups)

    # ------------------------------------------------------------ shards

    def shape_of(self, shard: Shard) -> tuple[int, ...]:
        """The shape in which the optimizer steps a shard: its parameter's if that is not cut, else one dimension."""
        spec = self.stack.spec
        return spec.parameters[shard.parameter].shape if spec.whole else (shard.elements,)

    def state_on_device(self, state: Tensor, parameter: int) -> bool:
        """As in torch: scalar state, such as Adam's step, stays on the CPU unless the kernel reads it."""
        group = self.user.param_groups[self._group[parameter] or 0]
        return bool(state.dim() or group.get("fused") or group.get("capturable"))

    def state_bytes(self, shard: Shard) -> int:
        """The size in bytes of the record of a shard's state after the optimizer's first step."""
        like = self.stack.parameter_of[shard.parameter]
        value = torch.empty(self.shape_of(shard), dtype=self._dtype[shard.parameter], device="meta")
        if not self.steps(shard.parameter):
            return record_bytes({"value": value}) + _MARGIN_BYTES
        if self.stack.spec.whole:
            state = self._probe(torch.zeros(value.shape, dtype=value.dtype, device=like.device), shard)
        else:
            group = self._group[shard.parameter] or 0
            if group not in self._templates:
                self._templates[group] = self._probe(
                    torch.zeros(_PROBE, dtype=torch.float32, device=like.device), shard
                )
            # The same tensor again, since only sizes matter: torch's empty_like of a tensor without memory imports
            # sympy.
            state = {
                name: value if isinstance(item, Tensor) and item.numel() == _PROBE else item
                for name, item in self._templates[group].items()
            }
        average = {AVERAGE: value} if self.averages(shard.parameter) else {}
        return record_bytes({"value": value, **state, **average}) + _MARGIN_BYTES

    def _probe(self, like: Tensor, shard: Shard) -> dict[str, Any]:
        dummy = nn.Parameter(like)
        dummy.grad = torch.zeros_like(like)
        clone = self.clone()
        group = clone.param_groups[self._group[shard.parameter] or 0]
        group["params"] = [dummy]
        before = settings_of(group)
        clone.step()
        self._check_kept(clone, dummy, before, settings_of(group))
        return dict(clone.state.get(dummy, {}))

    def _check_kept(
        self, stepped: AnyOptimizer, parameter: Tensor, before: dict[str, Any], after: dict[str, Any]
    ) -> None:
        """Raise UsageError if the first step has left something that cannot be kept by parameter."""
        changed = [name for name, value in after.items() if name not in before or not same(before[name], value)]
        others = [key for key in stepped.state if key is not parameter]
        if changed:
            raise UsageError(
                f"{self.name} changes {changed[-1]!r} of its parameter group in step(), which ranks would not share, "
                "as each steps a part of the parameters: let it keep what it needs by parameter"
            )
        if others:
            raise UsageError(
                f"{self.name} keeps a state of no parameter ({others[0]!r}), which ranks would not share, as each "
                "steps a part of the parameters: let it keep what it needs by parameter"
            )
        for name, value in stepped.state.get(parameter, {}).items():
            if value is not None and not isinstance(value, Tensor | bool | int | float | str):
                raise UsageError(
                    f"{self.name} keeps {name!r} of a parameter as a {type(value).__name__}: a state must be a tensor, "
                    "a number, a text or None"
                )
