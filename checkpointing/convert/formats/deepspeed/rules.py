"""How tensor-parallel ranks cut parameters, from `universal_checkpoint_info`: lists of patterns, affine maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everstep.checkpointing.convert.core.content import ConversionError, Lazy
from everstep.checkpointing.convert.rules.affine import Affine, affine
from everstep.checkpointing.convert.rules.patterns import (
    Match,
    Pattern,
    Table,
    describe,
    regex,
)
from everstep.checkpointing.convert.rules.rulefile import ShardRule, read_rules
from everstep.checkpointing.convert.rules.sharding import (
    Average,
    Fused,
    Replicated,
    Sharding,
    Vocabulary,
    along,
)

INFO = "universal_checkpoint_info"
_WIDTHS_SINCE = 0.4  # the version that records how unevenly sub-parameters were cut
_AFFINE_VERSION = 1


@dataclass(frozen=True)
class Stripped:
    """Another sharding, and then the padding of the vocabulary off."""

    inner: Sharding
    rows: int

    def describe(self) -> str:
        return f"{self.inner.describe()}; padding after row {self.rows} left"

    def consolidate(self, name: str, pieces: Sequence[Lazy]) -> Lazy:
        return Vocabulary(self.rows).consolidate(name, [self.inner.consolidate(name, pieces)])

    def split(self, name: str, whole: Lazy, ranks: int) -> list[Lazy]:
        return self.inner.split(name, whole, ranks)


class Shardings:
    """The rule for each parameter: the user's rules first, then the checkpoint's, whose default is dimension 0."""

    def __init__(self, info: dict[str, Any] | None, ranks: int, rules: Sequence[Path], where: Path) -> None:
        self._ranks = ranks
        self._where = where
        self._user = Table(tuple(rule for path in rules for rule in read_rules(path).shards))
        self._knows = bool(info)
        self._info = info or {}
        self._version = float(self._info.get("universal_checkpoint_version", 0))
        self._rows = self._info.get("original_vocab_size")
        self._lists, self._vocabulary, self._unsupported = self._tables() if info else (Table[ShardRule](()),) * 3
        self._affine = self._maps() if info else Table[ShardRule](())

    @property
    def knows(self) -> bool:
        """Whether there are rules beside the default."""
        return self._knows or bool(self._user.rules)

    def of(self, name: str) -> tuple[Sharding, str]:
        """The way a parameter was cut, and why. Raises ConversionError if several rules match, or none."""
        match = _one(self._user, name, self._where)
        if match is not None:
            return match.rule.sharding, f"{describe(match)}: {match.rule.sharding.describe()}"
        if self._ranks == 1:
            return Replicated(), "whole on one rank"
        if not self._knows:
            raise ConversionError(
                f"{self._where}: {self._ranks} tensor-parallel ranks, and neither {INFO} nor a rule file says how they "
                f"cut {name}; give --rules"
            )
        refused = _one(self._unsupported, name, self._where)
        if refused is not None:
            raise ConversionError(f"{self._where}: DeepSpeed marks {name} as not convertible: {refused.rule.where}")
        match = _one(self._affine, name, self._where) or _one(self._lists, name, self._where)
        sharding: Sharding = match.rule.sharding if match else along(0)
        if _one(self._vocabulary, name, self._where) is not None:
            if self._rows is None:
                raise ConversionError(
                    f"{self._where}: {name} is of the vocabulary, and original_vocab_size is not recorded"
                )
            sharding = Stripped(sharding, int(self._rows))
        why = describe(match) if match else f"{INFO} (no pattern: the default)"
        return sharding, f"{why}: {sharding.describe()}"

    def buffer(self, name: str) -> Sharding:
        """The way a buffer is kept: whole on every rank, unless a rule of the user matches."""
        match = _one(self._user, name, self._where)
        return match.rule.sharding if match else Replicated()

    def _tables(self) -> tuple[Table[ShardRule], Table[ShardRule], Table[ShardRule]]:
        shardings: list[tuple[str, Sharding]] = [
            ("tp_replicated_parameter_patterns", Replicated()),
            ("parameter_to_average_patterns", Average()),
            ("parameter_with_2_sub_params_cat_dim_0", Fused(0, parts=2)),
            ("parameter_with_row_parallelism_patterns", along(1)),
        ]
        rules = [self._rule(key, self._info.get(key, ()), sharding) for key, sharding in shardings]
        for entry in self._info.get("parameter_with_sub_params", ()):
            fields = entry if isinstance(entry, dict) else entry.fields
            for pattern in fields["patterns"]:
                rules.append(self._rule("parameter_with_sub_params", [pattern], self._fused(fields, pattern)))
        vocabulary = self._rule(
            "vocabulary_parameter_patterns", self._info.get("vocabulary_parameter_patterns", ()), along(0)
        )
        unsupported = [
            self._rule(f"{pattern}: {reason}", [pattern], Replicated())
            for pattern, reason in dict(self._info.get("autotp_unsupported_parameter_patterns", {})).items()
        ]
        return Table(tuple(rules)), Table((vocabulary,)), Table(tuple(unsupported))

    def _rule(self, key: str, patterns: Sequence[str], sharding: Sharding) -> ShardRule:
        made: tuple[Pattern, ...] = tuple(regex(pattern, whole=False) for pattern in patterns)
        return ShardRule(f"{INFO}.{key}", made, sharding)

    def _fused(self, fields: dict[str, Any], pattern: str) -> Fused:
        """A parameter that holds several: before version 0.4 they were cut evenly, and a number was their count."""
        dim = int(fields["partition_dim"])
        shape = [tuple(size) if isinstance(size, list | tuple) else int(size) for size in fields["shape"]]
        at = shape[dim]
        view = tuple(sum(size) if isinstance(size, tuple) else size for size in shape)
        if self._version >= _WIDTHS_SINCE:
            widths = self._info.get("sub_param_shard_widths", {}).get(pattern)
            if widths is None:
                raise ConversionError(f"{self._where}: {INFO} has no sub_param_shard_widths for {pattern!r}")
            return Fused(dim, widths=tuple(tuple(int(width) for width in part) for part in widths), view=view)
        if isinstance(at, int):
            return Fused(dim, parts=at)
        if any(size % self._ranks for size in at):
            raise ConversionError(
                f"{self._where}: {pattern!r}: sub-parameters of {at} do not divide by {self._ranks} ranks, and how "
                "they were cut is not recorded"
            )
        return Fused(dim, sizes=at, view=view)

    def _maps(self) -> Table[ShardRule]:
        entry = self._info.get("affine_map") or {}
        version = entry.get("version", _AFFINE_VERSION)
        if version != _AFFINE_VERSION:
            raise ConversionError(f"{self._where}: affine map of version {version}; expected {_AFFINE_VERSION}")
        rules = []
        for pattern, value in entry.get("params", {}).items():
            made = affine(f"{self._where}: affine_map of {pattern!r}", value)
            rules.append(ShardRule(f"{INFO}.affine_map", (regex(pattern, whole=False),), made))
        return Table(tuple(rules))


def _one(table: Table[ShardRule], name: str, where: Path) -> Match[ShardRule] | None:
    found = table.matches(name)
    if len(found) > 1:
        raise ConversionError(f"{where}: {name} is matched by {' and '.join(describe(match) for match in found)}")
    return found[0] if found else None


def is_round_robin(config: Any) -> bool:
    """Whether an engine of this configuration deals its parameters out to its ranks in turn."""
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    return isinstance(zero, dict) and bool(zero.get("round_robin_gradients"))


def for_state(sharding: Sharding, state: str, name: str) -> Sharding:
    """The sharding of an optimizer's state. Raises ConversionError if the parameter was scaled: its moments differ."""
    inner = sharding.inner if isinstance(sharding, Stripped) else sharding
    if state != "fp32" and isinstance(inner, Affine) and inner.is_scaled:
        raise ConversionError(f"{name}: its affine map scales it, and {state} cannot be scaled along")
    return sharding
