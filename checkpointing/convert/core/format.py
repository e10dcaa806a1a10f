"""The formats there are, and which one a folder holds. One module each."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Protocol

from .content import Content, ConversionError
from .work import PieceWork


@dataclass(frozen=True, kw_only=True)
class Options:
    """The user's options beside source and destination. `rules`: rule files; `settings`: NAME=VALUE for a format."""

    rules: tuple[Path, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)


class Format(Protocol):
    """The module-level functions of each format's module. A read-only format has no `write`."""

    def detect(self, path: Path) -> bool:
        """Whether `path` looks like a checkpoint of this format. Cheap; opens no large file."""

    def read(self, path: Path, options: Options) -> Content:
        """The checkpoint at `path`: names, shapes and origins now, data lazily.

        Raises ConversionError for what is missing, mixed or not understood.
        """

    def write(self, content: Content, out: Path, options: Options, work: PieceWork) -> None:
        """Write `content` into the empty (or half-written) folder `out`, every file through `work`."""


FORMATS = "everstep.checkpointing.convert.formats"
# Modules of that package, in the order in which they are tried.
MODULES = {
    "deepspeed-universal": "deepspeed.universal",
    "deepspeed": "deepspeed.format",
    "megatron": "megatron.format",
    "megatron-legacy": "megatron.legacy",
    "dcp": "dcp.format",
    "hf": "huggingface.format",
}


READ_ONLY = ("megatron-legacy",)
WRITTEN_BY_TORCH = ("megatron", "dcp")
# The settings of each format, for reading and for writing. Each module documents its settings.
READ_SETTINGS = {
    "deepspeed": ("frozen", "masters"),
    "megatron": ("spec", "vocabulary", "masters"),
    "dcp": ("model",),
}
WRITE_SETTINGS = {
    "deepspeed": ("dp", "stage"),
    "megatron": ("padded_vocabulary",),
    "hf": ("max_shard_size", "dtype", "config"),
}


def load(name: str) -> Format:
    """The module of a format. Raises ConversionError for a name that is none."""
    if name not in MODULES:
        raise ConversionError(f"{name!r} is not a format: expected one of universal, {', '.join(MODULES)}")
    module: Format = import_module(f"{FORMATS}.{MODULES[name]}")
    return module


def detect(path: Path) -> str:
    """The name of the format of the checkpoint at `path`. Raises ConversionError if it is none of ours."""
    if not path.exists():
        raise ConversionError(f"{path}: there is no such file or folder")
    for name in MODULES:
        if load(name).detect(path):
            return name
    for each in path.iterdir() if path.is_dir() else ():
        if not os.access(each, os.R_OK, effective_ids=True):  # perhaps the file that identifies the format
            raise ConversionError(f"cannot read {each}: permission denied")
    raise ConversionError(
        f"{path}: not a checkpoint of any known format (universal, {', '.join(MODULES)}); "
        "if it is one, everstep convert takes its format with --from"
    )
