"""One writer's part in saving a version: its shards' records, as chunks of a checkpoint's arrays.

A shard is a chunk: shards are cut by rows, and all shards of a parameter but the last have equal sizes. So each owner
writes its own chunks, and no writer waits for another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from everstep.checkpointing.memory.record_format import Item, items
from everstep.checkpointing.universal.lineage import Lineage, begun_s, lineage_of
from everstep.checkpointing.universal.manifest import (
    NAME,
    Array,
    CheckpointError,
    Manifest,
    path_of,
)
from everstep.checkpointing.universal.store import Store, StoreError, open_store
from everstep.checkpointing.universal.writer import (
    ChunkWriter,
    Retained,
    retain,
    try_commit,
)

from .request import SaveRequest, ShardPiece

T = TypeVar("T")
FIRST_RETRY_S = 0.25  # then twice as long each time
SHARDS_AT_ONCE = 8  # whose records are in memory together


class Gone(Exception):
    """The version is no longer in memory."""


Fetch = Callable[[Sequence[int]], Mapping[int, bytes | memoryview]]


def save_part(
    request: SaveRequest,
    fetch: Fetch,
    pause: Callable[[float], None] = time.sleep,
    *,
    moved: Callable[[], None] = lambda: None,
    warned: Callable[[str], None] = lambda text: None,
) -> bool:
    """Write this writer's part of a checkpoint; returns whether it was the last, which commits.

    `fetch` returns the records of shards at the request's version. `moved` is called on progress of the storage,
    `warned` with problems that do not keep the checkpoint from being saved.
    Raises StoreError if retries of the storage failed, Gone if the records no longer exist, CheckpointError if the
    stored bytes differ from the written ones.
    """
    folder = open_store(request.url, request.options).inside(request.name)
    writer = ChunkWriter(folder)
    for first in range(0, len(request.pieces), SHARDS_AT_ONCE):
        pieces = request.pieces[first : first + SHARDS_AT_ONCE]
        records = fetch([piece.shard for piece in pieces])
        for piece in pieces:
            if piece.shard not in records:
                raise Gone(f"version {request.version} of shard {piece.shard} is no longer in any memory")
            found = items(records[piece.shard])
            _retried(folder, lambda piece=piece, found=found: _put(writer, request, piece, found), pause)  # type: ignore[misc]
            moved()
    _retried(folder, lambda: writer.finish(request.writer), pause)
    moved()
    return finish(request, folder, pause, warned=warned)


def finish(
    request: SaveRequest,
    folder: Store,
    pause: Callable[[float], None] = time.sleep,
    *,
    warned: Callable[[str], None] = lambda text: None,
) -> bool:
    """Commit if all parts are there; then remove old checkpoints. Returns whether it committed.

    `warned` gets the text of problems that do not keep the checkpoint from being saved.
    """
    manifest = replace(Manifest(**request.manifest), saved_at=time.time())
    if not _retried(folder, lambda: try_commit(folder, manifest, request.expected, request.writers), pause):
        return folder.get(NAME, 0, 1) is not None
    _retain(request, folder, pause, warned)
    return True


def _retain(request: SaveRequest, folder: Store, pause: Callable[[float], None], warned: Callable[[str], None]) -> None:
    """Remove old checkpoints of this run. A failure does not affect the new one."""
    store, own = open_store(request.url, request.options), Lineage.from_json(request.manifest["run"])

    def mine(name: str) -> bool:
        lineage = lineage_of(store, name)
        return own.has_named(name) if lineage is None else own.owns(lineage.run, begun_s(name))

    def let_go() -> Retained:
        return retain(store, count=request.keep, age_s=request.keep_s, now_s=time.time(), mine=mine)

    try:
        strangers = _retried(folder, let_go, pause).strangers
    except (StoreError, CheckpointError) as error:
        warned(f"older checkpoints in {request.url} could not be removed: {error}")
        return
    if strangers:
        warned(
            f"{request.url} has checkpoints of another run too ({strangers[-1]}): they are left alone, and a restart "
            "of this job will ask which to resume from; give each job a folder of its own"
        )


def saved_bytes(request: SaveRequest) -> int:
    """The size of all arrays of a committed checkpoint; 0 if that cannot be found out any more."""
    try:
        data = open_store(request.url, request.options).inside(request.name).get(NAME)
        arrays = Manifest.from_bytes(data, request.name).arrays.values() if data is not None else ()
    except (StoreError, CheckpointError):
        return 0
    return sum(array.chunks * array.chunk_bytes for array in arrays)


def _put(writer: ChunkWriter, request: SaveRequest, piece: ShardPiece, found: Sequence[Item]) -> None:
    parameter = request.parameters[piece.parameter]
    for item in found:
        if item.name == "value":
            room = parameter.room
        elif not item.dtype or item.value.ndim == 0:
            value = item.value.item() if item.dtype else item.value
            writer.scalar(item.name, parameter.name, item.dtype, value)
            continue
        else:
            room = f"optimizer/{item.name}"
        shape, rows, chunk = parameter.shape, parameter.rows, piece.chunk
        if item.value.size != piece.elements:  # only where a shard is a whole parameter
            shape, rows, chunk = item.value.shape, item.value.shape[0], 0
        path = path_of(room, parameter.name)
        if not writer.has(path, chunk):
            array = Array(tuple(shape), item.dtype, (rows, *shape[1:]) if shape else ()).named(parameter.name)
            writer.declare(path, array)
            if array.chunks:
                writer.put(path, chunk, item.value.reshape(-1).view(np.uint8).data)


def _retried(store: Store, action: Callable[[], T], pause: Callable[[float], None]) -> T:
    """Storage fails now and then: try again, a bounded number of times, ever later."""
    for attempt in range(store.tries):
        try:
            return action()
        except (StoreError, CheckpointError):
            if attempt == store.tries - 1:
                raise
            pause(FIRST_RETRY_S * 2**attempt)
    raise AssertionError("unreachable")
