"""The user's model as a stack of layers: the parameters of each, and the layers that this worker holds now."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from everstep.elastic.contract.errors import UsageError
from everstep.resharding.units import ModelSpec, ParameterSpec, Shard

from .buffer_rules import Rule, ready_rules, rules_of


@dataclass
class Held:
    """One parameter as one layer holds it. A tied parameter has one per layer, with shared memory where both are held.

    `rule` marks a buffer that forwards change: how its value after a step comes from the step's micro-batches.
    """

    index: int
    tensor: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    rule: Rule | None = None
    places: list[tuple[nn.Module, str]] = field(default_factory=list)  # the modules that use it, and its names there


@dataclass
class Layer:
    """A layer: the module, and its trainable parameters in canonical order."""

    module: nn.Module
    parameters: list[Held] = field(default_factory=list)
    other_buffers: list[tuple[str, Tensor]] = field(default_factory=list)


class LayerStack:
    """The layers of a model, cut for pipeline stages where the model allows that.

    An `nn.Sequential`, or a module with a method `pipeline_layers()` that returns its layers in order (such that
    applying them one after the other is the model), has a layer per element; any other module is one layer.
    """

    def __init__(
        self, model: nn.Module, *, cut: bool, whole: bool = False, buffers: Mapping[str, Rule] | None = None
    ) -> None:
        """`buffers`: for names of buffers that forwards change, or patterns, the rule. Raises UsageError."""
        check_model(model)
        self.model = model
        self._reading = threading.local()
        self.layers: list[Layer] = []
        named = [(plain_name(name), p) for name, p in model.named_parameters(remove_duplicate=False)]
        self._names = {id(p): name for name, p in reversed(named)}
        self.aliases = {name: self._names[id(p)] for name, p in named if p.requires_grad and self._names[id(p)] != name}
        self._live: dict[int, Tensor] = {}  # parameter -> the tensor whose memory all layers held here share
        self._rows: dict[int, Tensor] = {}  # parameter with another memory order -> its elements in row-major order
        self._changing = _changing(model, buffers or {})  # buffer, by identity -> its name and rule
        self._index: dict[int, int] = {}
        self._specs: list[tuple[str, Tensor, list[int], Rule | None]] = []
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        for module in _distinct(_modules(model, cut)):
            self._add_layer(module)
        missing = [name for name, p in trainable if id(p) not in self._index]
        if missing:
            raise UsageError(f"parameter {missing[0]!r} is in none of the layers that pipeline_layers() returns")
        if not self._specs:
            raise UsageError("the model has no trainable parameter")
        self.parameter_of = {index: spec[1] for index, spec in enumerate(self._specs)}
        self.spec = ModelSpec(tuple(self._cost(layer) for layer in self.layers), self._parameter_specs(), whole)
        self.held = range(len(self.layers))
        self._tie()

    def check_stages(self, stages: int) -> None:
        """Raise UsageError if the model cannot be cut into as many stages."""
        if stages <= len(self.layers):
            return
        if len(self.layers) > 1:
            raise UsageError(
                f"{stages} stages need at least as many layers, and the model has {len(self.layers)}: lower stages"
            )
        raise UsageError(_uncut(self.model, str(stages)))

    def why_one_stage(self) -> str:
        """Why the model can have one pipeline stage only, and what to do; empty if it can be cut."""
        return "" if len(self.layers) > 1 else _uncut(self.model, "several")

    def _add_layer(self, module: nn.Module) -> None:
        layer, number = Layer(module), len(self.layers)
        seen: set[int] = set()
        placed: list[Held] = []  # whose places in the module count
        for owner in module.modules():
            for local, parameter in owner._parameters.items():
                if parameter is None or not parameter.requires_grad or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                index = self._register(self._names.get(id(parameter), local), parameter, number, None)
                tensor: Tensor = parameter
                # A parameter that is tied to an earlier layer is a leaf of its own, so each layer's gradient is summed
                # separately.
                if self._specs[index][2][0] != number:
                    tensor = nn.Parameter(parameter.data)
                    _replace(module, parameter, tensor)
                layer.parameters.append(Held(index, tensor, parameter.shape, tensor.stride()))
                placed.append(layer.parameters[-1])
            for local, buffer in owner._buffers.items():
                if buffer is None:
                    continue
                if id(buffer) not in self._changing:
                    layer.other_buffers.append((local, buffer))
                elif id(buffer) not in seen:
                    seen.add(id(buffer))
                    name, rule = self._changing[id(buffer)]
                    index = self._register(name, buffer, number, rule)
                    layer.parameters.append(Held(index, buffer, buffer.shape, buffer.stride(), rule))
                    if not isinstance(owner, nn.modules.batchnorm._NormBase):
                        placed.append(layer.parameters[-1])
        places = _places(module)
        for held in placed:
            held.places = places[id(held.tensor)]
        self.layers.append(layer)

    def _register(self, name: str, tensor: Tensor, layer: int, rule: Rule | None) -> int:
        index = self._index.get(id(tensor))
        if index is None:
            index = self._index[id(tensor)] = len(self._specs)
            self._specs.append((name, tensor, [], rule))
        if layer not in self._specs[index][2]:
            self._specs[index][2].append(layer)
        return index

    def _parameter_specs(self) -> tuple[ParameterSpec, ...]:
        return tuple(
            ParameterSpec(name, tuple(t.shape), str(t.dtype).removeprefix("torch."), t.element_size(), tuple(layers))
            for name, t, layers, _ in self._specs
        )

    @staticmethod
    def _cost(layer: Layer) -> float:
        """Multiply-adds per sample grow with the parameters; a look-up table costs next to nothing."""
        tables = {id(m.weight) for m in layer.module.modules() if isinstance(m, nn.Embedding)}
        return 1.0 + sum(p.tensor.numel() for p in layer.parameters if id(p.tensor) not in tables)

    def _tie(self) -> None:
        """Make the layers held here that share a parameter share its memory: that of the layer that was held before."""
        tensors: dict[int, list[Tensor]] = {}
        for number in self.held:
            for held in self.layers[number].parameters:
                tensors.setdefault(held.index, []).append(held.tensor)
        first: dict[int, Tensor] = {}
        for index, sharing in tensors.items():
            before = self._live.get(index)
            first[index] = live = next((tensor for tensor in sharing if tensor is before), sharing[0])
            for tensor in sharing:
                if tensor is not live:
                    tensor.data = live.data
        self._live = first
        known, self._rows = self._rows, {}
        for index, tensor in first.items():
            if not tensor.is_contiguous():
                rows = known.get(index)
                self._rows[index] = (
                    rows
                    if rows is not None
                    else tensor.detach().reshape(-1).clone(memory_format=torch.contiguous_format)
                )

    def hold(self, start: int, stop: int, *, free: bool = True) -> None:
        """Hold the layers [start, stop): allocate new ones and, with `free`, release the memory of the others.

        A parameter that a new layer shares with one that was held keeps its memory and its values: the optimizer and
        the watch over the script's changes identify it by them.
        """
        for layer in self.layers[start:stop]:
            for held in layer.parameters:
                if held.tensor.shape != held.shape:
                    live, like = self._live.get(held.index), held.tensor.data
                    if live is not None and live.shape == held.shape:
                        held.tensor.data = live.data
                    else:
                        held.tensor.data = like.new_empty_strided(held.shape, held.stride)
        for layer in (*self.layers[:start], *self.layers[stop:]) if free else ():
            for held in layer.parameters:
                held.tensor.data = held.tensor.data.new_empty(0)
        self.held = range(start, stop)
        self._tie()

    @contextlib.contextmanager
    def whole(self, read: Callable[[list[int]], Mapping[int, Tensor]]) -> Iterator[None]:
        """All layers have their values meanwhile, for forwards of the whole model; then those of others are released.

        `read` gives the values of parameters that no layer held here has.
        """
        filled = {index: tensor.data for index, tensor in self._live.items()}
        others = [
            held for number, layer in enumerate(self.layers) if number not in self.held for held in layer.parameters
        ]
        try:
            for number in set(range(len(self.layers))) - set(self.held):
                lacking = self.layers[number].parameters
                found = read([held.index for held in lacking if held.index not in filled])
                for held in lacking:
                    if held.index in found:
                        filled[held.index] = held.tensor.data.new_empty_strided(held.shape, held.stride)
                        filled[held.index].copy_(found[held.index].view(held.shape))
                    held.tensor.data = filled[held.index]
            yield
        finally:
            for held in others:
                held.tensor.data = held.tensor.data.new_empty(0)

    def flat(self, parameter: int) -> Tensor:
        """A parameter held here as one dimension, in row-major order, sharing its memory.

        A parameter with another memory order (channels_last, transposed) has a copy in row-major order, which `refresh`
        writes to the parameter: its strides stay, because torch chooses kernels by them.
        """
        rows = self._rows.get(parameter)
        return rows if rows is not None else self._live[parameter].data.view(-1)

    def refresh(self) -> None:
        """Write the row-major copies that `flat` made to their parameters."""
        for index, rows in self._rows.items():
            live = self._live[index]
            live.data.copy_(rows.view(live.shape))

    def computed_with(self, shard: Shard) -> Tensor:
        """A shard's elements as forwards read them."""
        if shard.parameter in self._rows:
            return self._live[shard.parameter].data.reshape(-1)[shard.start : shard.stop].contiguous()
        return self.view(shard)

    def view(self, shard: Shard) -> Tensor:
        """A shard's elements, sharing the parameter's memory."""
        return self.flat(shard.parameter)[shard.start : shard.stop]

    def as_live(self, shard: int, value: Tensor) -> Tensor:
        """A shard's values, of any shape and type, in one dimension and in the type of its parameter."""
        return value.reshape(-1).to(self.parameter_of[self.spec.shards[shard].parameter].dtype)

    def is_buffer(self, parameter: int) -> bool:
        """Whether it is a buffer that forwards change: no optimizer steps it."""
        return self._specs[parameter][3] is not None

    def rule(self, parameter: int) -> Rule | None:
        """The rule of a buffer that forwards change; None for a parameter."""
        return self._specs[parameter][3]

    def constants(self) -> Iterator[tuple[str, Tensor]]:
        """What training does not change: frozen parameters, and persistent buffers other than statistics."""
        trained = {name for name, *_ in self._specs} | set(self.aliases)
        self._reading.now = True
        try:
            found = self.model.state_dict()
        finally:
            self._reading.now = False
        for name, tensor in found.items():
            if plain_name(name) not in trained and tensor is not None:  # Megatron's modules have a state that is None
                yield plain_name(name), tensor

    @property
    def reading(self) -> bool:
        """Whether this thread reads the model as this rank holds it, without the layers of other stages."""
        return getattr(self._reading, "now", False)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self._specs[0][1].device

    def device_of(self, number: int) -> torch.device:
        """The device of a layer; for one without parameters, that of the model."""
        parameters = self.layers[number].parameters
        return parameters[0].tensor.device if parameters else self.device


