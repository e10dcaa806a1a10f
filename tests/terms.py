"""What a step was agreed on, where a test cares for some of it only."""

from __future__ import annotations

from typing import Any

from everstep.elastic.protocol.terms import Terms


def agreed(**given: Any) -> Terms:
    """Terms of a step of which nothing is known but what is given."""
    nothing = {"step": 0, "loss": None, "norm": None, "scale": None, "groups": [], "registered": {}, "digest": ""}
    return Terms(**{**nothing, "protected": -1, "every": 1, **given})
