"""Writing a checkpoint: chunks by any writer in any order, then one part per writer, then, once, the manifest.

Writers need no communication. Each writes its chunks and then lists them in a part; the writer that finds the parts
complete checks that every file is there, and commits. Parts belong to one attempt (the folder's name), so files of an
earlier attempt are never mixed in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from .manifest import (
    NAME,
    Array,
    CheckpointError,
    Manifest,
    checksum,
)
from .store import Buffer, Store

PARTS = "parts"
_FOLDER = re.compile(r"step-(\d{9})-([0-9a-f]{11})-[0-9a-f]{4,}")


def folder_name(step: int, now_s: float, unique: str) -> str:
    """The folder of one attempt to save: ordered by step, then by time."""
    return f"step-{step:09d}-{int(now_s * 1000):011x}-{unique}"


def parse_folder(name: str) -> tuple[float, int] | None:
    """(seconds since 1970, step) of a folder that `folder_name` named; None if it did not."""
    match = _FOLDER.fullmatch(name)
    return (int(match[2], 16) / 1000, int(match[1])) if match else None


class ChunkWriter:
    """One writer of a checkpoint: puts arrays, or some chunks of them. Any thread may call `put`."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._arrays: dict[str, Array] = {}
        self._sums: dict[str, dict[int, str]] = {}
        self.scalars: dict[str, dict[str, dict[str, Any]]] = {}
        self.written_bytes = 0

    def declare(self, path: str, array: Array) -> None:
        """This writer has chunks of that array; some other may have the rest."""
        self._arrays[path] = array
        self._sums.setdefault(path, {})
        if array.chunks == 0:
            self.store.put(f"{path}/zarr.json", [array.zarr_json()])

    def put(self, path: str, chunk: int, data: Buffer) -> None:
        """Write one chunk: the row-major bytes of its rows; the last one may be short, and is filled up with zeros."""
        array = self._arrays[path]
        view = memoryview(data).cast("B")
        room = bytes(array.chunk_bytes - len(view))
        rows = min(array.chunk_rows, array.rows - chunk * array.chunk_rows)
        if len(view) != rows * array.row_bytes:
            raise CheckpointError(f"{path}: chunk {chunk} has {len(view)} bytes, expected {rows * array.row_bytes}")
        told = _checksum_of_both(view, room)
        self.store.put(f"{path}/{array.key(chunk)}", [view, room] if room else [view])
        if chunk == 0:
            self.store.put(f"{path}/zarr.json", [array.zarr_json()])
        self._sums[path][chunk] = told
        self.written_bytes += array.chunk_bytes

    def has(self, path: str, chunk: int) -> bool:
        """Whether this writer has put that chunk."""
        return chunk in self._sums.get(path, ())

    def scalar(self, state: str, name: str, dtype: str, value: float) -> None:
        """An optimizer state of a parameter that is one number."""
        self.scalars.setdefault(state, {})[name] = {"dtype": dtype, "value": value}

    def part(self) -> dict[str, Any]:
        """The arrays, chunks and scalars that this writer has put, as JSON values."""
        arrays = {
            path: {**array.to_json(), "checksums": {str(n): s for n, s in self._sums[path].items()}}
            for path, array in self._arrays.items()
        }
        return {"arrays": arrays, "scalars": self.scalars}

    def finish(self, writer: str) -> None:
        """After this writer's last chunk: make the chunks durable, and list them in its part."""
        self.store.flush()
        self.say(writer)

    def say(self, writer: str) -> None:
        """Write a part with the chunks so far, for a later attempt to find. Not made durable: `commit` does that."""
        self.store.put(f"{PARTS}/{writer}.json", [json.dumps(self.part(), separators=(",", ":")).encode()])


def _checksum_of_both(data: memoryview, padding: bytes) -> str:
    if not padding:
        return checksum(data)
    import xxhash

    state = xxhash.xxh3_64(data)
    state.update(padding)
    return state.hexdigest()


