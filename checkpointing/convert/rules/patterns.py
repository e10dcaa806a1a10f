"""Patterns over the names of parameters, and the rule that each name must match exactly one of them.

A template is a name in which `{x}` stands for one component between dots and `{x*}` for one or more:
`layers.{n}.mlp.{part*}`. A placeholder that occurs twice matches the same text. A regular expression covers what a
template cannot express.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from everstep.checkpointing.convert.core.content import ConversionError

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Pattern:
    """A rule's condition on names: `source` as written, and the expression that a name must match in full."""

    source: str
    expression: re.Pattern[str]
    placeholders: tuple[str, ...]

    def match(self, name: str) -> dict[str, str] | None:
        """The values of the placeholders in `name`; None if it does not match."""
        found = self.expression.fullmatch(name)
        return found.groupdict() if found else None

    def fill(self, values: dict[str, str]) -> str:
        """The name in which the placeholders of a template are replaced."""
        return _PLACEHOLDER.sub(lambda found: values[found[1].removesuffix("*")], self.source)


def template(source: str) -> Pattern:
    """The pattern of a template. Raises ConversionError for a placeholder that is none."""
    parts: list[str] = []
    names: list[str] = []
    end = 0
    for found in _PLACEHOLDER.finditer(source):
        name = found[1].removesuffix("*")
        if not _NAME.fullmatch(name):
            raise ConversionError(f"{source!r}: {found[0]!r} is not a placeholder; expected {{name}} or {{name*}}")
        parts.append(re.escape(source[end : found.start()]))
        if name in names:
            parts.append(f"(?P={name})")
        else:
            names.append(name)
            parts.append(f"(?P<{name}>.+)" if found[1].endswith("*") else f"(?P<{name}>[^.]+)")
        end = found.end()
    rest = source[end:]
    if set(_PLACEHOLDER.sub("", source)) & set("{}"):
        raise ConversionError(f"{source!r}: a brace that belongs to no placeholder")
    if not source:
        raise ConversionError("an empty pattern")
    return Pattern(source, re.compile("".join([*parts, re.escape(rest)])), tuple(names))


def regex(source: str, *, whole: bool = True) -> Pattern:
    """The pattern of a regular expression; of one that a name need only begin with, if not `whole`."""
    try:
        inner = re.compile(source)
        expression = inner if whole else re.compile(f"(?:{source})(?s:.*)")
    except re.error as error:
        raise ConversionError(f"{source!r} is not a regular expression: {error}") from error
    return Pattern(source, expression, tuple(inner.groupindex))


class Named(Protocol):
    """A rule, as a table sees it."""

    @property
    def where(self) -> str:
        """The file and the number of the rule, for errors and `--explain`."""

    @property
    def patterns(self) -> Sequence[Pattern]:
        """A name that matches one of these is the rule's."""


R = TypeVar("R", bound=Named)


@dataclass(frozen=True)
class Match(Generic[R]):
    rule: R
    pattern: Pattern
    values: dict[str, str]


@dataclass(frozen=True)
class Table(Generic[R]):
    """Rules, of which exactly one must match each name."""

    rules: tuple[R, ...]

    def matches(self, name: str) -> list[Match[R]]:
        found = []
        for rule in self.rules:
            for pattern in rule.patterns:
                values = pattern.match(name)
                if values is not None:
                    found.append(Match(rule, pattern, values))
                    break
        return found

    def resolve(self, names: Iterable[str]) -> dict[str, Match[R]]:
        """The one rule of each name. Raises ConversionError that lists the names that none, or two, match."""
        resolved: dict[str, Match[R]] = {}
        faults: list[str] = []
        for name in names:
            found = self.matches(name)
            if len(found) == 1:
                resolved[name] = found[0]
            elif found:
                faults.append(f"{name} is matched by {' and '.join(describe(match) for match in found)}")
            else:
                faults.append(f"{name} is matched by no rule")
        if faults:
            raise ConversionError(f"{len(faults)} names without exactly one rule: {'; '.join(faults)}")
        return resolved

    def unused(self, names: Iterable[str]) -> list[str]:
        """Where the rules are that match none of `names`."""
        left = list(self.rules)
        for name in names:
            left = [rule for rule in left if all(pattern.match(name) is None for pattern in rule.patterns)]
        return [rule.where for rule in left]


def describe(match: Match[R]) -> str:
    return f"{match.rule.where} ({match.pattern.source})"
