"""Translates the names and layouts of one library to those of another, by bidirectional rules.

A rule pairs one or more names of side "a" with one or more of side "b"; its `how` lists the transformations of the
tensors from a to b; from b to a, the inverses are applied in reverse order. A parameter's optimizer states are
transformed like the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar

import numpy as np

from everstep.checkpointing.convert.core.casting import cast
from everstep.checkpointing.convert.core.content import Content, ConversionError, Lazy
from everstep.checkpointing.universal.dtypes import numpy_dtype

from .patterns import Pattern, Table

Direction = Literal["a to b", "b to a"]
T = TypeVar("T")


class RenamingStep(Protocol):
    """A change of layout. `ahead` takes the tensors of side a, `back` those of side b; each undoes the other."""

    def ahead(self, name: str, tensors: list[Lazy]) -> list[Lazy]:
        """The tensors nearer to side b."""

    def back(self, name: str, tensors: list[Lazy]) -> list[Lazy]:
        """The tensors nearer to side a."""


@dataclass(frozen=True)
class Transpose:
    """Every tensor the other way round: Conv1D of GPT-2 keeps (in, out)."""

    def ahead(self, name: str, tensors: list[Lazy]) -> list[Lazy]:
        return [self._turned(name, tensor) for tensor in tensors]

    back = ahead

    def _turned(self, name: str, tensor: Lazy) -> Lazy:
        if len(tensor.shape) != 2:
            raise ConversionError(f"{name}: shape {list(tensor.shape)} cannot be transposed; expected two dimensions")
        shape = (tensor.shape[1], tensor.shape[0])
        return Lazy(shape, tensor.dtype, lambda: np.ascontiguousarray(tensor.read().T), tensor.origin)


@dataclass(frozen=True)
class Concat:
    """Several tensors of side a are one of side b: equally long parts along `dim`, or of these `sizes`."""

    parts: int
    dim: int = 0
    sizes: tuple[int, ...] = ()

    def ahead(self, name: str, tensors: list[Lazy]) -> list[Lazy]:
        return [joined(name, tensors, self.dim)]

    def back(self, name: str, tensors: list[Lazy]) -> list[Lazy]:
        (whole,) = tensors
        size = whole.shape[self.dim] if self.dim < len(whole.shape) else 0
        sizes = self.sizes or (size // self.parts,) * self.parts
        if sum(sizes) != size:
            raise ConversionError(f"{name}: shape {list(whole.shape)} is not {sizes} along dimension {self.dim}")
        return cut(whole, sizes, self.dim)


@dataclass(frozen=True)
class Interleaved:
    """Rows of q, k and v, and the rows of Megatron's linear_qkv: for each query group its q heads, its k, its v."""

    heads: int
    groups: int
    head_dim: int

    def ahead(self, name: str, tensors: list[Lazy]) -> list[Lazy]:
        whole = joined(name, tensors, 0)
        self._check(name, whole)
        q, k = self.heads * self.head_dim, self.groups * self.head_dim

        def read() -> np.ndarray:
            rows = whole.read()
            parts = (rows[:q], rows[q : q + k], rows[q + k :])
            grouped = [part.reshape(self.groups, -1, *part.shape[1:]) for part in parts]
            return np.concatenate(grouped, axis=1).reshape(whole.shape)

        return [Lazy(whole.shape, whole.dtype, read, whole.origin)]

    def back(self, name: str, tensors: list[Lazy]) -> list[Lazy]:
        (whole,) = tensors
        self._check(name, whole)
        each, k = self.heads // self.groups * self.head_dim, self.head_dim

        def part(start: int, width: int) -> Lazy:
            shape = (self.groups * width, *whole.shape[1:])

            def read() -> np.ndarray:
                rows = whole.read().reshape(self.groups, each + 2 * k, *whole.shape[1:])
                return np.ascontiguousarray(rows[:, start : start + width]).reshape(shape)

            return Lazy(shape, whole.dtype, read, whole.origin)

        return [part(0, each), part(each, k), part(each + k, k)]

    def _check(self, name: str, whole: Lazy) -> None:
        rows = (self.heads + 2 * self.groups) * self.head_dim
        if self.groups < 1 or self.heads % self.groups or not whole.shape or whole.shape[0] != rows:
            raise ConversionError(
                f"{name}: shape {list(whole.shape)}; expected {rows} rows for heads={self.heads} groups={self.groups} "
                f"head_dim={self.head_dim}"
            )


