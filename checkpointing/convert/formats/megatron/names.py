"""Megatron's names: those of its live modules, and those of a distributed checkpoint, where layers are stacked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_STACKED = re.compile(r"^(?P<stem>(?:.*\.)?layers)\.(?!\d+\.)(?P<rest>.+)$")
_NUMBERED = re.compile(r"^(?P<stem>(?:.*?\.)?layers)\.(?P<layer>\d+)\.(?P<rest>.+)$")
_EXPERTS = re.compile(r"^(?P<head>.*\bexperts)\.experts\.(?P<linear>\w+)\.(?P<kind>weight|bias|_extra_state)$")
_LOCAL_EXPERT = re.compile(r"^(?P<head>.*\bexperts)\.local_experts\.(?P<expert>\d+)\.(?P<linear>\w+)\.(?P<kind>\w+)$")
_GROUPED_EXPERT = re.compile(r"^(?P<head>.*\bexperts)\.(?P<linear>linear_\w+)\.(?P<kind>weight|bias)(?P<expert>\d+)$")
# Modules of the local layer specification -> the fused ones of Transformer Engine, whose names checkpoints have.
_FUSED = (
    ("input_layernorm", "self_attention.linear_qkv.layer_norm"),
    ("pre_mlp_layernorm", "mlp.linear_fc1.layer_norm"),
)


@dataclass(frozen=True)
class Naming:
    """The naming of a live model. `local`: of the local layer specification, not Transformer Engine's; `grouped`:
    experts share one module (`linear_fc1.weight7`) instead of one each; `stacked`: layers do so in checkpoints."""

    local: bool
    grouped: bool = False
    stacked: bool = True


@dataclass(frozen=True)
class StackedPlace:
    """A live parameter's place in a checkpoint: `key`, and the index on each of its stacked axes."""

    key: str
    index: tuple[int, ...]
    rule: str


def expand(key: str, shape: tuple[int, ...], naming: Naming) -> Iterator[tuple[str, StackedPlace]]:
    """The live parameters that a checkpoint's key of the given whole shape contains, and their places in it."""
    stacked = _STACKED.match(key)
    if stacked is None:
        numbered = _NUMBERED.match(key)
        rest = numbered["rest"] if numbered else key
        prefix = f"{numbered['stem']}.{numbered['layer']}." if numbered else ""
        for name, index, rule in _unfuse(rest, shape, naming):
            yield prefix + name, StackedPlace(key, index, rule)
        return
    for layer in range(shape[0]):
        for name, index, rule in _unfuse(stacked["rest"], shape[1:], naming):
            rule = f"layer {layer} of the stacked {key}" + (f"; {rule}" if rule != key else "")
            yield f"{stacked['stem']}.{layer}.{name}", StackedPlace(key, (layer, *index), rule)


def _unfuse(rest: str, shape: tuple[int, ...], naming: Naming) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """The names within a layer, each with its index on the axis of experts if there is one, and why."""
    experts = _EXPERTS.match(rest)
    if experts is not None:
        for expert in range(shape[0]):
            if naming.grouped:
                name = f"{experts['head']}.{experts['linear']}.{experts['kind']}{expert}"
            else:
                name = f"{experts['head']}.local_experts.{expert}.{experts['linear']}.{experts['kind']}"
            yield name, (expert,), f"expert {expert}"
        return
    for live, fused in _FUSED if naming.local else ():
        if rest.startswith(fused + "_"):
            yield f"{live}.{rest.removeprefix(fused + '_')}", (), f"{live} is fused into {fused}_* in checkpoints"
            return
    yield rest, (), rest


def place(name: str, naming: Naming) -> StackedPlace:
    """Where a live parameter belongs in a checkpoint. The inverse of `expand`."""
    numbered = _NUMBERED.match(name)
    if numbered is None:
        key, index = _fuse(name, naming)
        return StackedPlace(key, index, "")
    key, index = _fuse(numbered["rest"], naming)
    if naming.stacked:
        return StackedPlace(f"{numbered['stem']}.{key}", (int(numbered["layer"]), *index), "")
    return StackedPlace(f"{numbered['stem']}.{numbered['layer']}.{key}", index, "")


def _fuse(rest: str, naming: Naming) -> tuple[str, tuple[int, ...]]:
    expert = _LOCAL_EXPERT.match(rest) or _GROUPED_EXPERT.match(rest)
    if expert is not None:
        return f"{expert['head']}.experts.{expert['linear']}.{expert['kind']}", (int(expert["expert"]),)
    for live, fused in _FUSED if naming.local else ():
        if rest.startswith(live + "."):
            return f"{fused}_{rest.removeprefix(live + '.')}", ()
    return rest, ()


def naming_of(names: Iterable[str]) -> Naming:
    """The naming of a model whose parameters have these live names."""
    names = list(names)
    local = any(".input_layernorm." in name for name in names)
    grouped = any(_GROUPED_EXPERT.match(name) for name in names)
    unstacked = Naming(local, grouped, stacked=False)
    layers: dict[str, set[int]] = {}  # what is in a layer -> the layers that have it
    for name in names:
        numbered = _NUMBERED.match(name)
        if numbered is not None:
            rest = f"{numbered['stem']}.{_fuse(numbered['rest'], unstacked)[0]}"
            layers.setdefault(rest, set()).add(int(numbered["layer"]))
    stems: dict[str, set[int]] = {}
    for rest, found in layers.items():
        stems.setdefault(rest.split("layers.")[0], set()).update(found)
    even = all(found == stems[rest.split("layers.")[0]] for rest, found in layers.items())
    whole = all(found == set(range(len(found))) for found in stems.values())
    return Naming(local, grouped, stacked=even and whole)


def layer_of(name: str) -> int | None:
    """The number of the layer that a live parameter is in."""
    numbered = _NUMBERED.match(name)
    return int(numbered["layer"]) if numbered else None
