"""Detects state that a forward leaves in a module, and changes of buffers and frozen parameters by the script.

Which rank computes which micro-batch depends on the number of ranks. So state that one forward leaves for the next,
other than a batch norm's statistics, would make results depend on that number, and a replacement would lack it.

Buffers and frozen parameters must never change: after each forward, and before each step, their identity, version,
address and first and last bytes are compared with recorded ones, and their whole contents in turn. Other attributes are
often rewritten harmlessly, such as an auxiliary loss that the caller reads: they are refused only if a forward changes
them and another one uses the value that it finds. Numbers only cause a warning, since a counter may serve a log.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from operator import is_
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.holding.stack import LayerStack, plain_name
from everstep.elastic.holding.watch import bytes_of, content_of, edges_of

from .attributes import PLAIN, ModuleAttributes

EDGE_BYTES = 2 << 10  # at either end of a buffer, compared after each forward
WHOLE_BYTES_PER_STEP = 16 << 20  # of constants whose whole contents are compared before a step, in turn
LOOKED_AT = 1000  # number of items of a list attribute that are compared
_OF_TORCH = frozenset(vars(nn.Module()))  # the attributes that every module has


@dataclass
class _Constant:
    """A buffer or frozen parameter, with the module's mapping that contains it."""

    where: str
    room: MutableMapping[str, Any]
    name: str
    kind: str  # "buffer" | "frozen parameter"
    persistent: bool
    tensor: Tensor
    data: memoryview | None = None
    version: int = 0
    address: int = 0
    content: int = 0
    edges: int = 0

    def remember(self) -> None:
        """Record the present contents as right."""
        self.data = bytes_of(self.tensor)
        self.version, self.address = self.tensor._version, self.tensor.data_ptr()
        self.content = self._content()
        self.edges = edges_of(self.data, EDGE_BYTES) if self.data is not None else 0

    def _content(self) -> int:
        return xxhash.xxh3_64_intdigest(self.data) if self.data is not None else content_of(self.tensor)

    def is_replaced(self) -> bool:
        """Whether another object has replaced it."""
        return self.room.get(self.name) is not self.tensor

    def is_changed(self, *, thorough: bool) -> bool:
        """Whether its contents differ from the recorded ones."""
        tensor = self.tensor
        if tensor.data_ptr() != self.address:
            self.data, self.address = bytes_of(tensor), tensor.data_ptr()
            thorough = True
        if tensor._version == self.version and not thorough:
            return self.data is not None and edges_of(self.data, EDGE_BYTES) != self.edges
        if self._content() != self.content:
            return True
        self.version = tensor._version  # the old contents were restored
        return False


@dataclass
class _Watched:
    """A user's module whose attributes (or buffers that are not saved) are compared around a forward."""

    where: str
    kind: str  # "attribute" | "buffer"
    room: MutableMapping[str, Any]
    saved: Callable[[str], bool]  # whether a name is compared elsewhere
    compiled: bool  # observers cannot replace its attributes
    names: tuple[str, ...] = ()
    values: tuple[Any, ...] = ()
    tensors: list[tuple[str, Tensor, int]] = field(default_factory=list)  # attribute, tensor, its state before
    changes: dict[str, int] = field(default_factory=dict)  # attribute -> number of forwards that changed it
    reads: set[str] = field(default_factory=set)  # attributes whose earlier value a forward has used

    def unchanged(self) -> bool:
        """Whether every attribute is still the same object."""
        values = self.room.values()
        return len(values) == len(self.values) and all(map(is_, values, self.values))


class _Observed(Tensor):
    """A tensor that records its use."""

    note: Callable[[], None]
    original: Tensor

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _LOOKS:
            for item in _flattened((*args, *(kwargs or {}).values())):
                if isinstance(item, _Observed):
                    item.note()
        with torch._C.DisableTorchFunctionSubclass():  # the documented way to call through
            return func(*args, **(kwargs or {}))


_LOOKS = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.size,
    Tensor.dim,
}


