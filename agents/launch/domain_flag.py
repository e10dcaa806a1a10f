"""The failure domains of a node, as a user writes them: `rack=7`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

from .coordinator_flags import LaunchError

VARIABLE = "EVERSTEP_DOMAIN"


def labels(given: Iterable[str], environment: Mapping[str, str]) -> tuple[str, ...]:
    """The node's labels, sorted: of the flags or, without any, of the variable. Raises LaunchError for invalid ones."""
    texts = [*given] or [text for text in environment.get(VARIABLE, "").split(",") if text.strip()]
    found = sorted({_label(text) for text in texts})
    for one, other in itertools.pairwise(found):
        if one.partition("=")[0] == other.partition("=")[0]:
            raise LaunchError(f"--es-domain: a node is in one domain of a kind, not in both {one} and {other}")
    return tuple(found)


def _label(text: str) -> str:
    kind, equals, value = text.strip().partition("=")
    if not (equals and kind.isidentifier() and value and value.isprintable() and "," not in value):
        raise LaunchError(f"--es-domain: expected KIND=VALUE, such as rack=7: got {text!r}")
    return f"{kind}={value}"
