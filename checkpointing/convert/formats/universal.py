"""The universal checkpoint as one more format: its contents, and writing them, to any fsspec URL."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from everstep.checkpointing.convert.core.content import (
    Content,
    ConversionError,
    Lazy,
    Scalar,
)
from everstep.checkpointing.convert.core.work import Piece, PieceWork
from everstep.checkpointing.universal.manifest import (
    OTHER,
    Array,
    Manifest,
    chunk_shape,
    path_of,
)
from everstep.checkpointing.universal.reader import Checkpoint
from everstep.checkpointing.universal.store import Store
from everstep.checkpointing.universal.writer import (
    PARTS,
    ChunkWriter,
    read_parts,
    try_commit,
)

CHUNK_BYTES = 16 << 20
_SOURCE = f"{PARTS}/source"


def contents(checkpoint: Checkpoint) -> Content:
    """What a universal checkpoint holds."""
    manifest = checkpoint.manifest
    content = Content(
        step=manifest.step,
        params=_room(checkpoint, "params"),
        optimizer={state: _room(checkpoint, f"optimizer/{state}") for state in manifest.states},
        scalars={
            state: {name: Scalar(scalar["dtype"], scalar["value"]) for name, scalar in values.items()}
            for state, values in manifest.scalars.items()
        },
        buffers=_room(checkpoint, "buffers"),
        frozen=_room(checkpoint, "frozen"),
        tied=dict(manifest.tied),
        dtypes=dict(manifest.dtypes),
        groups=_groups(manifest),
        layers={name: layers[0] for name, layers in manifest.layers.items() if layers},
        scheduler=manifest.scheduler,
        extra=dict(manifest.extra),
        other=_room(checkpoint, OTHER),
    )
    kept = {"data": manifest.data, "registered": manifest.registered, "agreement": manifest.agreement}
    if manifest.agreement:
        content.extra["everstep"] = {**kept, "optimizer": manifest.optimizer, "run": manifest.run}
    return content


def _groups(manifest: Manifest) -> list[dict[str, Any]]:
    """The optimizer's groups with their parameters; a single group without names has all parameters."""
    groups: list[dict[str, Any]] = [dict(group) for group in manifest.optimizer.get("groups", [])]
    if len(groups) == 1:
        groups[0].setdefault("params", list(manifest.names("params")))
    return groups if all("params" in group for group in groups) else []


def _room(checkpoint: Checkpoint, room: str) -> dict[str, Lazy]:
    found = {}
    for name, array in checkpoint.manifest.names(room).items():
        path = path_of(room, name)
        found[name] = Lazy(array.shape, array.dtype, partial(checkpoint.read, path), f"{checkpoint.url}/{path}")
    return found


def manifest_of(content: Content) -> Manifest:
    """The manifest of `content`, but for its arrays."""
    ours: dict[str, Any] = content.extra.get("everstep", {})
    return Manifest(
        step=content.step,
        scalars={
            state: {name: asdict(scalar) for name, scalar in values.items()}
            for state, values in content.scalars.items()
        },
        tied=content.tied,
        layers={name: [layer] for name, layer in content.layers.items()},
        dtypes=content.dtypes,
        optimizer=ours.get("optimizer") or {"name": "", "groups": content.groups},
        scheduler=content.scheduler,
        data=ours.get("data", {}),
        registered=ours.get("registered", {}),
        run=ours.get("run", {}),
        agreement=ours.get("agreement", ""),
        extra={name: value for name, value in content.extra.items() if name != "everstep"},
        saved_at=time.time(),
    )


def is_attempt(store: Store) -> bool:
    """Whether what is in `store` was written by `write`, which has not come to its end."""
    return store.get(_SOURCE) is not None


def write(content: Content, store: Store, work: PieceWork, source: Mapping[str, Any]) -> None:
    """Write `content` as a universal checkpoint into `store`; arrays that an earlier attempt wrote are kept.

    `source` identifies the conversion: the remains of an attempt to convert something else are removed first.
    """
    told = json.dumps(source, sort_keys=True).encode()
    if store.get(_SOURCE) != told:
        store.remove("")
        store.commit(_SOURCE, told)
    arrays = read_parts(store).arrays
    pieces = []
    expected = []
    for number, (room, name, tensor) in enumerate(content.tensors()):
        if not name:
            raise ConversionError(f"{tensor.origin}: a tensor in {room} has no name")
        path = path_of(room, name)
        expected.append(path)
        if path not in arrays:
            pieces.append(Piece(path, 2 * tensor.nbytes, _writing(store, path, name, tensor, number)))
        else:
            work.skip(Piece(path, 2 * tensor.nbytes, lambda: None))
    work.run(pieces)
    if not try_commit(store, manifest_of(content), expected):
        raise AssertionError(f"{store.url}: parts of what was written are missing, which is a bug of everstep")


def _writing(store: Store, path: str, name: str, tensor: Lazy, number: int) -> Any:
    def do() -> None:
        array = Array(tensor.shape, tensor.dtype, chunk_shape(tensor.shape, tensor.dtype, CHUNK_BYTES)).named(name)
        writer = ChunkWriter(store)
        writer.declare(path, array)
        flat = tensor.read().reshape(-1).view(np.uint8) if array.chunks else np.empty(0, np.uint8)
        step = array.chunk_bytes
        for chunk in range(array.chunks):
            writer.put(path, chunk, flat[chunk * step : (chunk + 1) * step].data)
        writer.say(f"{number:06d}")

    return do