def _flattened(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flattened(value)
        else:
            yield value


class Forwards:
    """The constants and attributes of a stack's layers. `warn` is called with possible problems."""

    def __init__(self, stack: LayerStack, warn: Callable[[str], None]) -> None:
        self._stack = stack
        self._warn = warn
        self._names = {id(module): plain_name(name) for name, module in stack.model.named_modules()}
        self._constants = [list(self._constants_of(number)) for number in range(len(stack.layers))]
        self._watched = [list(self._watched_of(number)) for number in range(len(stack.layers))]
        self._next = 0  # the next constant whose whole contents are compared
        self.attributes = ModuleAttributes(stack.model, warn)
        self.remember()

    def _where(self, number: int, module: nn.Module) -> str:
        layer = self._stack.layers[number].module
        name = f"layer {number} ({type(layer).__name__})"
        if module is layer:
            return name
        return f"{name}, module {self._names.get(id(module), '?')!r} ({type(module).__name__})"

    def _constants_of(self, number: int) -> Iterator[_Constant]:
        others = {id(buffer) for _, buffer in self._stack.layers[number].other_buffers}
        for module in self._stack.layers[number].module.modules():
            where = self._where(number, module)
            for name, buffer in module._buffers.items():
                if buffer is not None and id(buffer) in others:
                    persistent = name not in module._non_persistent_buffers_set
                    yield _Constant(where, module._buffers, name, "buffer", persistent, buffer)
            for name, parameter in module._parameters.items():
                if parameter is not None and not parameter.requires_grad:
                    yield _Constant(where, module._parameters, name, "frozen parameter", True, parameter)

    def _watched_of(self, number: int) -> Iterator[_Watched]:
        layer = self._stack.layers[number].module
        compiled = any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl for m in layer.modules())
        for module in layer.modules():
            if type(module).__module__.startswith("torch."):
                continue
            where = self._where(number, module)
            yield _Watched(where, "attribute", vars(module), _OF_TORCH.__contains__, compiled)
            yield _Watched(where, "buffer", module._buffers, partial(_is_saved, module), compiled)

    def remember(self) -> None:
        """The runtime itself has set the constants, or the model was just built: record them."""
        for constants in self._constants:
            for constant in constants:
                constant.remember()

    # ------------------------------------------------------------ before a step

    def check_constants(self, step: int, registered: Iterable[Any]) -> None:
        """Raise UsageError if the script has changed a constant that is not registered, and not restored it."""
        everything = [constant for constants in self._constants for constant in constants]
        whole = 0
        turn: set[int] = set()
        while everything and whole < WHOLE_BYTES_PER_STEP and len(turn) < len(everything):
            turn.add(self._next % len(everything))
            whole += everything[self._next % len(everything)].tensor.nbytes
            self._next += 1
        for number, constant in enumerate(everything):
            if constant.is_replaced() and constant.persistent:
                changed = f"replaced {_a(constant)} by another tensor"
            elif not constant.is_replaced() and constant.is_changed(thorough=number in turn):
                changed = f"changed {_a(constant)}"
            else:
                continue
            if constant.tensor.data_ptr() in _addresses(registered):
                constant.remember()
                continue
            when = f"between steps {step - 1} and {step}, or in the latter" if step else "before or in the first step"
            raise UsageError(
                f"the script {changed} of {constant.where} {when}: the replacement of a lost worker would not have "
                "it. Put the old value back before the next batch, or keep it with run.register_state(name, module), "
                "before the first step, and change it in the same way on every rank"
            )

    # ------------------------------------------------------------ around a forward

    def before(self, number: int) -> None:
        """A forward of a layer begins."""
        for watched in self._watched[number]:
            if watched.changes and not watched.compiled:
                for name in watched.changes:
                    _lend(watched, name)
            if not watched.unchanged():
                watched.names, watched.values = tuple(watched.room), tuple(watched.room.values())
            if watched.room:
                watched.tensors = [(name, tensor, _state(tensor)) for name, tensor in self._tensors_of(watched)]

    def after(self, number: int) -> None:
        """The forward has ended. Raises UsageError for a change that is not allowed."""
        self.attributes.check()
        for constant in self._constants[number]:
            if constant.is_replaced():
                if constant.persistent:
                    raise UsageError(_leaves(constant.where, f"{constant.kind} {constant.name!r}", buffer=True))
                value = constant.room.get(constant.name)
                # Compared in the same way as an attribute.
                if isinstance(value, Tensor) and type(value) is not _Observed:
                    constant.tensor = value
                    constant.remember()
            elif constant.is_changed(thorough=False):
                raise UsageError(_leaves(constant.where, f"{constant.kind} {constant.name!r}", buffer=True))
        for watched in self._watched[number]:
            if watched.tensors or watched.changes or not watched.unchanged():
                self._compare(watched)

    def _tensors_of(self, watched: _Watched) -> list[tuple[str, Tensor]]:
        return [
            (name, _plain(tensor))
            for name, value in zip(watched.names, watched.values, strict=True)
            if type(value) not in PLAIN and not watched.saved(name)
            for tensor in _tensors(value)
        ]

    def _compare(self, watched: _Watched) -> None:
        """An attribute may differ from before the forward."""
        was = dict(zip(watched.names, watched.values, strict=True))
        held: dict[str, list[int]] = {}
        for name, tensor, state in watched.tensors:
            held.setdefault(name, []).append(id(tensor))
            if _state(tensor) != state:
                raise UsageError(_leaves(watched.where, f"{watched.kind} {name!r}, in place"))
        for name in watched.room:
            _take_back(watched.room, name)
        for name, value in watched.room.items():
            if watched.saved(name):
                continue
            old = was.get(name)
            if _is_number(value) and _is_number(old):
                if value != old:
                    self._count(watched, name)
            elif [id(tensor) for tensor in _tensors(value)] != held.get(name, []):
                watched.changes[name] = watched.changes.get(name, 0) + 1
                if watched.compiled and watched.changes[name] == 2:
                    self._warn(_may_matter(watched.where, name))
        watched.tensors, watched.values = [], ()
        for name in watched.reads:
            if watched.changes[name] > 1:
                raise UsageError(_leaves(watched.where, f"{watched.kind} {name!r}", buffer=watched.kind == "buffer"))

    def _count(self, watched: _Watched, name: str) -> None:
        count = watched.changes[name] = watched.changes.get(name, 0) + 1
        if count == 2:
            self._warn(_may_matter(watched.where, name))


