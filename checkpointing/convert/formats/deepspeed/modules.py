"""Reads DeepSpeed's model states: the module's own tensors and types, buffers, frozen and tied parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from everstep.checkpointing.convert.core.casting import cast
from everstep.checkpointing.convert.core.content import ConversionError, Lazy
from everstep.checkpointing.convert.files.filetensor import FileTensor

from .files import Files, read_state
from .partitions import Shapes, fragments

TIED = "tied_modules."


@dataclass
class Module:
    """The module of one model-parallel rank, as its model states hold it; `tensors` in the type it computes in."""

    shapes: list[Shapes] = field(default_factory=list)  # of what is trained, by group (ZeRO-3: by sub-group)
    tensors: dict[str, FileTensor] = field(default_factory=dict)
    buffers: dict[str, Lazy] = field(default_factory=dict)
    frozen: dict[str, Lazy] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    layers: dict[str, int] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)  # what of the module is no tensor
    candidates: dict[str, list[tuple[int, FileTensor]]] = field(default_factory=dict)  # tied: what may be it, by layer

    @property
    def trained(self) -> Shapes:
        return {name: shape for group in self.shapes for name, shape in group.items()}


def group_shapes(state: dict[str, Any]) -> list[Shapes]:
    """The shapes of what is trained, by group of the optimizer; none without ZeRO."""
    return [{name: tuple(shape) for name, shape in group.items()} for group in state.get("param_shapes") or []]


def whole_module(
    path: Path,
    state: dict[str, Any],
    layers: Mapping[int, dict[str, Any]],
    placed: Sequence[Mapping[str, int]] = (),
) -> Module:
    """The module of ZeRO-0, 1 and 2. `layers`: a pipeline's layers, of which this rank may have some; `placed`: by
    group of the optimizer, the elements that it holds of each parameter, if the model states lack them."""
    made = Module(shapes=group_shapes(state))
    module = state.get("module")
    sizes = {name: size for group in placed for name, size in group.items()}
    sizes |= {name: prod(shape) for name, shape in made.trained.items()}
    frozen = state.get("frozen_param_shapes") or {}
    buffers = set(state.get("buffer_names") or ())
    if module is None:
        _from_layers(made, layers, {**dict.fromkeys((*frozen, *buffers)), **sizes})
    else:
        made.tensors = {name: tensor for name, tensor in module.items() if isinstance(tensor, FileTensor)}
        made.unknown += [name for name, value in module.items() if not isinstance(value, FileTensor | None)]
    if not made.shapes:
        made.shapes = _shapes_of(path, made.tensors, placed)
    trained = made.trained
    made.tied = {**_shared(made.tensors, trained), **(state.get("shared_params") or {})}
    for name, tensor in made.tensors.items():
        if name in buffers:
            made.buffers[name] = tensor.lazy(f"{path.name}, buffer")
        elif name in frozen or (trained and name not in trained and name not in made.tied):
            made.frozen[name] = tensor.lazy(f"{path.name}, frozen")  # ZeRO-1 does not list what is frozen
    missing = [name for name in (*frozen, *buffers) if name not in made.tensors and name not in made.tied]
    if missing:
        raise ConversionError(f"{path}: the module has no {', '.join(sorted(missing))}, which it lists")
    return made


def _shapes_of(path: Path, tensors: Mapping[str, FileTensor], placed: Sequence[Mapping[str, int]]) -> list[Shapes]:
    """The shapes of what an optimizer holds, by group, as the module has them."""
    missing = [name for group in placed for name in group if name not in tensors]
    if missing:
        raise ConversionError(f"{path}: the optimizer holds {', '.join(missing)}, which the module has not")
    return [{name: tensors[name].shape for name in group} for group in placed]


def _from_layers(made: Module, layers: Mapping[int, dict[str, Any]], wanted: Mapping[str, int | None]) -> None:
    """A pipeline's stage: layer NN holds its tensors without their prefix; those of tied modules are under the tie.

    `wanted`: the names, with the number of elements where known.
    """
    loose: list[tuple[int, str, FileTensor]] = []
    for layer, tensors in layers.items():
        for key, tensor in tensors.items():
            name = f"{layer}.{key}"
            if name in wanted:
                made.tensors[name], made.layers[name] = tensor, layer
            else:
                loose.append((layer, key, tensor))
    for name in wanted:
        if not name.startswith(TIED):
            continue
        key = name.split(".", 2)[2]
        shape, size = made.trained.get(name), wanted[name]
        fitting = [
            (layer, tensor)
            for layer, other, tensor in loose
            if other == key and shape in (None, tensor.shape) and size in (None, tensor.elements)
        ]
        if fitting:
            made.layers[name], made.tensors[name] = fitting[0]
        if len(fitting) > 1:
            made.candidates[name] = fitting
        if len(shapes := {tensor.shape for _, tensor in fitting}) > 1:
            told = " or ".join(str(list(each)) for each in sorted(shapes))
            raise ConversionError(f"{fitting[0][1].path}: {name} may be of shape {told}: the files do not say")


def resolve_ties(module: Module, masters: Mapping[str, Lazy]) -> None:
    """If several layers of a pipeline may be the tied one, choose the one that its master weight rounds to."""
    for name, fitting in module.candidates.items():
        master = masters[name].read()
        for layer, tensor in fitting:
            if cast(master, tensor.dtype).tobytes() == tensor.read().tobytes():
                module.layers[name], module.tensors[name] = layer, tensor
                break


def take_unclaimed(modules: Sequence[Module], layers: Mapping[int, dict[str, Any]]) -> None:
    """Parameters in a pipeline's layers that no stage trains are frozen: ZeRO-1 does not list them. `modules`: the
    stages of one tensor-parallel rank."""
    claimed = {tensor for module in modules for tensor in module.tensors.values()}
    for layer, tensors in layers.items():
        for key, tensor in tensors.items():
            if not isinstance(tensor, FileTensor | None):
                modules[0].unknown.append(f"{layer}.{key}")
            elif tensor is not None and tensor not in claimed:
                name = f"{layer}.{key}"
                stage = next((each for each in modules if layer in each.layers.values()), modules[0])
                stage.tensors[name], stage.layers[name] = tensor, layer
                stage.frozen[name] = tensor.lazy(f"{tensor.path.name}, frozen")


def layered_modules(
    folder: Path, stages: Sequence[dict[str, Any]], layers: Mapping[int, dict[str, Any]]
) -> list[Module]:
    """The modules of a pipeline's stages whose optimizers have no names: the layers in order, as many parameters in
    each stage as its optimizer has. Raises ConversionError if the counts differ: tied parameters have no names."""
    buffers = {name for state in stages for name in state.get("buffer_names") or ()}
    named = [
        (layer, f"{layer}.{key}", tensor)
        for layer, tensors in sorted(layers.items())
        for key, tensor in tensors.items()
        if isinstance(tensor, FileTensor)
    ]
    counts = [_numbered(folder, state) for state in stages]
    trained = [entry for entry in named if entry[1] not in buffers]
    if sum(counts) != len(trained):
        raise ConversionError(
            f"{folder}: the optimizers of the pipeline's stages have {counts} parameters without names, and its "
            f"layers {len(trained)}: which are tied or frozen is not said in a pipeline without ZeRO; save it with "
            "ZeRO-1"
        )
    made = []
    at = 0
    for count in counts:
        ours = trained[at : at + count]
        at += count
        if at < len(trained) and ours and trained[at][0] == ours[-1][0]:
            raise ConversionError(
                f"{folder}: layer {ours[-1][0]} would be on two stages of the pipeline, which none is"
            )
        held = {layer for layer, _, _ in ours}
        entries = [entry for entry in named if entry[0] in held]
        module = Module(tensors={name: tensor for _, name, tensor in entries})
        module.layers = {name: layer for layer, name, _ in entries}
        module.buffers = {
            name: tensor.lazy(f"{tensor.path.name}, buffer") for _, name, tensor in entries if name in buffers
        }
        made.append(module)
    return made


def _numbered(folder: Path, state: dict[str, Any]) -> int:
    """How many parameters the optimizer in a model state has."""
    optimizer = state.get("optimizer")
    base = optimizer.get("optimizer_state_dict", optimizer) if isinstance(optimizer, dict) else {}
    if "param_groups" not in base:
        raise ConversionError(f"{folder}: a stage's model states hold no optimizer state: neither in them nor in files")
    return sum(len(group["params"]) for group in base["param_groups"])


def _shared(tensors: Mapping[str, FileTensor], trained: Mapping[str, object]) -> dict[str, str]:
    """Tied names: they were saved as the same piece of the same storage."""
    owners: dict[tuple[Path, int, int, tuple[int, ...], tuple[int, ...]], str] = {}
    tied: dict[str, str] = {}
    for name in sorted(tensors, key=lambda name: name not in trained):  # a stable sort: what is trained comes first
        tensor = tensors[name]
        place = (tensor.path, tensor.offset, tensor.start, tensor.shape, tensor.strides)
        if tensor.elements and owners.setdefault(place, name) != name:
            tied[name] = owners[place]
    return tied


def divided_module(states: Mapping[Path, dict[str, Any]]) -> Module:
    """The module of ZeRO-3, from the model states of the data-parallel ranks in order."""
    (path, first), *_ = states.items()
    made = Module(shapes=group_shapes(first))
    buffers = set(first.get("buffer_names") or ())
    for name, tensor in first["module"].items():
        if name in buffers:
            made.buffers[name] = tensor.lazy(f"{path.name}, buffer")
        elif isinstance(tensor, FileTensor):
            made.tensors[name] = tensor
        elif tensor is not None:
            made.unknown.append(name)
    for name, shape in (first.get("frozen_param_shapes") or {}).items():
        parts = [(state.get("frozen_param_fragments") or {}).get(name) for state in states.values()]
        if any(part is None for part in parts):
            raise ConversionError(f"{path.parent}: a rank's model states have no fragment of the frozen {name}")
        made.frozen[name] = fragments([part for part in parts if part is not None], tuple(shape), name)
    made.tied = dict(first.get("shared_params") or {}) or _emptied_ties(made, path)
    return made


def _emptied_ties(made: Module, path: Path) -> dict[str, str]:
    """ZeRO-3 lists no ties where it made the module; an alias is the name with the same emptied storage as another."""
    known = [name for name in made.tensors if name in made.trained or name in made.frozen]
    tied: dict[str, str] = {}
    for alias in made.tensors.keys() - set(known):
        owners = [name for name in known if made.tensors[name].offset == made.tensors[alias].offset]
        if len(owners) != 1:
            raise ConversionError(f"{path}: {alias} is neither trained, frozen nor a buffer, and its owner is unknown")
        tied[alias] = owners[0]
    return tied


def pipeline_layers(files: Files) -> dict[int, dict[int, dict[str, Any]]]:
    """The layers of a pipeline's files, by tensor-parallel rank and number."""
    made: dict[int, dict[int, dict[str, Any]]] = {}
    for (layer, tensor), path in sorted(files.layers.items()):
        made.setdefault(tensor, {})[layer] = read_state(path)
    return made


def expert_tensors(files: Files) -> dict[str, FileTensor]:
    """The experts' own tensors, by their global names."""
    made: dict[str, FileTensor] = {}
    for path in files.experts.values():
        made.update({name: value for name, value in read_state(path).items() if isinstance(value, FileTensor)})
    return made
