"""The files of a DeepSpeed checkpoint: which there are, that none is missing, that all are of one step."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everstep.checkpointing.convert.core.content import ConversionError
from everstep.checkpointing.convert.files.torchfile import load

_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_MODEL_PART = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_LAYER = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")
_EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
_FEW = 8  # names in an error


@dataclass
class Files:
    """Ranks are (data-parallel rank, model-parallel rank); the latter is pipeline stage * tp degree + tp rank."""

    folder: Path
    models: dict[int, Path] = field(default_factory=dict)  # by model-parallel rank
    model_parts: dict[tuple[int, int], Path] = field(default_factory=dict)  # ZeRO-3's, by rank
    optimizers: dict[tuple[int, int], Path] = field(default_factory=dict)
    layers: dict[tuple[int, int], Path] = field(default_factory=dict)  # a pipeline's, by (layer, tp rank)
    experts: dict[tuple[int, int, int], Path] = field(default_factory=dict)  # by (layer, expert, model-parallel rank)

    @property
    def first(self) -> Path:
        if self.models:
            return self.models[min(self.models)]
        return self.model_parts[min(self.model_parts)]


def tag_folder(path: Path, latest: str = "latest") -> Path:
    """The folder with the files: `path`, or the one in it that its file `latest` names."""
    if holds_files(path):
        return path
    try:
        tag = (path / latest).read_text().strip()
    except FileNotFoundError:
        raise ConversionError(
            f"{path}: no DeepSpeed checkpoint: neither a file {latest!r}, nor any *_model_states.pt"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path / latest}: cannot be read: {error}") from error
    if not tag or "/" in tag or tag in (".", ".."):
        raise ConversionError(f"{path / latest}: names the tag {tag!r}; expected the name of a folder beside it")
    folder = path / tag
    if not folder.is_dir():
        raise ConversionError(f"{path / latest}: names the tag {tag!r}, and there is no folder {folder}")
    return folder


def entries(folder: Path) -> list[Path]:
    """What is in a folder. Raises ConversionError if that cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise ConversionError(f"{folder}: cannot be read: {error.strerror}") from error


def holds_files(path: Path) -> bool:
    """Whether a folder itself holds files of a checkpoint."""
    return path.is_dir() and any(
        entry.name.endswith(("_model_states.pt", "_optim_states.pt")) for entry in entries(path)
    )


def find(folder: Path) -> Files:
    """The files by their ranks. Raises ConversionError if there is no model state."""
    files = Files(folder)
    for path in entries(folder):
        if found := _MODEL.fullmatch(path.name):
            files.models[int(found[1])] = path
        elif found := _MODEL_PART.fullmatch(path.name):
            files.model_parts[int(found[1]), int(found[2])] = path
        elif found := _OPTIMIZER.fullmatch(path.name):
            rank = int(found[1]), int(found[2])
            if rank in files.optimizers:
                raise ConversionError(f"{path}: and {files.optimizers[rank].name}: two files of one rank")
            files.optimizers[rank] = path
        elif found := _LAYER.fullmatch(path.name):
            files.layers[int(found[1]), int(found[2] or 0)] = path
        elif found := _EXPERT.fullmatch(path.name):
            files.experts[int(found[1]), int(found[2]), int(found[3])] = path
    if not files.models and not files.model_parts:
        raise ConversionError(f"{folder}: half-written: no *_model_states.pt of any rank is in it")
    return files


@dataclass(frozen=True)
class Sizes:
    """How the job was laid out. `model`: pipeline stages times tensor-parallel ranks."""

    data: int
    tensor: int
    pipeline: int

    @property
    def model(self) -> int:
        return self.tensor * self.pipeline


def sizes(state: dict[str, Any], files: Files) -> Sizes:
    """The layout according to a model state."""
    data, model = int(state.get("dp_world_size") or 1), int(state.get("mp_world_size") or 1)
    degrees = state.get("checkpoint_parallel_dimensions") or {}
    if files.layers:
        tensor = int(degrees.get("tp_degree") or 1 + max(tensor for _, tensor in files.layers))
    else:
        tensor = int(degrees.get("tp_degree") or model)
    pipeline = int(degrees.get("pp_degree") or max(model // tensor, 1))
    return Sizes(data, tensor, pipeline)


def check_complete(files: Files, layout: Sizes) -> None:
    """Raises ConversionError that names the ranks whose files are missing."""
    model = range(layout.model)
    both = [(data, rank) for rank in model for data in range(layout.data)]
    missing: list[str] = []
    if files.model_parts:
        missing += _missing(both, files.model_parts, "zero_pp_rank_{0}_mp_rank_{1:02d}_model_states.pt")
    else:
        missing += [f"mp_rank_{rank:02d}_model_states.pt" for rank in model if rank not in files.models]
    if files.optimizers:
        prefix = next(iter(files.optimizers.values())).name.partition("zero_pp_rank")[0]
        missing += _missing(both, files.optimizers, prefix + "zero_pp_rank_{0}_mp_rank_{1:02d}_optim_states.pt")
    if missing:
        more = f" and {len(missing) - _FEW} more" if len(missing) > _FEW else ""
        raise ConversionError(
            f"{files.folder}: half-written: the job had {layout.data} data-parallel and {layout.model} model-parallel "
            f"ranks; missing: {', '.join(missing[:_FEW])}{more}"
        )


def _missing(wanted: Iterable[tuple[int, int]], there: dict[tuple[int, int], Path], name: str) -> list[str]:
    return [name.format(*rank) for rank in wanted if rank not in there]


def read_state(path: Path) -> dict[str, Any]:
    """The dictionary in a file of the checkpoint."""
    state = load(path)
    if not isinstance(state, dict):
        raise ConversionError(f"{path}: holds a {type(state).__name__}; expected a dictionary")
    return state


def check_same(states: dict[Path, dict[str, Any]], key: str) -> Any:
    """The value that every state has under a key. Raises ConversionError that names two files where they differ."""
    (first, state), *others = states.items()
    for path, other in others:
        if other.get(key) != state.get(key):
            raise ConversionError(
                f"{path.parent}: mixed checkpoints: {key} is {state.get(key)!r} in {first.name} and "
                f"{other.get(key)!r} in {path.name}"
            )
    return state.get(key)
