"""What DeepSpeed's model states tell: the module's own tensors and types, buffers, frozen and tied parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .content import ConversionError, Lazy
from .deepspeed_files import Files, read_state
from .deepspeed_partitions import Shapes, fragments
from .filetensor import FileTensor

_TIED = "tied_modules."


@dataclass
class Module:
    """The module of one model-parallel rank, as its model states hold it; `tensors` in the type it computes in."""

    shapes: list[Shapes] = field(default_factory=list)  # of what is trained, by group (ZeRO-3: by sub-group)
    tensors: dict[str, FileTensor] = field(default_factory=dict)
    buffers: dict[str, Lazy] = field(default_factory=dict)
    frozen: dict[str, Lazy] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    layers: dict[str, int] = field(default_factory=dict)

    @property
    def trained(self) -> Shapes:
        return {name: shape for group in self.shapes for name, shape in group.items()}


def group_shapes(state: dict[str, Any]) -> list[Shapes]:
    """The shapes of what is trained, by group of the optimizer; none without ZeRO."""
    return [{name: tuple(shape) for name, shape in group.items()} for group in state.get("param_shapes") or []]


def whole_module(path: Path, state: dict[str, Any], layers: Mapping[int, dict[str, Any]]) -> Module:
    """The module of ZeRO-0, 1 and 2. `layers`: a pipeline's layers, of which this rank may have some."""
    made = Module(shapes=group_shapes(state))
    module = state.get("module")
    trained = made.trained
    frozen = state.get("frozen_param_shapes") or {}
    buffers = set(state.get("buffer_names") or ())
    if module is None:
        _from_layers(made, layers, {*trained, *frozen, *buffers})
    else:
        made.tensors = {name: tensor for name, tensor in module.items() if isinstance(tensor, FileTensor)}
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


def _from_layers(made: Module, layers: Mapping[int, dict[str, Any]], wanted: set[str]) -> None:
    """A pipeline's stage: layer NN holds its tensors without their prefix; those of tied modules are under the tie."""
    loose: list[tuple[int, str, FileTensor]] = []
    for layer, tensors in layers.items():
        for key, tensor in tensors.items():
            name = f"{layer}.{key}"
            if name in wanted:
                made.tensors[name], made.layers[name] = tensor, layer
            else:
                loose.append((layer, key, tensor))
    for name in wanted:
        if not name.startswith(_TIED):
            continue
        key = name.split(".", 2)[2]
        shape = made.trained.get(name)
        for layer, other, tensor in loose:
            if other == key and shape in (None, tensor.shape):
                made.tensors[name], made.layers[name] = tensor, layer
                break


def _shared(tensors: Mapping[str, FileTensor], trained: Mapping[str, object]) -> dict[str, str]:
    """Names whose tensor is another's: both were saved as one piece of one storage."""
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
            raise ConversionError(f"{path}: {alias} is neither trained, frozen nor a buffer, and its owner is not told")
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
