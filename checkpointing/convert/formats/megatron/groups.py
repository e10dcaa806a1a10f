"""Which parameters are in which group of Megatron's optimizer: it stores none; they follow from how it makes groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from everstep.checkpointing.convert.core.content import Content
from everstep.checkpointing.convert.formats.dcp import json_values

# What --decoupled-lr is for; all else is in groups with the default schedule.
_DECOUPLED = ("embedding.word_embeddings.weight", "output_layer.weight")


def is_expert(name: str) -> bool:
    """Whether a live parameter is one rank's own, of a mixture of experts."""
    return ".experts." in name and ".shared_experts." not in name


def is_decayed(name: str, shape: tuple[int, ...]) -> bool:
    """Whether Megatron lets the weight of a parameter decay."""
    return not name.endswith(".bias") and len(shape) > 1


def members(
    shapes: Mapping[str, tuple[int, ...]], groups: Sequence[Mapping[str, Any]]
) -> tuple[list[list[str]], list[int]]:
    """(the names in each group, groups that cannot be distinguished): a parameter's group follows from whether it has
    weight decay, belongs to an expert, and has its own rate; an ambiguous parameter is put in the first such group."""
    found: list[list[str]] = [[] for _ in groups]
    doubtful: set[int] = set()
    for name, shape in shapes.items():
        fitting = list(range(len(groups)))
        for wanted in (
            lambda group: bool(group.get("is_expert_parallel")) == is_expert(name),  # noqa: B023
            lambda group: (group.get("wd_mult", 1.0) != 0.0) == is_decayed(name, shape),  # noqa: B023
            lambda group: _is_decoupled(group) == (name in _DECOUPLED),  # noqa: B023
        ):
            fitting = [at for at in fitting if wanted(groups[at])] or fitting
        if fitting:
            found[fitting[0]].append(name)
        if len(fitting) > 1:
            doubtful.update(fitting)
    return found, sorted(doubtful)


def add_groups(content: Content, shapes: Mapping[str, tuple[int, ...]], groups: Sequence[dict[str, Any]]) -> None:
    """The groups of one optimizer, with their members: each of `shapes` is in one of them."""
    first = len(content.groups)
    found, doubtful = members(shapes, groups)
    for names, group in zip(found, groups, strict=True):
        left: list[str] = []
        content.groups.append({"params": names, **json_values.settings(group, left)})
        content.unknown += [f"optimizer/groups/{len(content.groups) - 1}/{name}" for name in left]
    content.unknown += [f"optimizer/groups/{first + at} (which parameters are in it)" for at in doubtful]


def _is_decoupled(group: Mapping[str, Any]) -> bool:
    return bool(group.get("is_decoupled_lr")) or group.get("default_config") is False
