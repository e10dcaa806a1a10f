"""What ranks share between steps: `run.state`, and calls in which all live ranks take part."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.stateful import decode, encode, outline
from everstep.elastic.engine.engine import STATE
from everstep.elastic.engine.large_values import LargeValues

from .calls import Calls

Operation = Literal["sum", "mean", "min", "max"]


class SharedState(MutableMapping[str, Any]):
    """Named values of the script that are equal on all ranks: agreed on in every step, saved, given to replacements."""

    between_steps = True

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._large: LargeValues | None = None  # which the values may refer to, once there is an engine
        self._of_model: set[int] = set()  # addresses of the model's memory, which is not the script's to keep here
        self._begun = False
        self.entered: dict[str, Any] | None = None  # until the loop begins, on a rank that joined: what the job had

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if not isinstance(name, str):
            raise UsageError(f"{STATE}[{name!r}]: names are text, got a {type(name).__name__}")
        where = f"{STATE}[{name!r}]"
        encode(value, where, outline)
        self._values[name] = value
        if self._large is not None:
            self._large.forget(where)

    def __delitem__(self, name: str) -> None:
        del self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"{STATE}({self._values!r})"

    def state_dict(self) -> dict[str, Any]:
        return dict(sorted(self._values.items()))  # ranks may set them in different orders

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._values = self._adopted(state)
        if self._begun:
            return
        self.entered = encode(self._values, STATE, self._large.keep if self._large is not None else None)
        if self._large is not None:
            self._large.hold(self.entered)  # until the loop begins, when all of it is put in place again

    def attach(self, large: LargeValues, model: nn.Module) -> None:
        """The engine is there, for this model."""
        self._large = large
        tensors = (*model.parameters(), *model.buffers())
        self._of_model = {tensor.untyped_storage().data_ptr() for tensor in tensors if not tensor.is_meta}

    def begin(self, *, resumed: bool) -> None:
        """The loop begins: what a script does before it belongs to the start of the job, on a rank that joined later.

        `resumed`: all ranks began again, so they have the same new values, and keep them.
        """
        entered, self.entered, self._begun = self.entered, None, True
        if entered is not None:
            found = decode(entered, self._large.give if self._large is not None else None)
            self._values = {**(self._values if resumed else {}), **self._adopted(found)}

    def _adopted(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state, in the lists, dictionaries and tensors of the script, whose variables may be bound to them."""
        return {name: self._into(self._values.get(name), value) for name, value in state.items()}

    def _into(self, there: Any, value: Any) -> Any:
        """`value`, as the contents of what is there: a list or dictionary, or a tensor of its type and shape."""
        if there is value:
            return value
        if isinstance(there, list) and isinstance(value, list):
            there[:] = [self._into(*pair) for pair in zip_longest(there[: len(value)], value)]
        elif isinstance(there, dict) and isinstance(value, dict):
            found = {name: self._into(there.get(name), item) for name, item in value.items()}
            there.clear()
            there.update(found)
        elif isinstance(there, Tensor) and isinstance(value, Tensor) and self._takes(there, value):
            with torch.no_grad():
                there.copy_(value)
        else:
            return value
        return there

    def _takes(self, there: Tensor, value: Tensor) -> bool:
        """Whether a tensor of the script can be given this value in place."""
        alike = type(there) is type(value) and (there.dtype, there.shape) == (value.dtype, value.shape)
        if not alike or there.layout is not torch.strided or there.is_inference():
            return False
        own = all(step or size < 2 for step, size in zip(there.stride(), there.shape, strict=True))
        return own and there.untyped_storage().data_ptr() not in self._of_model


