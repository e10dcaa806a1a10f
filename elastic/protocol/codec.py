"""The coordinator's state as JSON and back, guided by the declared types of its dataclasses: the form in a store."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

from .state import Config, State

TRANSIENT = ("config", "heard", "ticked_s")  # of this coordinator alone: its settings and its clock's times


class Unreadable(Exception):
    """Stored text that this version would not have written."""


def encode(value: Any) -> Any:
    """The JSON value that represents a value."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return [[encode(key), encode(item)] for key, item in value.items()]
    if isinstance(value, frozenset):
        return sorted(encode(item) for item in value)
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    return value


_OBJECT = Mapping[str, Any]  # JSON as it is: `encode` would make lists of the mappings in it
_NONE = type(None)
_AS_IT_IS: dict[Any, tuple[type[Any], ...]] = {
    **{kind: (kind,) for kind in (bool, int, float, str)},
    **{kind | None: (kind, _NONE) for kind in (bool, int, float, str)},
    _OBJECT: (dict,),
    _OBJECT | None: (dict, _NONE),
    Any: (bool, int, float, str, list, dict, _NONE),
}
"""For types that JSON has: the classes of values that stand for themselves. Nearly all fields are such."""


def encode_record(value: Any, leave: Collection[str] = ()) -> dict[str, Any]:
    """A dataclass's instance as a JSON object, by the types that its fields declare; without those to `leave`."""
    kind: Any = type(value)
    made: dict[str, Any] = {}
    for name, (hint, classes) in _declared(kind).items():
        if name not in leave:
            item = getattr(value, name)
            made[name] = item if type(item) in classes else dict(item) if hint == _OBJECT else encode(item)
    return made


def decode_record(kind: Any, raw: Mapping[str, Any], *, defaults: bool = False, **given: Any) -> Any:
    """The instance of `kind` that `encode_record` made `raw` of; `given`: the fields that it left.

    Raises Unreadable where fields are missing (with `defaults`: those without one) or unknown.
    """
    declared = _declared(kind)
    names = declared.keys() - given.keys()
    if not (_required(kind) - given.keys() if defaults else names) <= raw.keys() <= names:
        raise Unreadable(f"{kind.__name__} has the fields {sorted(names)}, and these came: {sorted(raw)}")
    for name, item in raw.items():
        hint, classes = declared[name]
        given[name] = item if type(item) in classes else decode(hint, item)
    return kind(**given)


@functools.cache
def _declared(kind: Any) -> dict[str, tuple[Any, tuple[type[Any], ...]]]:
    """A dataclass's fields: their types, and the classes of values that stand for themselves."""
    return {name: (hint, _AS_IT_IS.get(hint, ())) for name, hint in _hints(kind).items()}


@functools.cache
def _required(kind: Any) -> frozenset[str]:
    none = dataclasses.MISSING
    return frozenset(f.name for f in dataclasses.fields(kind) if f.default is none and f.default_factory is none)


def decode(kind: Any, raw: Any) -> Any:
    """The value of type `kind` that `encode` turned into `raw`. Raises Unreadable."""
    try:
        return _decode(kind, raw)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise Unreadable(f"{kind} cannot be read from {str(raw)[:80]!r}: {error}") from None


