"""A checkpoint of another framework, read where it lies, as if it were converted: for a job that resumes from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from everstep.checkpointing.convert.core.content import ConversionError, Lazy
from everstep.checkpointing.convert.core.format import Options, detect
from everstep.checkpointing.convert.formats import universal
from everstep.checkpointing.universal.manifest import Array, CheckpointError, path_of
from everstep.checkpointing.universal.reader import Checkpoint, open_checkpoint
from everstep.checkpointing.universal.store import LocalStore

from .driver import read
from .leaving import check_understood

HELD = 4  # whole tensors: a parameter's values and the states of its optimizer, from which shards are cut


@dataclass(frozen=True)
class ForeignCheckpoint(Checkpoint):
    """The checkpoint of another framework. Its tensors have no checksums; the format's reader checks what it can.

    `remarks` is what its reader says, and what it leaves out.
    """

    tensors: Mapping[str, Lazy] = field(default_factory=dict)
    held: dict[str, np.ndarray] = field(default_factory=dict)

    def read(self, path: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The rows [start, stop) of a tensor. Raises CheckpointError."""
        shape = self.array(path).shape
        whole = self.held.pop(path, None)
        if whole is None:
            try:
                whole = self.tensors[path].read()
            except (ConversionError, OSError) as error:
                raise CheckpointError(str(error)) from None
        self.held[path] = whole
        while len(self.held) > HELD:
            del self.held[next(iter(self.held))]
        return whole[start:stop] if shape else whole


def open_any(url: str, options: Mapping[str, Any] | None = None) -> Checkpoint:
    """The checkpoint at `url`: of Everstep, or in a local folder of any format that is converted without settings.

    Raises CheckpointError, or StoreError.
    """
    try:
        return open_checkpoint(url, options)
    except CheckpointError as error:
        path = url.removeprefix("file://")
        if error.damaged or "://" in path:
            raise
        try:
            origin = detect(Path(path))
        except (ConversionError, OSError):
            raise error from None
    return _foreign(path, origin)


def _foreign(path: str, origin: str) -> ForeignCheckpoint:
    try:
        content = read(path, origin, Options())
        check_understood(content, path)
    except ConversionError as error:
        raise CheckpointError(f"{error} (everstep convert has options for that; then resume from its result)") from None
    tensors = {path_of(room, name): tensor for room, name, tensor in content.tensors()}
    manifest = universal.manifest_of(content)
    manifest.arrays = {path: Array(tensor.shape, tensor.dtype, tensor.shape) for path, tensor in tensors.items()}
    remarks = (*content.warnings, *(f"left out: {name} ({why})" for name, why in content.dropped))
    return ForeignCheckpoint(LocalStore(Path(path).absolute()), manifest, remarks, tensors)
