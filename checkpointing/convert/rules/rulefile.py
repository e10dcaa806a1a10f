"""Files of rules, in TOML: read, and every mistake named by file and number of the rule.

    [[shard]]                                  how ranks' pieces make a tensor
    pattern = "layers.{n}.mlp.fc1.weight"      or regex = "..."
    how = "fused"                              replicated, dim, fused, average, vocab, expert, flat
    dim = 0                                    for dim and fused
    parts = 2                                  for fused: or sizes = [64, 32], or widths = [[40, 24], [16, 16]]
                                               vocab: rows, multiple; expert: placement; flat: shape

    [[name]]                                   how two libraries call the same
    a = "model.layers.{n}.mlp.{p}_proj.weight" one name or several; likewise b; without b it is left out
    b = "..."
    how = "qkv"                                same, concat, transpose, qkv; or several, in the order from a to b
    dim = 0                                    for concat; and sizes
    dtype = "float32"                          what parameters are cast to, on either way

Numbers of `qkv` (heads, groups, head_dim) are variables of the model that the caller knows.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everstep.checkpointing.convert.core.content import ConversionError
from everstep.checkpointing.universal.dtypes import NAMES

from .patterns import Pattern, regex, template
from .renaming import (
    Concat,
    Interleaved,
    NameRule,
    RenamingStep,
    Transpose,
    Unfused,
)
from .sharding import (
    Average,
    Expert,
    Flat,
    Fused,
    Replicated,
    Sharding,
    Vocabulary,
    along,
)

BUILT_IN = Path(__file__).parent
_HEADS = ("heads", "groups", "head_dim")


@dataclass(frozen=True)
class ShardRule:
    """How the tensors whose names match are cut."""

    where: str
    patterns: tuple[Pattern, ...]
    sharding: Sharding


@dataclass(frozen=True)
class RuleFile:
    """The rules of one file. `variables`: values of the model that the caller must supply."""

    path: Path
    shards: tuple[ShardRule, ...]
    names: tuple[NameRule, ...]

    @property
    def variables(self) -> tuple[str, ...]:
        return _HEADS if any("qkv" in rule.how for rule in self.names) else ()


def built_in(name: str) -> Path:
    """A rule file of the package, such as "llama". Raises ConversionError if there is none."""
    path = BUILT_IN / f"{name}.toml"
    if not path.exists():
        known = sorted(file.stem for file in BUILT_IN.glob("*.toml"))
        raise ConversionError(f"no rules are named {name!r}{_meant(name, known)}; there are {', '.join(known)}")
    return path


def read_rules(path: Path) -> RuleFile:
    """The rules in a file. Raises ConversionError that names the file, the rule and what is wrong with it."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path}: not TOML: {error}") from error
    _known(str(path), data, ("shard", "name"))
    return RuleFile(
        path,
        tuple(_shard_rule(where, table) for where, table in _tables(path, data, "shard")),
        tuple(_name_rule(where, table) for where, table in _tables(path, data, "name")),
    )


