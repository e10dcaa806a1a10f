"""The manifest: a checkpoint's content, with a checksum of every chunk. A folder without one is no checkpoint.

Its schema is in `docs/formats.md`. It ends with a checksum of itself, so that an edited manifest, or that of another
checkpoint, is detected.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any
from urllib.parse import quote, unquote

import xxhash

from .dtypes import NAMES, numpy_dtype, stored_name

FORMAT = "everstep-checkpoint"
VERSION = 1
NAME = "manifest.json"
_ZARR = "zarr.json"
ROOMS = ("params", "optimizer", "buffers", "frozen")
OTHER = "other"  # a room that is there only if something is in it: tensors that are neither model nor optimizer
_ZARR_METADATA = 2  # since 2, arrays name their dimensions, and the root group has all metadata consolidated
_LONGEST_NODE_BYTES = 200  # file systems take 255; object stores and tools add to a name
_NODE_STEM = 140  # characters of a long name that are kept, for readers
_CUT = "%~"


class CheckpointError(ValueError):
    """What is wrong with a checkpoint: what, where, expected and got. `damaged` names the damaged file, if one is."""

    def __init__(self, message: str, damaged: str = "") -> None:
        super().__init__(message)
        self.damaged = damaged


def checksum(data: bytes | bytearray | memoryview) -> str:
    """The xxh3_64 of `data`, as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


def node(name: str) -> str:
    """A tensor's name as the name of a zarr node: itself, but for `/`, `%`, and what zarr has reserved.

    A name that no file system would take is cut, and ends with `%~` and its hash: no quoted name has a `%~`.
    """
    quoted = _quoted(name)
    if len(quoted) <= _LONGEST_NODE_BYTES:
        return quoted
    return f"{quoted[:_NODE_STEM]}{_CUT}{xxhash.xxh3_128_hexdigest(name.encode(errors='surrogatepass'))}"


def _quoted(name: str) -> str:
    quoted = quote(name, safe="".join(chr(c) for c in range(33, 127) if chr(c) not in "/%"))
    if not name.strip(".") or name == _ZARR:  # nothing but dots is no name of a folder of ours
        return quoted.replace(".", "%2E")
    return quoted.replace("_", "%5F", 1) if name.startswith("__") else quoted


def path_of(room: str, name: str) -> str:
    """The path of a tensor's array: `params/<name>`, `optimizer/<state>/<name>`, ...

    Names of tensors and states come from foreign checkpoints and may be any text; a path never leaves its room.
    """
    first, separator, state = room.partition("/")
    return f"{first}/{node(state)}/{node(name)}" if separator else f"{first}/{node(name)}"


def room_and_name(path: str, name: str = "") -> tuple[str, str]:
    """The inverse of `path_of`; `name`: the array's own, needed if its path was shortened."""
    room, _, last = path.rpartition("/")
    return unquote(room), name or unquote(last)