def plain_name(name: str) -> str:
    """The name that a parameter or buffer of a compiled model has without `torch.compile`."""
    return name.replace("_orig_mod.", "")


def check_model(model: nn.Module) -> None:
    """Raise UsageError for a model with tensors that training cannot keep."""
    for kind, found in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in found:
            problem = _problem(tensor)
            if problem:
                raise UsageError(f"{kind} {name!r} {problem}")


def _problem(tensor: Tensor) -> str:
    if is_lazy(tensor):
        return (
            "has no shape yet, as its layer is lazy: run one forward, model(inputs), before you build the optimizer, "
            "or give the layer its number of inputs"
        )
    if tensor.is_meta:
        return "is on the meta device, without values: model.to_empty(device=...) and initialise it before"
    if not isinstance(tensor, nn.Parameter):
        return ""
    if tensor.is_complex():
        return (
            f"is complex ({tensor.dtype}): hold its real and imaginary parts as one real parameter of shape (..., 2), "
            "and use torch.view_as_complex(parameter) in forward"
        )
    if any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return "has elements that share their memory (expand): torch.nn.Parameter(tensor.clone())"
    return ""


def _modules(model: nn.Module, cut: bool) -> Sequence[nn.Module]:
    declared: Callable[[], Sequence[nn.Module]] | None = getattr(model, "pipeline_layers", None)
    if not cut:
        return [model]
    if declared is not None:
        return list(declared())
    return list(model) if isinstance(model, nn.Sequential) and len(model) else [model]