def _lend(watched: _Watched, name: str) -> None:
    """Replace tensor attributes by observers that record whether the forward uses them."""

    def note() -> None:
        watched.reads.add(name)

    def observed(item: Any) -> Any:
        if type(item) is not Tensor:
            return item
        seen = item.as_subclass(_Observed)
        seen.note, seen.original = note, item
        return seen

    _each(watched.room, name, observed)


def _take_back(room: MutableMapping[str, Any], name: str) -> None:
    """Remove the observers again, wherever the forward has stored them."""
    if any(isinstance(tensor, _Observed) for tensor in _tensors(room[name])):
        _each(room, name, _plain)


def _plain(item: Any) -> Any:
    return item.original if isinstance(item, _Observed) else item


def _each(room: MutableMapping[str, Any], name: str, change: Callable[[Any], Any]) -> None:
    """Replace a tensor attribute, or the tensors one level down in it; a container stays the same object."""
    value = room.get(name)
    if isinstance(value, Tensor):
        room[name] = change(value)
    elif type(value) is tuple:
        room[name] = tuple(change(item) for item in value)
    elif isinstance(value, list | deque):
        for at, item in enumerate(value):
            value[at] = change(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            value[key] = change(item)


def _is_saved(module: nn.Module, name: str) -> bool:
    return name not in module._non_persistent_buffers_set


def _a(constant: _Constant) -> str:
    return f"the {constant.kind} {constant.name!r}"


def _leaves(where: str, what: str, *, buffer: bool = False) -> str:
    """The error text for state that a forward leaves behind."""
    if buffer:
        return (
            f"{where} changes its {what} in forward: say how micro-batches of a step combine, buffers={{NAME: 'mean'}} "
            "(or 'sum', 'max', 'last') of run.prepare or run.steps; or change it between steps, in the same way on "
            "every rank, and keep it with run.register_state(name, module)"
        )
    return (
        f"{where} changes its {what} in forward: only buffers can be kept equal whichever rank computes a micro-batch. "
        "Make it a buffer, and say how micro-batches combine, buffers={NAME: 'mean'} of run.prepare or run.steps; or "
        "change it between steps, in the same way on every rank, and keep it with run.register_state(name, object)"
    )


def _may_matter(where: str, name: str) -> str:
    return (
        f"{where} changes its attribute {name!r} in forward: if the forward uses it, results depend on which rank "
        "computes which micro-batch. Derive it from run.step instead"
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors that an attribute is, or has one level down."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | deque):
        yield from (item for item in islice(value, LOOKED_AT) if isinstance(item, Tensor))
    elif isinstance(value, dict):
        yield from (item for item in islice(value.values(), LOOKED_AT) if isinstance(item, Tensor))


def _state(tensor: Tensor) -> int:
    """The values that change when a tensor is written, even by `.data` at either end."""
    data = bytes_of(tensor)
    return hash((tensor._version, tensor.data_ptr(), edges_of(data, EDGE_BYTES) if data is not None else 0))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _addresses(registered: Iterable[Any]) -> set[int]:
    """The memory of the tensors of registered objects."""
    found: set[int] = set()

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            found.add(value.data_ptr())
        elif isinstance(value, dict):
            for item in value.values():
                collect(item)
        elif isinstance(value, list | tuple):
            for item in value:
                collect(item)

    for item in registered:
        collect(item.state_dict())
    return found