@dataclass(frozen=True)
class Array:
    """One array: cut into chunks along its first dimension only; `chunk` has the array's shape but for that.

    `checksums`: one for each chunk, in order; the xxh3_64 of its file, which is always a whole chunk, zero-padded.
    `name`: of the tensor, where its path has no room for all of it.
    """

    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]
    checksums: tuple[str, ...] = ()
    name: str = ""

    def named(self, name: str) -> Array:
        """This array, as that of the tensor `name`."""
        return replace(self, name=name) if _CUT in node(name) else self

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def chunk_rows(self) -> int:
        return self.chunk[0] if self.chunk else 1

    @property
    def chunks(self) -> int:
        return 0 if 0 in self.shape else math.ceil(self.rows / self.chunk_rows)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * numpy_dtype(self.dtype).itemsize

    @property
    def chunk_bytes(self) -> int:
        """The size of every chunk's file."""
        return self.chunk_rows * self.row_bytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize

    def key(self, chunk: int) -> str:
        """The path of a chunk's file, within the array's folder."""
        return "/".join(["c", *[str(chunk), *["0"] * (len(self.shape) - 1)][: len(self.shape)]])

    def zarr_json(self, version: int = _ZARR_METADATA) -> bytes:
        """The array's metadata for zarr, as its file has it."""
        return json.dumps(self.zarr_metadata(version), indent=2).encode()

    def zarr_metadata(self, version: int = _ZARR_METADATA) -> dict[str, Any]:
        """The array's metadata for zarr (https://zarr-specs.readthedocs.io, version 3)."""
        stored = stored_name(self.dtype)
        zero: object = False if stored == "bool" else [0.0, 0.0] if stored.startswith("complex") else 0
        if stored.startswith("float"):
            zero = 0.0
        attributes = {} if stored == self.dtype else {"dtype": self.dtype}
        metadata = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": stored,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(1, n) for n in self.chunk]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": zero,
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "attributes": {**attributes, "name": self.name} if self.name else attributes,
            "storage_transformers": [],
        }
        return metadata if version < _ZARR_METADATA else metadata | {"dimension_names": self._dimensions()}

    def _dimensions(self) -> list[str]:
        """Names by size, so that those of equal names are equally long in all arrays, as xarray wants them."""
        return [
            f"size_{size}" + (f"_{again + 1}" if (again := self.shape[:axis].count(size)) else "")
            for axis, size in enumerate(self.shape)
        ]

    def to_json(self) -> dict[str, Any]:
        raw = asdict(self)
        if not self.name:
            del raw["name"]
        return raw

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Array:
        return cls(tuple(raw["shape"]), raw["dtype"], tuple(raw["chunk"]), tuple(raw["checksums"]), raw.get("name", ""))


_GROUP: dict[str, Any] = {"zarr_format": 3, "node_type": "group", "attributes": {}}


def group_json() -> bytes:
    """The metadata of a zarr group."""
    return json.dumps(_GROUP, indent=2).encode()


