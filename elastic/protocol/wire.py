"""Typed dataclasses as bytes and back, guided by the declared types of their fields: the messages between ranks.

Compact, and the same on every machine. Both sides know the type, so only the values are sent:

    bool            one byte
    int             the number of its bytes, then these, little-endian, two's complement; any size
    float           eight bytes, IEEE 754, little-endian
    str, bytes      the length, then the text (UTF-8)
    T | None        one byte, then the value if there is one
    tuple[T, ...]   the number of items, then each
    tuple[A, B]     each item
    Mapping[K, V]   the number of entries, then each key and value, in the order of the keys
    dataclass       each field

A length is a varint: seven bits a byte, the lowest first.
"""

from __future__ import annotations

import dataclasses
import functools
import struct
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
Write = Callable[[Any, bytearray], None]
Read = Callable[["Reader"], Any]

_DOUBLE = struct.Struct("<d")


class Malformed(ValueError):
    """Bytes that `encode` would not have produced for a value of that type."""


def encode(value: Any) -> bytes:
    """The bytes of a dataclass's instance."""
    out = bytearray()
    kind: Any = type(value)
    _codec(kind)[0](value, out)
    return bytes(out)


def decode(kind: type[T], data: bytes | memoryview) -> T:
    """The instance of `kind` that `encode` turned into `data`. Raises Malformed."""
    reader, untyped = Reader(data), typing.cast(Any, kind)
    try:
        value: T = _codec(untyped)[1](reader)
    except (UnicodeDecodeError, struct.error) as error:
        raise Malformed(f"{kind.__name__}: {error}") from None
    if reader.left:
        raise Malformed(f"{kind.__name__}: {reader.left} bytes too many")
    return value


class Reader:
    """Reads values from the front of some bytes. Raises Malformed at their end."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = bytes(data)
        self._at = 0

    @property
    def left(self) -> int:
        """How many bytes are left."""
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        taken = self._data[self._at : self._at + count]
        if len(taken) < count:
            raise Malformed(f"{count} bytes are expected where {self.left} are left")
        self._at += count
        return taken

    def length(self) -> int:
        """A varint."""
        value = shift = 0
        while True:
            if self._at >= len(self._data):
                raise Malformed("a length is expected where no bytes are left")
            byte = self._data[self._at]
            self._at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7


def _put_length(value: int, out: bytearray) -> None:
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def _write_int(value: int, out: bytearray) -> None:
    size = (value.bit_length() + 8) // 8 if value else 0
    _put_length(size, out)
    out += value.to_bytes(size, "little", signed=True)


def _read_int(reader: Reader) -> int:
    return int.from_bytes(reader.take(reader.length()), "little", signed=True)


def _write_bytes(value: bytes, out: bytearray) -> None:
    _put_length(len(value), out)
    out += value


def _read_bool(reader: Reader) -> bool:
    (byte,) = reader.take(1)
    if byte > 1:
        raise Malformed(f"{byte} is no bool")
    return bool(byte)


_PLAIN: dict[Any, tuple[Write, Read]] = {
    bool: (lambda value, out: out.append(value), _read_bool),
    int: (_write_int, _read_int),
    float: (lambda value, out: out.extend(_DOUBLE.pack(value)), lambda reader: _DOUBLE.unpack(reader.take(8))[0]),
    bytes: (_write_bytes, lambda reader: reader.take(reader.length())),
    str: (
        lambda value, out: _write_bytes(value.encode(), out),
        lambda reader: reader.take(reader.length()).decode(),
    ),
}


@functools.cache
def _codec(kind: Any) -> tuple[Write, Read]:
    if kind in _PLAIN:
        return _PLAIN[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (inner,) = [argument for argument in arguments if argument is not type(None)]
        return _optional(*_codec(inner))
    if origin is tuple and arguments[1:] == (...,):
        return _sequence(*_codec(arguments[0]))
    if origin is tuple:
        return _record([_codec(argument) for argument in arguments], tuple, iter)
    if origin is not None and issubclass(origin, Mapping):
        return _mapping(_codec(arguments[0]), _codec(arguments[1]))
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        make = typing.cast(Callable[..., Any], kind)
        names = [field.name for field in dataclasses.fields(kind)]

        def values(value: Any) -> Iterator[Any]:
            return (getattr(value, name) for name in names)

        return _record(
            [_codec(hints[name]) for name in names], lambda items: make(**dict(zip(names, items, strict=True))), values
        )
    raise TypeError(f"values of type {kind} do not travel")


def _optional(write: Write, read: Read) -> tuple[Write, Read]:
    def write_optional(value: Any, out: bytearray) -> None:
        out.append(value is not None)
        if value is not None:
            write(value, out)

    return write_optional, lambda reader: read(reader) if _read_bool(reader) else None


def _sequence(write: Write, read: Read) -> tuple[Write, Read]:
    def write_all(value: Any, out: bytearray) -> None:
        _put_length(len(value), out)
        for item in value:
            write(item, out)

    return write_all, lambda reader: tuple([read(reader) for _ in range(reader.length())])


def _mapping(key: tuple[Write, Read], item: tuple[Write, Read]) -> tuple[Write, Read]:
    def write_all(value: Mapping[Any, Any], out: bytearray) -> None:
        _put_length(len(value), out)
        for name in sorted(value):
            key[0](name, out)
            item[0](value[name], out)

    return write_all, lambda reader: {key[1](reader): item[1](reader) for _ in range(reader.length())}


def _record(
    codecs: list[tuple[Write, Read]], make: Callable[[list[Any]], Any], values: Callable[[Any], Iterator[Any]]
) -> tuple[Write, Read]:
    writes, reads = zip(*codecs, strict=True)

    def write_all(value: Any, out: bytearray) -> None:
        for write, item in zip(writes, values(value), strict=True):
            write(item, out)

    return write_all, lambda reader: make([read(reader) for read in reads])