def _distinct(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Give a module that occurs twice in the sequence a second body over the same parameters."""
    seen: set[int] = set()
    result = []
    for module in modules:
        if id(module) in seen:
            shared: dict[int, Any] = {id(p): p for p in module.parameters()}
            module = copy.deepcopy(module, shared)
        seen.add(id(module))
        result.append(module)
    return result


def _changing(model: nn.Module, declared: Mapping[str, Rule]) -> dict[int, tuple[str, Rule]]:
    """The buffers that forwards change, by identity: their names (without `torch.compile`), and their rules."""
    buffers = {plain_name(name): buffer for name, buffer in model.named_buffers()}
    saved = {plain_name(name) for name in model.state_dict()} if declared else set()
    rules = {plain_name(name): rule for name, rule in ready_rules(model).items()}
    rules |= rules_of(buffers, declared, saved)
    return {id(buffers[name]): (name, rule) for name, rule in rules.items() if name in buffers}


def _replace(module: nn.Module, old: Tensor, new: Tensor) -> None:
    for owner in module.modules():
        for local, parameter in owner._parameters.items():
            if parameter is old:
                owner._parameters[local] = new  # type: ignore[assignment]


def _places(module: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """The modules that have a parameter or buffer, and its names there, by its identity."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for room in (owner._parameters, owner._buffers):
            for local, tensor in room.items():
                if tensor is not None:
                    found.setdefault(id(tensor), []).append((owner, local))
    return found


def _uncut(model: nn.Module, stages: str) -> str:
    return (
        f"{type(model).__name__} cannot be cut into {stages} stages: pass an nn.Sequential, or give the model a method "
        "pipeline_layers() that returns its layers in order"
    )