class Sharing:
    """The part of `Run` that is about values of all ranks."""

    state: SharedState
    ends: contextlib.ExitStack

    @property
    def rank(self) -> int:
        raise NotImplementedError

    @property
    def world_size(self) -> int:
        raise NotImplementedError

    def _sharing(self) -> Calls:
        raise NotImplementedError

    def mean(self, value: float | Tensor) -> float:
        """The mean of a number over the live ranks, on each of them. It is rounded once, so their order is free.

        Ranks differ in number and in what they compute from one generation to the next. So pass what is equal on all of
        them, or what may depend on that; `run.evaluate` gives results that do not.
        """
        number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise UsageError(f"run.mean takes a number, got {_described(value)}: use run.reduce(tensor, 'mean')")
        found: float = self._sharing().make("run.mean", float(number), lambda values: _mean(values.values()))
        return found

    def gather(self, value: Any) -> list[Any]:
        """The values of all live ranks, in the order of ranks, on each of them.

        A value holds numbers, text, lists, tuples, dictionaries, bytes, tensors and arrays; tensors come back on the
        CPU.
        """
        found: list[Any] = self._sharing().make("run.gather", value, lambda values: list(values.values()))
        return found

    def reduce(self, tensor: Tensor, op: Operation = "sum") -> Tensor:
        """The sum (or "mean", "min", "max") of a tensor of equal type and shape on all live ranks, on each of them.

        It is computed in the order of ranks, on the CPU, so its bits do not depend on who comes first; returned as a
        new tensor where `tensor` is. For tensors of a few MiB at most.
        """
        if not isinstance(tensor, Tensor):
            raise UsageError(f"run.reduce takes a tensor, got {_described(tensor)}: use run.mean(number)")
        if op not in _OPERATIONS:
            raise UsageError(f"run.reduce: op must be one of {', '.join(_OPERATIONS)}, got {op!r}")
        found: Tensor = self._sharing().make(f"run.reduce({op})", tensor, lambda values: _reduced(values, op))
        return found.to(tensor.device)

    def broadcast(self, value: Any = None, source: int = 0) -> Any:
        """The value of the rank that is `source` among the live ones (`run.rank`), on all of them."""

        def taken(values: Mapping[int, Any]) -> Any:
            if not 0 <= source < len(values):
                raise UsageError(f"run.broadcast: source is {source}, and there are {len(values)} ranks")
            return list(values.values())[source]

        return self._sharing().make(f"run.broadcast(source={source})", value, taken)

    def save(self, item: Any, path: str | os.PathLike[str]) -> None:
        """`torch.save` an item that all ranks have, by one of them: there is the whole file then, or the former one.

        A call of all ranks: they wait until the file is written, and if its writer is lost, another one writes it.
        Raises UsageError where the file cannot be written. For results and weights; see `checkpoint=` for what a job
        resumes from.
        """
        target = Path(path)
        self._sharing().make(f"run.save({str(path)!r})", None, lambda values: _written(item, target))

    def init_process_group(self) -> None:
        """Make all live ranks the default process group of torch.distributed, in place of dist.init_process_group.

        Between steps its all_reduce, broadcast, all_gather, barrier and those for objects work as the calls above do,
        through losses; get_rank and get_world_size are `run.rank` and `run.world_size`.
        """
        from . import process_group  # on first use: torch may lack torch.distributed

        process_group.begin(self)
        self.ends.callback(process_group.end)

    def barrier(self) -> None:
        """Wait until all live ranks have come here."""
        self._sharing().make("run.barrier", None, lambda values: None)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    try:
        return float(sum(map(Fraction, numbers)) / len(numbers))
    except (ValueError, OverflowError):  # not finite
        return sum(numbers) / len(numbers)


def _written(item: Any, path: Path) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            torch.save(item, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UsageError(f"run.save: {path} cannot be written: {error.strerror or error}") from None


_OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "mean": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
}


def _reduced(values: Mapping[int, Any], op: Operation) -> Any:
    tensors: dict[int, Tensor] = {rank: decode(value) for rank, value in values.items()}
    first, *others = tensors
    total = tensors[first]
    for rank in others:
        other = tensors[rank]
        if (other.dtype, other.shape) != (total.dtype, total.shape):
            raise UsageError(
                f"run.reduce: rank {first} has {_kind(total)}, and rank {rank} {_kind(other)}: they have to be equal"
            )
        total = _OPERATIONS[op](total, other)
    if op == "mean":
        total = total / len(tensors)
    return encode(total, "run.reduce")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