@dataclass
class Parts:
    """What the writers of a checkpoint have put so far: `arrays` that are whole, paths of others, and scalars."""

    arrays: dict[str, Array] = field(default_factory=dict)
    torn: set[str] = field(default_factory=set)
    scalars: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)


def read_parts(store: Store) -> Parts:
    """All parts of a checkpoint that is being written, put together."""
    arrays: dict[str, Array] = {}
    sums: dict[str, dict[int, str]] = {}
    parts = Parts()
    for name in sorted(store.sizes(PARTS)):
        data = store.get(name)
        if data is None or not name.endswith(".json"):
            continue
        try:
            part = json.loads(data)
        except ValueError:
            continue  # it is being written, or its writer was killed
        for path, raw in part["arrays"].items():
            numbered: Mapping[str, str] = raw.pop("checksums")
            arrays[path] = Array.from_json({**raw, "checksums": ()})
            sums.setdefault(path, {}).update((int(number), told) for number, told in numbered.items())
        for state, values in part["scalars"].items():
            parts.scalars.setdefault(state, {}).update(values)
    for path, array in arrays.items():
        if len(sums[path]) == array.chunks:
            parts.arrays[path] = replace(array, checksums=tuple(sums[path][n] for n in range(array.chunks)))
        else:
            parts.torn.add(path)
    return parts


def commit(store: Store, manifest: Manifest) -> None:
    """Make the checkpoint exist: after checking that every file is there and of its size.

    Raises CheckpointError, naming the first that is not. Writes the groups' metadata too.
    """
    for path, data in manifest.group_files():
        store.put(path, [data])
    store.flush()
    found = store.sizes()
    for path, _, size in manifest.files():
        if found.get(path) != size:
            got = f"{found[path]} bytes" if path in found else "nothing"
            raise CheckpointError(f"{store.url}/{path}: expected {size} bytes, found {got}: not committed", path)
    store.commit(NAME, manifest.to_bytes())


def try_commit(store: Store, manifest: Manifest, expected: Iterable[str], writers: int = 1) -> bool:
    """Commit if the parts make up all the `expected` arrays, and any others they have; returns whether they did.

    With fewer parts than `writers` they are not even read: of many writers, only the last ones read what all have put.
    """
    if len(store.sizes(PARTS)) < writers:
        return False
    parts = read_parts(store)
    if parts.torn or any(path not in parts.arrays for path in expected):
        return False
    arrays = dict(sorted(parts.arrays.items()))
    commit(store, replace(manifest, arrays=arrays, scalars={**manifest.scalars, **parts.scalars}))
    store.remove(PARTS)
    return True


class Retained(NamedTuple):
    """Old checkpoints: the removed ones, and those of other runs, which are never removed."""

    removed: list[str]
    strangers: list[str]


def retain(
    store: Store, *, count: int, age_s: float, now_s: float, mine: Callable[[str], bool] = lambda name: True
) -> Retained:
    """Remove checkpoints beyond the newest `count` that are also older than `age_s`; and what was never committed.

    An attempt that is not committed is left alone until a newer checkpoint is. What is not `mine` (by name, see
    `lineage.py`) is another run's, and never touched.
    """
    attempts = sorted((parsed, name) for name in store.folders() if (parsed := parse_folder(name)))
    committed = [(at, name) for (at, _), name in attempts if store.inside(name).get(NAME, 0, 1) is not None]
    strangers = [name for _, name in committed if not mine(name)]
    committed = [(at, name) for at, name in committed if name not in strangers]
    if not committed:
        return Retained([], strangers)
    newest_s = committed[-1][0]
    good = {name for _, name in committed}
    kept = {name for at, name in committed[-count:]} | {name for at, name in committed if now_s - at < age_s}
    doomed = [
        name
        for (at, _), name in attempts
        if name not in kept and name not in strangers and (name in good or (at < newest_s and mine(name)))
    ]
    for name in doomed:
        store.remove(f"{name}/{NAME}")  # first, so that no reader sees a partly removed checkpoint
        store.remove(name)
    return Retained(doomed, strangers)