@dataclass(frozen=True)
class Unfused:
    """One tensor of side a with the rows [q; k; v], as the three that `Interleaved` takes."""

    heads: int
    groups: int
    head_dim: int

    def ahead(self, name: str, tensors: list[Lazy]) -> list[Lazy]:
        (whole,) = tensors
        sizes = tuple(count * self.head_dim for count in (self.heads, self.groups, self.groups))
        if not whole.shape or whole.shape[0] != sum(sizes):
            raise ConversionError(f"{name}: shape {list(whole.shape)}; expected {sum(sizes)} rows of q, k and v")
        return cut(whole, sizes, 0)

    def back(self, name: str, tensors: list[Lazy]) -> list[Lazy]:
        return [joined(name, tensors, 0)]


def joined(name: str, tensors: Sequence[Lazy], dim: int) -> Lazy:
    """Tensors one after the other along a dimension."""
    first = tensors[0]
    rests = {(*tensor.shape[:dim], *tensor.shape[dim + 1 :]) for tensor in tensors}
    dtypes = {tensor.dtype for tensor in tensors}
    if len(rests) > 1 or len(dtypes) > 1 or any(len(tensor.shape) <= dim for tensor in tensors):
        shapes = ", ".join(f"{tensor.dtype}{list(tensor.shape)}" for tensor in tensors)
        raise ConversionError(f"{name}: {shapes} cannot be joined along dimension {dim}")
    shape = (*first.shape[:dim], sum(tensor.shape[dim] for tensor in tensors), *first.shape[dim + 1 :])

    def read() -> np.ndarray:
        out = np.empty(shape, numpy_dtype(first.dtype))
        at = 0
        for tensor in tensors:
            out[(*[slice(None)] * dim, slice(at, at + tensor.shape[dim]))] = tensor.read()
            at += tensor.shape[dim]
        return out

    return Lazy(shape, first.dtype, read, f"{first.origin} and {len(tensors) - 1} more")


def cut(whole: Lazy, sizes: Sequence[int], dim: int) -> list[Lazy]:
    """Runs of a tensor along a dimension, of these sizes."""

    def part(start: int, size: int) -> Lazy:
        shape = (*whole.shape[:dim], size, *whole.shape[dim + 1 :])
        where = (*[slice(None)] * dim, slice(start, start + size))
        return Lazy(shape, whole.dtype, lambda: np.ascontiguousarray(whole.read()[where]), whole.origin)

    return [part(sum(sizes[:index]), size) for index, size in enumerate(sizes)]


@dataclass(frozen=True)
class NameRule:
    """`a` and `b`: templates with the same placeholders, or `b` empty: the names of side a are left out.

    `steps` makes the transformations from the variables (such as the number of heads) of the current model.
    """

    where: str
    a: tuple[Pattern, ...]
    b: tuple[Pattern, ...]
    how: str = "same"
    dtype: str | None = None
    steps: Callable[[Mapping[str, int]], tuple[RenamingStep, ...]] = lambda variables: ()


@dataclass(frozen=True)
class _Side:
    """A name rule, as the side from which we come sees it."""

    rule: NameRule
    patterns: tuple[Pattern, ...]
    to: tuple[Pattern, ...]

    @property
    def where(self) -> str:
        return self.rule.where


@dataclass(frozen=True)
class _Group:
    """Names that one rule combines, and the resulting names. `name` identifies it in errors."""

    rule: NameRule
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    steps: tuple[RenamingStep, ...]

    @property
    def note(self) -> str:
        return (
            f"{self.rule.where}: {self.rule.how}: {', '.join(self.sources)} -> {', '.join(self.targets) or 'left out'}"
        )


def rename(
    rules: Sequence[NameRule], direction: Direction, content: Content, variables: Mapping[str, int] | None = None
) -> Content:
    """The same checkpoint with the names and layouts of the other side.

    Raises ConversionError that lists the names which no rule, or two, match; or that a rule takes only together.
    """
    tensors = [content.params, content.buffers, content.frozen]
    names = [name for room in tensors for name in room] + list(content.tied)
    groups = _groups(rules, direction, names, variables or {})
    made = Content(
        step=content.step,
        params=_tensors(groups, content.params, direction, states=False),
        optimizer={
            state: _tensors(groups, found, direction, states=True) for state, found in content.optimizer.items()
        },
        scalars={state: _values(groups, found, state) for state, found in content.scalars.items()},
        buffers=_tensors(groups, content.buffers, direction, states=False),
        frozen=_tensors(groups, content.frozen, direction, states=False),
        dtypes=_values(groups, content.dtypes, "dtype"),
        layers=_values(groups, content.layers, "layer"),
        scheduler=content.scheduler,
        extra=content.extra,
        other=content.other,
        unknown=content.unknown,
        warnings=content.warnings,
        dropped=content.dropped,
        notes={target: group.note for group in groups for target in (group.targets or group.sources)},
    )
    for group in groups:
        if not group.targets:
            made.dropped.append((", ".join(group.sources), f"{group.rule.where} leaves it out"))
    one_to_one = {group.sources[0]: group.targets[0] for group in groups if len(group.sources + group.targets) == 2}
    for alias, owner in content.tied.items():
        if alias not in one_to_one or owner not in one_to_one:
            raise ConversionError(f"{alias} is tied to {owner}, and the rules do not rename them one to one")
        made.tied[one_to_one[alias]] = one_to_one[owner]
    made.groups = [{**group, "params": _members(groups, group["params"])} for group in content.groups]
    return made


