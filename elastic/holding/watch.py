"""Notices when the script changes the values that training continues with.

Between two steps, and within one, the user's code has the live parameters in its hands: averaged weights are put in for
an evaluation, a forward clamps its weights, `.data` is written to. What is put back in time is harmless, since the
version that is protected was copied before that code ran. What is not put back would make ranks differ.

A write that autograd sees raises a tensor's version, and another storage has another address; a write through `.data`
shows in the content alone. So versions, addresses and the first and last bytes of each parameter are compared before a
step, and the whole content before its gradients are exchanged: two passes of a hash over the parameters in a step.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from .stack import Held, LayerStack

EDGE_BYTES = 16 << 10  # of either end of a parameter, which are compared before a step


class Change(enum.Enum):
    """How a value came to be another."""

    REPLACED = "replaced"  # another tensor stands in its place, or it has another shape or type
    WRITTEN = "written"  # surely by the script
    SILENT = "silent"  # by a write through .data, or a flipped bit


@dataclass(frozen=True)
class Changed:
    """A parameter, as a layer holds it, whose content is not what was remembered."""

    held: Held
    how: Change


@dataclass
class _Mark:
    """What is remembered of one parameter. `memory` shares its storage; `data`: the same as bytes, where it can be."""

    held: Held
    memory: Tensor
    data: memoryview | None
    version: int
    content: int
    edges: int


def content_of(tensor: Tensor) -> int:
    """A hash of a tensor's elements in row-major order."""
    if tensor.device.type != "cpu":
        words = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(tensor.element_size(), torch.int64)
        return int(tensor.detach().reshape(-1).contiguous().view(words).sum(dtype=torch.int64))
    return xxhash.xxh3_64_intdigest(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().data)


def bytes_of(tensor: Tensor) -> memoryview | None:
    """The memory of a contiguous CPU tensor; None of any other, and of one without elements."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
        return None
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def edges_of(data: memoryview, size: int = EDGE_BYTES) -> int:
    """A hash of the first and last `size` bytes."""
    if data.nbytes <= 2 * size:
        return xxhash.xxh3_64_intdigest(data)
    return xxhash.xxh3_64_intdigest(data[:size]) ^ xxhash.xxh3_64_intdigest(data[-size:], 1)


class ParameterWatch:
    """What the parameters held by this rank were when the runtime last wrote to them."""

    def __init__(self, stack: LayerStack) -> None:
        self._stack = stack
        self._marks: dict[int, _Mark] = {}  # id of a tensor -> what is remembered

    def remember(self, *, only_new: bool = False) -> None:
        """Take what is held now as right; `only_new`: of what came to be held since."""
        before, self._marks = self._marks, {}
        for held in self._held():
            mark = before.get(id(held.tensor))
            if mark is not None and only_new and mark.held is held and mark.memory.shape == held.shape:
                self._marks[id(held.tensor)] = mark
                continue
            memory = held.tensor.data
            if mark is not None and mark.memory.dtype == memory.dtype and memory.is_set_to(mark.memory):
                memory, data = mark.memory, mark.data
            else:
                data = bytes_of(memory)
            content = xxhash.xxh3_64_intdigest(data) if data is not None else content_of(memory)
            edges = edges_of(data) if data is not None else 0
            self._marks[id(held.tensor)] = _Mark(held, memory, data, held.tensor._version, content, edges)

    def _held(self) -> Iterator[Held]:
        seen: set[int] = set()
        for number in self._stack.held:
            for held in self._stack.layers[number].parameters:
                if held.rule is None and id(held.tensor) not in seen:
                    seen.add(id(held.tensor))
                    yield held

    def changed(self, *, thorough: bool) -> list[Changed]:
        """What is not as it was remembered. `thorough`: every byte is compared, not only the edges of large ones.

        A parameter whose storage was exchanged for one of equal content gets its own again.
        """
        found = []
        for mark in self._marks.values():
            how = self._compare(mark, thorough=thorough)
            if how is not None:
                found.append(Changed(mark.held, how))
        return found

    def _compare(self, mark: _Mark, *, thorough: bool) -> Change | None:
        tensor, memory = mark.held.tensor, mark.memory
        for owner, local in mark.held.places:
            if owner._parameters.get(local) is not tensor:
                return Change.REPLACED
        if tensor.dtype != memory.dtype or not tensor.is_set_to(memory):
            if tensor.dtype != memory.dtype or tensor.shape != memory.shape or content_of(tensor) != mark.content:
                return Change.REPLACED
            tensor.data = memory  # which the optimizer writes to
        written = tensor._version != mark.version
        if not written and not thorough:
            return Change.SILENT if mark.data is not None and edges_of(mark.data) != mark.edges else None
        content = xxhash.xxh3_64_intdigest(mark.data) if mark.data is not None else content_of(memory)
        if content != mark.content:
            return Change.WRITTEN if written else Change.SILENT
        mark.version = tensor._version  # it was put back
        return None


def describe(name: str, step: int, *, within: bool, replaced: bool) -> str:
    """The message about a parameter that is not what was committed before `step`."""
    when = "before or in the first step" if step == 0 else f"between steps {step - 1} and {step}"
    if within:
        when = f"in step {step}, or between steps {step - 1} and {step}" if step else "before or in the first step"
    how = "was replaced by another tensor" if replaced else "was changed"
    return (
        f"parameter {name!r} {how} by the script {when}: training continues with what the optimizer made, which every "
        "rank has. Put the old values back before the next batch, as after an evaluation with averaged weights; write "
        "a change that is to last as the step() of a torch.optim.Optimizer subclass, and load starting weights before "
        "run.steps(...) or run.prepare(...)"
    )


def differing_bits(one: Tensor, other: Tensor, most: int = 8) -> int:
    """How many bits differ between two tensors of one type and size; `most` if there are more."""
    a = one.detach().cpu().reshape(-1).view(torch.uint8)
    b = other.detach().cpu().reshape(-1).view(torch.uint8)
    where = (a != b).nonzero().reshape(-1)[:most]
    return min(most, sum((int(a[i]) ^ int(b[i])).bit_count() for i in where))