def chunk_shape(shape: tuple[int, ...], dtype: str, limit_bytes: int) -> tuple[int, ...]:
    """A chunk of at most `limit_bytes`, or of one row, such that all chunks of the array are nearly equal."""
    if not shape or 0 in shape:
        return tuple(max(1, n) for n in shape)
    row = math.prod(shape[1:]) * numpy_dtype(dtype).itemsize
    pieces = math.ceil(shape[0] / max(1, limit_bytes // row))
    return (math.ceil(shape[0] / pieces), *shape[1:])


@dataclass
class Manifest:
    """Everything about a checkpoint that is not a tensor.

    `step`: number of optimizer steps done. `arrays`: by path. `scalars`: state -> parameter -> {dtype, value}, of
    optimizer states that are one number. `tied`: alias -> owner. `layers`: parameter -> pipeline layers. `dtypes`: the
    module's compute type, where it differs from the stored one. `optimizer`: {"name", "groups"}. `data`: {"samples",
    "global_batch_size", "micro_batch_size", "seed", "position"}. `registered`: states of objects the user registered.
    `run`: the lineage. `agreement`: what the ranks agreed on in the last step; resuming starts from it. `extra`:
    further content of a foreign format. `saved_at`: seconds since 1970. `zarr`: the version of Everstep that wrote the
    metadata for zarr.
    """

    step: int
    arrays: dict[str, Array] = field(default_factory=dict)
    scalars: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    layers: dict[str, list[int]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] | None = None
    data: dict[str, Any] = field(default_factory=dict)
    registered: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    agreement: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    saved_at: float = 0.0
    zarr: int = _ZARR_METADATA

    def to_bytes(self) -> bytes:
        """The file's bytes: one JSON object, whose last member is the checksum of the rest."""
        raw: dict[str, Any] = {"format": FORMAT, "version": VERSION}
        for item in fields(self):
            value = getattr(self, item.name)
            raw[item.name] = {p: a.to_json() for p, a in value.items()} if item.name == "arrays" else value
        return json.dumps({**raw, "checksum": checksum(_canonical(raw))}, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """Parse the manifest of the checkpoint at `where`. Raises CheckpointError for anything that is not whole."""
        try:
            raw = json.loads(data)
        except ValueError as error:
            raise CheckpointError(f"{where}/{NAME} is damaged: {error}", NAME) from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise CheckpointError(f"{where}/{NAME} is not the manifest of an everstep checkpoint", NAME)
        if raw.get("version") != VERSION:
            raise CheckpointError(
                f"{where}/{NAME} is written in version {raw.get('version')!r} of the format; this everstep reads "
                f"version {VERSION}: use a newer everstep"
            )
        told = raw.pop("checksum", None)
        found = checksum(_canonical(raw))
        if told != found:
            raise CheckpointError(f"{where}/{NAME} was changed: its checksum is {found}, expected {told}", NAME)
        known = {item.name for item in fields(cls)}
        values = {"zarr": 1} | {name: value for name, value in raw.items() if name in known}
        try:
            values["arrays"] = {path: Array.from_json(array) for path, array in raw["arrays"].items()}
            manifest = cls(**values)
            problem = next(manifest.problems(), None)
        except (LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{where}/{NAME}: is not laid out as a manifest: {error!r}", NAME) from None
        if problem is not None:
            raise CheckpointError(f"{where}/{NAME}: {problem}", NAME)
        return manifest

    def problems(self) -> Iterator[str]:
        """What does not fit together."""
        for path, array in self.arrays.items():
            if path.partition("/")[0] not in (*ROOMS, OTHER):
                yield f"array {path}: expected it in one of {', '.join((*ROOMS, OTHER))}"
            elif path != path_of(*room_and_name(path, array.name)):
                yield f"array {path}: is not the path of any tensor"
            if array.dtype not in NAMES:
                yield f"array {path}: element type {array.dtype!r} is not known"
            elif len(array.chunk) != len(array.shape) or (array.shape[1:] != array.chunk[1:] and 0 not in array.shape):
                yield f"array {path}: chunks of shape {array.chunk} do not cut {array.shape} by rows"
            elif len(array.checksums) != array.chunks:
                yield f"array {path}: {array.chunks} chunks, but {len(array.checksums)} checksums"

    @property
    def groups(self) -> list[str]:
        """The folders that are zarr groups; "" is the checkpoint itself."""
        return sorted({"", *ROOMS} | {path.rpartition("/")[0] for path in self.arrays})

    def root_json(self) -> bytes:
        """The metadata of the group that is the checkpoint: with that of all in it, so that zarr lists no folder."""
        if self.zarr < _ZARR_METADATA:
            return group_json()
        inside = {folder: _GROUP for folder in self.groups if folder}
        inside |= {path: array.zarr_metadata(self.zarr) for path, array in self.arrays.items()}
        consolidated = {"kind": "inline", "must_understand": False, "metadata": dict(sorted(inside.items()))}
        return json.dumps({**_GROUP, "consolidated_metadata": consolidated}, separators=(",", ":")).encode()

    def group_files(self) -> Iterator[tuple[str, bytes]]:
        """(path, contents) of the metadata of every group."""
        for folder in self.groups:
            yield f"{folder}/zarr.json".lstrip("/"), group_json() if folder else self.root_json()

    def files(self) -> Iterator[tuple[str, str, int]]:
        """(path, checksum, bytes) of every file that belongs to the checkpoint, the manifest apart."""
        for path, data in self.group_files():
            yield path, checksum(data), len(data)
        for path, array in self.arrays.items():
            data = array.zarr_json(self.zarr)
            yield f"{path}/zarr.json", checksum(data), len(data)
            for number, told in enumerate(array.checksums):
                yield f"{path}/{array.key(number)}", told, array.chunk_bytes

    def names(self, room: str) -> dict[str, Array]:
        """The arrays of a room, by tensor name."""
        inside = ((room_and_name(path, array.name), array) for path, array in self.arrays.items())
        return {name: array for (where, name), array in inside if where == room}

    @property
    def states(self) -> tuple[str, ...]:
        """The names of the optimizer's states that are tensors."""
        rooms = dict.fromkeys(room_and_name(path)[0] for path in self.arrays)
        return tuple(room.partition("/")[2] for room in rooms if room.startswith("optimizer/"))


def _canonical(raw: dict[str, Any]) -> bytes:
    return json.dumps(raw, sort_keys=True, separators=(",", ":")).encode()
