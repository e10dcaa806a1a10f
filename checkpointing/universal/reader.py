"""Reading a checkpoint: the manifest first, then only the chunks that are wanted, each checked against it.

Plain zarr gives zeros for a missing chunk, and wrong numbers for a flipped bit, without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .dtypes import numpy_dtype
from .manifest import (
    NAME,
    Array,
    CheckpointError,
    Manifest,
    checksum,
)
from .store import Store, open_store
from .writer import parse_folder


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint. Methods raise CheckpointError, which names what is damaged, or StoreError.

    `remarks`: lines for the user about one of another framework.
    """

    store: Store
    manifest: Manifest
    remarks: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return self.store.url

    def array(self, path: str) -> Array:
        """The description of the array at `path` (`params/<name>`, ...)."""
        if path not in self.manifest.arrays:
            raise CheckpointError(f"{self.url} has no {path}")
        return self.manifest.arrays[path]

    def read(self, path: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The rows [start, stop) of an array, in its own type; reads and checks just the chunks that have them."""
        array = self.array(path)
        stop = array.rows if stop is None else stop
        shape = (stop - start, *array.shape[1:]) if array.shape else ()
        out = np.empty(shape, numpy_dtype(array.dtype))
        self.read_into(path, out, start)
        return out

    def read_into(self, path: str, out: np.ndarray, start: int = 0) -> None:
        """Read rows from `start` on into `out`, which is contiguous, of the array's type, and determines their number.

        A chunk that is needed whole is read into place and verified there: after an error `out` is undefined.
        """
        array = self.array(path)
        if not out.size:
            return
        room, row = out.reshape(-1).view(np.uint8).data, array.row_bytes
        stop = start + (len(out) if array.shape else 1)
        for number in range(start // array.chunk_rows, -(-stop // array.chunk_rows)):
            first = number * array.chunk_rows
            low, high = max(start, first), min(stop, first + array.chunk_rows)
            place = room[(low - start) * row : (high - start) * row]
            if len(place) == array.chunk_bytes:
                self._fill(f"{path}/{array.key(number)}", array.checksums[number], place)
            else:
                place[:] = memoryview(self.chunk(path, number))[(low - first) * row : (high - first) * row]

    def chunk(self, path: str, number: int) -> bytes:
        """A chunk's file, checked."""
        array = self.array(path)
        return self._checked(f"{path}/{array.key(number)}", array.checksums[number], array.chunk_bytes)

    def _fill(self, file: str, told: str, place: memoryview) -> None:
        size = self.store.get_into(file, place)
        self._check(file, told, size, len(place), place)

    def _checked(self, file: str, told: str, size: int) -> bytes:
        data = self.store.get(file)
        self._check(file, told, None if data is None else len(data), size, data or b"")
        return data or b""

    def _check(self, file: str, told: str, got: int | None, size: int, data: bytes | memoryview) -> None:
        if got is None:
            raise CheckpointError(f"{self.url}/{file} is missing", file)
        if got != size:
            raise CheckpointError(f"{self.url}/{file} is damaged: {got} bytes, expected {size}", file)
        found = checksum(data)
        if found != told:
            raise CheckpointError(f"{self.url}/{file} is damaged: its checksum is {found}, expected {told}", file)

    def check_file(self, file: str, told: str, size: int) -> None:
        """Read a file, and compare it with its size and checksum. Raises CheckpointError, which names it."""
        self._checked(file, told, size)

    def verify(self, on_file: Callable[[int], None] = lambda nbytes: None) -> Iterator[str]:
        """Check every file of the checkpoint; gives a line for each that is damaged, missing, or does not belong."""
        there = self.store.sizes()
        expected = {NAME}
        for file, told, size in self.manifest.files():
            expected.add(file)
            try:
                self.check_file(file, told, size)
            except CheckpointError as error:
                yield str(error)
            on_file(size)
        for file in sorted(set(there) - expected):
            if not file.startswith("parts/"):
                yield f"{self.url}/{file} does not belong to the checkpoint"


def load(store: Store) -> Checkpoint | None:
    """The checkpoint in exactly this folder; None if there is none that is committed."""
    data = store.get(NAME)
    return None if data is None else Checkpoint(store, Manifest.from_bytes(data, store.url))


def committed(store: Store) -> list[str]:
    """The committed checkpoints of a job's folder, newest first."""
    found = sorted(((parsed, name) for name in store.folders() if (parsed := parse_folder(name))), reverse=True)
    return [name for _, name in found if store.inside(name).get(NAME, 0, 1) is not None]


def open_checkpoint(url: str, options: Mapping[str, Any] | None = None) -> Checkpoint:
    """The checkpoint at `url`, or the newest one in that folder. Raises CheckpointError if there is none."""
    store = open_store(url, options)
    found = load(store)
    if found is not None:
        return found
    names = committed(store)
    if names:
        newest = load(store.inside(names[0]))
        if newest is not None:
            return newest
    unfinished = [name for name in store.folders() if parse_folder(name)]
    why = f"{unfinished[-1]} was never finished" if unfinished else f"there is no {NAME}"
    raise CheckpointError(f"{url}: not an everstep checkpoint: {why}")
