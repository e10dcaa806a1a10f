"""Reed-Solomon erasure code over GF(2^8), computed by Intel's ISA-L in the caller's own buffers.

The library is the one that the pyeclib wheel ships; pyeclib's own calls copy everything several times, so they are not
used. The parity matrix is a Cauchy matrix (J. Bloemer et al., "An XOR-Based Erasure-Resilient Coding Scheme", 1995:
every square submatrix can be inverted), scaled so that its first row and its first column are ones. So one parity
row is plain XOR, and every parity row of a single member is a copy of it.

All calls release the interpreter's lock. Codes hold nothing that changes: they may be used by many threads at once, as
long as no two of them write to the same buffer.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from typing_extensions import Buffer

if TYPE_CHECKING:
    import numpy as np

MAX_BLOCKS = 255  # members and parity rows of a code together
_MAX_CALL_BYTES = 1 << 30  # the library counts in C ints
_SYSTEM_LIBRARY = "libisal.so.2"


class ErasureLibraryMissing(ImportError):
    """ISA-L was not found. The message says where it was looked for and what to install."""


class Code:
    """The code of `data` members and `parity` rows: any `data` of the blocks give all the others.

    Blocks are numbered: members 0 to data - 1, then the parity rows. The coefficients of a row depend on `data` and
    the row's number only, so rows can be added or dropped without computing the others again. Buffers are any
    contiguous ones of bytes. A member may be shorter than the parity, which is as long as the longest member: it counts
    as padded with zeros, which are never stored. Making a Code costs next to nothing, tables are kept per shape.

    Raises ValueError for impossible shapes and ErasureLibraryMissing without the library.
    """

    def __init__(self, data: int, parity: int) -> None:
        if data < 1 or parity < 0 or data + parity > MAX_BLOCKS:
            raise ValueError(
                f"a code of {data} members and {parity} parity rows: it takes at least one member, and at most "
                f"{MAX_BLOCKS} blocks together"
            )
        self.data = data
        self.parity = parity
        self._rows = tuple(_row(data, row) for row in range(parity))

    def encode(self, members: Sequence[Buffer], rows: Sequence[Buffer]) -> None:
        """Write all parity rows. Beyond the longest member, zeros are written.

        `members`: all of them, in order; `rows`: writable buffers, at least as long as the longest member. Raises
        ValueError for a wrong number of buffers or too short ones.
        """
        sources = [_span(member) for member in members]
        targets = [_span(row, to_write=True) for row in rows]
        if len(sources) != self.data or len(targets) != self.parity:
            raise ValueError(
                f"{len(sources)} members and {len(targets)} rows for a code of {self.data} and {self.parity}"
            )
        for number, target in enumerate(targets):
            _check_room(number, target, max(source.size for source in sources))
        _combine(self._rows, sources, targets)

    def update(self, member: int, chunk: Buffer, rows: Sequence[Buffer], row_numbers: Sequence[int]) -> None:
        """Add a piece of one member to parity: parity ^= coefficient * chunk, for the rows given.

        `chunk` is a piece of the member; each of `rows` is the same piece of the parity row whose number stands in
        `row_numbers`, at the same offset, and at least as long; bytes after the chunk's length are left alone. Rows
        that start as zeros and get every byte of every member once, in any order and pieces, are what `encode` writes.
        A piece added twice is taken out again. Raises ValueError and IndexError for what does not fit the code.
        """
        if not 0 <= member < self.data or not all(0 <= number < self.parity for number in row_numbers):
            raise IndexError(
                f"member {member}, rows {list(row_numbers)} of a code of {self.data} members and {self.parity} rows"
            )
        source = _span(chunk)
        targets = [_span(row, to_write=True) for row in rows]
        for number, target in zip(row_numbers, targets, strict=True):
            _check_room(number, target, source.size)
        column = bytes(self._rows[number][member] for number in row_numbers)
        tables = _tables(column, 1)
        for start, length in _calls(0, source.size if targets else 0):
            _library().ec_encode_data_update(
                length, 1, len(targets), 0, tables, source.address + start, _addresses(targets, start)
            )

    def decode(self, available: Mapping[int, Buffer], lost: Sequence[int], out: Sequence[Buffer]) -> None:
        """Write the blocks `lost` into `out`, from at least `data` others.

        `available`: block number -> its bytes, at their full length; more than are needed may be given. `out` are
        writable, as long as the blocks they are to hold. Nothing is allocated. Raises ValueError if fewer than `data`
        blocks are available, or buffers do not fit, and IndexError for a block that the code does not have.
        """
        blocks = self.data + self.parity
        if not all(0 <= number < blocks for number in (*available, *lost)):
            raise IndexError(f"blocks {sorted({*available, *lost})} of a code that has {blocks}")
        chosen = tuple(sorted(available)[: self.data])  # members come first: least to compute
        if len(chosen) < self.data:
            raise ValueError(
                f"blocks {sorted(available)} are available, but it takes {self.data} of {blocks} to get {list(lost)}"
            )
        targets = [_span(buffer, to_write=True) for buffer in out]
        if len(targets) != len(lost):
            raise ValueError(f"{len(targets)} buffers for the {len(lost)} blocks {list(lost)}")
        matrix = _decoding(self.data, chosen, tuple(lost))
        _combine(matrix, [_span(available[number]) for number in chosen], targets)


# ---------------------------------------------------------------- buffers


class _Span(NamedTuple):
    """A buffer as the library sees it. `owner` keeps its memory where it is."""

    address: int
    size: int
    owner: np.ndarray[tuple[int], np.dtype[np.uint8]]


def _span(buffer: Buffer, to_write: bool = False) -> _Span:
    import numpy as np

    array = np.frombuffer(memoryview(buffer), dtype=np.uint8)
    if to_write and not array.flags.writeable:
        raise ValueError(f"a buffer of {array.size} bytes is to be written but is read-only")
    return _Span(array.ctypes.data, array.size, array)


def _check_room(row: int, target: _Span, size: int) -> None:
    if target.size < size:
        raise ValueError(f"parity row {row} has room for {target.size} bytes, but {size} bytes are coded")


def _addresses(spans: Sequence[_Span], start: int) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(spans))(*(span.address + start for span in spans))


def _calls(start: int, stop: int) -> Iterable[tuple[int, int]]:
    """Cut a range into (start, length) that the library can count."""
    return ((at, min(_MAX_CALL_BYTES, stop - at)) for at in range(start, stop, _MAX_CALL_BYTES))


def _combine(matrix: Sequence[bytes], sources: Sequence[_Span], targets: Sequence[_Span]) -> None:
    """targets[i] = sum over j of matrix[i][j] * sources[j], as far as each target goes.

    A source is left out beyond its end, so no caller has to pad it: between two ends the same blocks contribute.
    """
    start = 0
    for stop in sorted({span.size for span in (*sources, *targets)}):
        inputs = [j for j, source in enumerate(sources) if source.size > start]
        outputs = [i for i, target in enumerate(targets) if target.size > start]
        for at, length in _calls(start, stop) if outputs else ():
            if inputs:
                part = b"".join(bytes(matrix[i][j] for j in inputs) for i in outputs)
                tables = _tables(part, len(inputs))
                ins = _addresses([sources[j] for j in inputs], at)
                outs = _addresses([targets[i] for i in outputs], at)
                _library().ec_encode_data(length, len(inputs), len(outputs), tables, ins, outs)
            else:
                for i in outputs:
                    ctypes.memset(targets[i].address + at, 0, length)
        start = stop


# ---------------------------------------------------------------- matrices


@lru_cache(maxsize=1024)
def _row(data: int, row: int) -> bytes:
    """The coefficients of one parity row, by member: row 0 and column 0 are ones."""
    library = _library()
    cauchy = _cauchy(data, row)
    first = _cauchy(data, 0)
    scaled = [library.gf_mul(a, library.gf_inv(b)) for a, b in zip(cauchy, first, strict=True)]
    unit = library.gf_inv(scaled[0])
    return bytes(library.gf_mul(coefficient, unit) for coefficient in scaled)


def _cauchy(data: int, row: int) -> bytes:
    matrix = ctypes.create_string_buffer((data + row + 1) * data)
    _library().gf_gen_cauchy1_matrix(matrix, data + row + 1, data)
    return matrix.raw[-data:]


@lru_cache(maxsize=1024)
def _decoding(data: int, available: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[bytes, ...]:
    """For every wanted block, its coefficients by available block."""
    library = _library()
    matrix = ctypes.create_string_buffer(b"".join(_generator(data, number) for number in available), data * data)
    inverse = ctypes.create_string_buffer(data * data)
    if library.gf_invert_matrix(matrix, inverse, data):
        raise AssertionError(f"blocks {available} of {data} members do not determine the others: a bug of ours")
    members = [inverse.raw[data * i : data * (i + 1)] for i in range(data)]
    return tuple(_product(_generator(data, number), members) for number in wanted)


def _generator(data: int, number: int) -> bytes:
    """The coefficients of a block by member."""
    return bytes(number == i for i in range(data)) if number < data else _row(data, number - data)


def _product(row: bytes, matrix: Sequence[bytes]) -> bytes:
    multiply = _library().gf_mul
    result = [0] * len(row)
    for coefficient, other in zip(row, matrix, strict=True):
        for j, value in enumerate(other) if coefficient else ():
            result[j] ^= multiply(coefficient, value)
    return bytes(result)


@lru_cache(maxsize=4096)
def _tables(coefficients: bytes, columns: int) -> ctypes.Array[ctypes.c_char]:
    """What the library multiplies with; `coefficients` are row by row. Read-only once made."""
    tables = ctypes.create_string_buffer(32 * len(coefficients))
    _library().ec_init_tables(columns, len(coefficients) // columns, coefficients, tables)
    return tables


# ---------------------------------------------------------------- the library


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    tried = [*_shipped(), _SYSTEM_LIBRARY]
    problems = []
    for name in tried:
        try:
            return _declared(ctypes.CDLL(str(name)))
        except (OSError, AttributeError) as error:
            problems.append(str(error))
    raise ErasureLibraryMissing(
        f"erasure coding of snapshots needs the ISA-L library, tried {', '.join(map(str, tried))} "
        f"({'; '.join(problems)}). Install it with: pip install 'pyeclib>=1.6.4'"
    )


def _shipped() -> Iterable[Path]:
    """The library beside an installed pyeclib, which is not imported: its own module loads much else."""
    from importlib import metadata  # here, as numpy in `_span`: a keeper that computes no code starts without them

    places: set[Path] = set()
    spec = importlib.util.find_spec("pyeclib")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        places.update(Path(location).parent.glob("pyeclib.libs/libisal*.so*"))
    try:
        files = metadata.files("pyeclib") or []
    except metadata.PackageNotFoundError:
        files = []
    places.update(Path(str(file.locate())) for file in files if file.name.startswith("libisal"))
    return sorted(places)


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    number, pointer = ctypes.c_int, ctypes.c_void_p
    library.gf_gen_cauchy1_matrix.argtypes = [ctypes.c_char_p, number, number]
    library.gf_gen_cauchy1_matrix.restype = None
    library.gf_invert_matrix.argtypes = [ctypes.c_char_p, ctypes.c_char_p, number]
    library.gf_invert_matrix.restype = number
    library.gf_mul.argtypes = [ctypes.c_ubyte, ctypes.c_ubyte]
    library.gf_mul.restype = ctypes.c_ubyte
    library.gf_inv.argtypes = [ctypes.c_ubyte]
    library.gf_inv.restype = ctypes.c_ubyte
    library.ec_init_tables.argtypes = [number, number, ctypes.c_char_p, ctypes.c_char_p]
    library.ec_init_tables.restype = None
    library.ec_encode_data.argtypes = [number, number, number, ctypes.c_char_p, pointer, pointer]
    library.ec_encode_data.restype = None
    library.ec_encode_data_update.argtypes = [number, number, number, number, ctypes.c_char_p, pointer, pointer]
    library.ec_encode_data_update.restype = None
    return library