def _groups(
    rules: Sequence[NameRule],
    direction: Direction,
    names: Iterable[str],
    variables: Mapping[str, int],
) -> list[_Group]:
    ahead = direction == "a to b"
    sides = tuple(_Side(rule, rule.a, rule.b) if ahead else _Side(rule, rule.b, rule.a) for rule in rules)
    matches = Table(tuple(side for side in sides if side.patterns)).resolve(names)
    groups: dict[tuple[str, tuple[tuple[str, str], ...]], _Group] = {}
    for match in matches.values():
        key = (match.rule.where, tuple(sorted(match.values.items())))
        if key in groups:
            continue
        side = match.rule
        sources = tuple(pattern.fill(match.values) for pattern in side.patterns)
        missing = [name for name in sources if name not in matches]
        if missing and side.to:
            raise ConversionError(f"{side.where} takes {', '.join(sources)} together; missing: {', '.join(missing)}")
        sources = tuple(name for name in sources if name in matches)
        steps = side.rule.steps(variables) if side.to else ()
        groups[key] = _Group(side.rule, sources, tuple(pattern.fill(match.values) for pattern in side.to), steps)
    _check_targets(groups.values())
    return list(groups.values())


def _check_targets(groups: Iterable[_Group]) -> None:
    made: dict[str, _Group] = {}
    for group in groups:
        for target in group.targets:
            if target in made:
                raise ConversionError(f"{target} is made twice: {made[target].note}; {group.note}")
            made[target] = group


def _present(group: _Group, found: Mapping[str, T], what: str) -> bool:
    """Whether the members of a group are in a room. Raises ConversionError if only some are."""
    here = [name for name in group.sources if name in found]
    if here and len(here) < len(group.sources):
        missing = sorted(set(group.sources) - set(here))
        raise ConversionError(f"{group.rule.where}: of {', '.join(group.sources)}, {', '.join(missing)} has no {what}")
    return bool(here)


def _tensors(groups: list[_Group], found: dict[str, Lazy], direction: Direction, *, states: bool) -> dict[str, Lazy]:
    made: dict[str, Lazy] = {}
    for group in groups:
        if not group.targets or not _present(group, found, "tensor beside the others"):
            continue
        tensors = [found[name] for name in group.sources]
        for step in group.steps if direction == "a to b" else reversed(group.steps):
            change = step.ahead if direction == "a to b" else step.back
            tensors = change(group.sources[0], tensors)
        if len(tensors) != len(group.targets):
            raise ConversionError(f"{group.note}: makes {len(tensors)} tensors")
        if group.rule.dtype and not states:
            tensors = [_cast(tensor, group.rule.dtype) for tensor in tensors]
        made.update(zip(group.targets, tensors, strict=True))
    return made


def _cast(tensor: Lazy, dtype: str) -> Lazy:
    if tensor.dtype == dtype:
        return tensor
    return replace(tensor, dtype=dtype, read=lambda: cast(tensor.read(), dtype))


def _values(groups: list[_Group], found: dict[str, T], what: str) -> dict[str, T]:
    """Metadata of each name, carried over to the names made from it. Raises ConversionError if it differs."""
    made: dict[str, T] = {}
    for group in groups:
        values = [found[name] for name in group.sources if name in found]
        if any(value != values[0] for value in values):
            raise ConversionError(f"{group.note}: the {what} differs: {', '.join(map(str, values))}")
        if values:
            made.update(dict.fromkeys(group.targets, values[0]))
    return made


def _members(groups: list[_Group], names: list[str]) -> list[str]:
    """The parameters of an optimizer's group, by their new names."""
    of = {source: group for group in groups for source in group.sources}
    made: dict[str, None] = {}
    for name in names:
        group = of.get(name)
        if group is None:
            raise ConversionError(f"{name} is in a group of the optimizer, and is not a parameter of the checkpoint")
        if not set(group.sources) <= set(names):
            raise ConversionError(f"{group.note}: they are in different groups of the optimizer")
        made.update(dict.fromkeys(group.targets))
    return list(made)