def _decode(kind: Any, raw: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if raw is None:
            return None
        (kind,) = [argument for argument in arguments if argument is not type(None)]
        return _decode(kind, raw)
    if origin is not None and issubclass(origin, Mapping):
        return _decode_mapping(arguments, raw)
    if origin is frozenset:
        return frozenset(_decode(arguments[0], item) for item in raw)
    if origin is tuple:
        kinds = arguments[:1] * len(raw) if arguments[1:] == (...,) else arguments
        return tuple(_decode(one, item) for one, item in zip(kinds, raw, strict=True))
    if not isinstance(kind, type):
        return raw  # Any
    if hasattr(kind, "from_json"):
        return kind.from_json(raw)
    if issubclass(kind, enum.Enum):
        return kind(raw)
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        hints = _hints(kind)
        return kind(*(_decode(hints[name], item) for name, item in zip(kind._fields, raw, strict=True)))
    if dataclasses.is_dataclass(kind):
        hints = _hints(kind)
        return kind(**{name: _decode(hints[name], item) for name, item in raw.items()})
    return kind(raw) if kind in (int, float, str, bool) else raw


def _decode_mapping(arguments: tuple[Any, ...], raw: Any) -> dict[Any, Any]:
    if isinstance(raw, Mapping):  # inside a value of type Any, which is JSON already
        return dict(raw)
    key, item = arguments
    return {_decode(key, one): _decode(item, other) for one, other in raw}


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


@functools.cache
def schema() -> str:
    """A digest of the schema of `State`: rows with another digest are not read.

    It changes with every field, type and enumerated value of any class in it.
    """
    seen: dict[str, Any] = {}
    _describe(State, seen)
    text = json.dumps(seen, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _describe(kind: Any, seen: dict[str, Any]) -> None:
    """Note the classes that a type names, each with its contents."""
    for argument in typing.get_args(kind):
        _describe(argument, seen)
    if not isinstance(kind, type) or kind.__qualname__ in seen:
        return
    if issubclass(kind, enum.Enum):
        seen[kind.__qualname__] = sorted(str(member.value) for member in kind)
        return
    record = hasattr(kind, "__dataclass_fields__") or hasattr(kind, "_fields")
    hints: dict[str, Any] = _hints(kind) if record else {}  # type: ignore[arg-type]
    hints = {name: hint for name, hint in hints.items() if kind is not State or name not in TRANSIENT}
    if hints:
        seen[kind.__qualname__] = [[name, str(hint)] for name, hint in hints.items()]
    for hint in hints.values():
        _describe(hint, seen)


def changed_rows(before: State | None, after: State) -> dict[str, str | None]:
    """The rows that differ: name -> text, or None for a row that is deleted.

    Values are compared by identity first, so the cost depends on what changed and not on the size of the state.
    """
    rows: dict[str, str | None] = {}
    for field in dataclasses.fields(State):
        old, new = getattr(before, field.name, None), getattr(after, field.name)
        if field.name in TRANSIENT or (before is not None and old is new):
            continue
        if isinstance(new, Mapping):
            rows.update(_changed_entries(field.name, None if before is None else old, new))
        elif before is None or old != new:
            rows[field.name] = json.dumps(encode(new))
    return rows


def _changed_entries(name: str, before: Mapping[Any, Any] | None, after: Mapping[Any, Any]) -> dict[str, str | None]:
    rows: dict[str, str | None] = {}
    for key, value in after.items():
        if before is None or key not in before or (before[key] is not value and before[key] != value):
            rows[f"{name}/{key}"] = json.dumps(encode(value))
    for key in before or ():
        if key not in after:
            rows[f"{name}/{key}"] = None
    if before is None or list(before) != list(after):
        rows[name] = json.dumps([encode(key) for key in after])
    return rows


def state_of(config: Config, rows: Mapping[str, str]) -> State:
    """The state that these rows describe. Raises Unreadable where one is missing or invalid."""
    hints = _hints(State)
    found: dict[str, Any] = {"config": config}
    for field in dataclasses.fields(State):
        if field.name in TRANSIENT:
            continue
        if field.name not in rows:
            raise Unreadable(f"there is no {field.name!r}")
        kind, text = hints[field.name], rows[field.name]
        if issubclass(typing.get_origin(kind) or object, Mapping):
            found[field.name] = _entries(field.name, typing.get_args(kind), text, rows)
        else:
            found[field.name] = decode(kind, _parsed(field.name, text))
    return State(**found)


def _entries(name: str, arguments: tuple[Any, ...], text: str, rows: Mapping[str, str]) -> dict[Any, Any]:
    keys = [decode(arguments[0], key) for key in _parsed(name, text)]
    missing = [key for key in keys if f"{name}/{key}" not in rows]
    if missing:
        raise Unreadable(f"there is no {name!r} of {missing[0]!r}")
    return {key: decode(arguments[1], _parsed(f"{name}/{key}", rows[f"{name}/{key}"])) for key in keys}


def _parsed(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise Unreadable(f"{name!r} is not JSON: {text[:80]!r}") from None