def _tables(path: Path, data: dict[str, Any], kind: str) -> list[tuple[str, dict[str, Any]]]:
    tables = data.get(kind, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConversionError(f"{path}: {kind} is to be a list of tables, each begun with [[{kind}]]")
    return [(f"{path.name}:{kind} {number}", table) for number, table in enumerate(tables, 1)]


def _meant(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(word, known, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _known(where: str, table: dict[str, Any], keys: Sequence[str]) -> None:
    for key in table:
        if key not in keys:
            raise ConversionError(f"{where}: unknown key {key!r}{_meant(key, keys)}; expected {', '.join(keys)}")


def _number(where: str, table: dict[str, Any], key: str, default: int | None = None) -> int:
    value = table.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConversionError(f"{where}: {key} = {value!r}; expected a number that is not negative")
    return value


def _numbers(where: str, table: dict[str, Any], key: str) -> tuple[int, ...]:
    value = table.get(key, [])
    if not isinstance(value, list) or any(not isinstance(item, int) or item < 0 for item in value):
        raise ConversionError(f"{where}: {key} = {value!r}; expected a list of numbers")
    return tuple(value)


def _lists(where: str, table: dict[str, Any], key: str) -> tuple[tuple[int, ...], ...]:
    value = table.get(key, [])
    if not isinstance(value, list):
        raise ConversionError(f"{where}: {key} = {value!r}; expected a list of lists of numbers")
    return tuple(_numbers(where, {key: item}, key) for item in value)


# The further keys that each `how` of a shard rule allows, and the rule that it makes.
_SHARDINGS: dict[str, tuple[tuple[str, ...], Callable[[str, dict[str, Any]], Sharding]]] = {
    "replicated": ((), lambda where, table: Replicated()),
    "average": ((), lambda where, table: Average()),
    "dim": (("dim",), lambda where, table: along(_number(where, table, "dim"))),
    "fused": (
        ("dim", "parts", "sizes", "widths"),
        lambda where, table: Fused(
            _number(where, table, "dim", 0),
            _number(where, table, "parts", 1),
            _numbers(where, table, "sizes"),
            _lists(where, table, "widths"),
        ),
    ),
    "vocab": (
        ("rows", "multiple"),
        lambda where, table: Vocabulary(_number(where, table, "rows"), _number(where, table, "multiple", 1)),
    ),
    "expert": (("placement",), lambda where, table: Expert(_lists(where, table, "placement"))),
    "flat": (("shape",), lambda where, table: Flat(_numbers(where, table, "shape"))),
}


def _how(where: str, how: object, known: Collection[str]) -> str:
    if not isinstance(how, str) or how not in known:
        meant = _meant(how, known) if isinstance(how, str) else ""
        raise ConversionError(f"{where}: how = {how!r}{meant}; expected {', '.join(known)}")
    return how


def _templates(where: str, value: object, key: str) -> tuple[Pattern, ...]:
    items: list[Any] = value if isinstance(value, list) else [value]
    if not items or not all(isinstance(item, str) for item in items):
        raise ConversionError(f"{where}: {key} = {value!r}; expected a name or a list of names")
    try:
        return tuple(template(item) for item in items)
    except ConversionError as error:
        raise ConversionError(f"{where}: {key}: {error}") from error


def _shard_rule(where: str, table: dict[str, Any]) -> ShardRule:
    how = _how(where, table.get("how"), _SHARDINGS)
    keys, make = _SHARDINGS[how]
    _known(where, table, ("pattern", "regex", "how", *keys))
    if ("pattern" in table) == ("regex" in table):
        raise ConversionError(f"{where}: expected either pattern or regex")
    if "pattern" in table:
        patterns = _templates(where, table["pattern"], "pattern")
    else:
        try:
            patterns = (regex(str(table["regex"])),)
        except ConversionError as error:
            raise ConversionError(f"{where}: regex: {error}") from error
    return ShardRule(where, patterns, make(where, table))


def _name_rule(where: str, table: dict[str, Any]) -> NameRule:
    _known(where, table, ("a", "b", "how", "dim", "sizes", "dtype"))
    if "a" not in table and "b" not in table:
        raise ConversionError(f"{where}: expected a, b or both")
    a = _templates(where, table["a"], "a") if "a" in table else ()
    b = _templates(where, table["b"], "b") if "b" in table else ()
    kinds = table.get("how", "same" if a and b else "drop")
    kinds = [_how(where, kind, _STEPS) for kind in (kinds if isinstance(kinds, list) else [kinds])]
    if ("drop" in kinds) == bool(a and b):
        raise ConversionError(f"{where}: how = {kinds}; a rule with one side drops, and a rule with two does not")
    if a and b:
        _check_placeholders(where, a, b)
    dtype = table.get("dtype")
    if dtype is not None and dtype not in NAMES:
        raise ConversionError(f"{where}: dtype = {dtype!r}{_meant(str(dtype), NAMES)}; expected one of torch's")
    makers = [_STEPS[kind](where, table, len(a), len(b)) for kind in kinds]
    return NameRule(where, a, b, " and ".join(kinds), dtype, lambda variables: _made(where, makers, variables))


def _check_placeholders(where: str, a: tuple[Pattern, ...], b: tuple[Pattern, ...]) -> None:
    first = set(a[0].placeholders)
    for pattern in (*a, *b):
        if set(pattern.placeholders) != first:
            raise ConversionError(
                f"{where}: {pattern.source!r} has the placeholders {sorted(pattern.placeholders)}, and "
                f"{a[0].source!r} has {sorted(first)}; expected the same in all"
            )


Maker = Callable[[Mapping[str, int]], tuple[RenamingStep, ...]]


def _made(where: str, makers: Sequence[Maker], variables: Mapping[str, int]) -> tuple[RenamingStep, ...]:
    try:
        return tuple(step for maker in makers for step in maker(variables))
    except KeyError as error:
        raise ConversionError(
            f"{where}: needs the variable {error.args[0]!r} of the model; known: {', '.join(variables) or 'none'}"
        ) from error


def _same(where: str, table: dict[str, Any], a: int, b: int) -> Maker:
    if a and b and (a, b) != (1, 1):
        raise ConversionError(f"{where}: {a} names for {b}; say how they make each other: concat or qkv")
    return lambda variables: ()


def _transpose(where: str, table: dict[str, Any], a: int, b: int) -> Maker:
    return lambda variables: (Transpose(),)


def _concat(where: str, table: dict[str, Any], a: int, b: int) -> Maker:
    sizes = _numbers(where, table, "sizes")
    if a < 2 or b != 1 or (sizes and len(sizes) != a):
        raise ConversionError(f"{where}: concat takes several names of a, and one of b, and as many sizes or none")
    step = Concat(a, _number(where, table, "dim", 0), sizes)
    return lambda variables: (step,)


def _qkv(where: str, table: dict[str, Any], a: int, b: int) -> Maker:
    if a not in (1, 3) or b != 1:
        raise ConversionError(f"{where}: qkv takes the three names of q, k and v, or one of all; and one of b")

    def make(variables: Mapping[str, int]) -> tuple[RenamingStep, ...]:
        numbers = [variables[name] for name in _HEADS]
        return (Unfused(*numbers), Interleaved(*numbers)) if a == 1 else (Interleaved(*numbers),)

    return make


_STEPS: dict[str, Callable[[str, dict[str, Any], int, int], Maker]] = {
    "same": _same,
    "concat": _concat,
    "transpose": _transpose,
    "qkv": _qkv,
    "drop": _same,
}
