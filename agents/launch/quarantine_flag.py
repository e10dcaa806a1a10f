"""When hosts are kept out, as a user writes it: `3/3600`, `3/3600/600`, `off`."""

from __future__ import annotations

import argparse
import math
import re
from typing import Any, NamedTuple


class Policy(NamedTuple):
    """After so many troubles within so many seconds, for so many seconds; `after` 0: never."""

    after: int = 0
    within_s: float = 3600.0
    keep_s: float = 3600.0

    def config(self) -> dict[str, Any]:
        """The fields of the protocol's Config that it is."""
        return {"quarantine_after": self.after, "quarantine_within_s": self.within_s, "quarantine_s": self.keep_s}


def policy(text: str) -> Policy:
    """The setting that `text` describes. Raises argparse's error for an invalid text."""
    if text == "off":
        return Policy()
    match = re.fullmatch(r"(\d+)/(\d+(?:\.\d+)?)(?:/(\d+(?:\.\d+)?))?", text)
    numbers = [float(number) for number in match.groups() if number is not None] if match else []
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise argparse.ArgumentTypeError(
            f"expected N/SECONDS or N/SECONDS/SECONDS, such as 3/3600, or off: got {text!r}"
        )
    return Policy(int(numbers[0]), numbers[1], numbers[-1])
