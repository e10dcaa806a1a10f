"""What a snapshot keeper and those who speak with it agree on: the version of all of it, and how a keeper starts.

A keeper may be of another everstep than the process that connects: it outlives its agent, and nodes are installed one
by one. So each connection begins with a greeting, which says the version; another one is refused, by name.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PROTOCOL = 5  # of requests, answers and segments; 1 had no number, 2 no generation, 3 no gradients, 4 no contents


def greeting(token: str) -> bytes:
    """The first line on a connection."""
    return json.dumps({"token": token, "protocol": PROTOCOL}).encode() + b"\n"


def refusal(hello: Mapping[str, Any]) -> str:
    """Why a keeper does not speak with who sent this greeting; empty if it does."""
    theirs = hello.get("protocol", 1)
    if theirs == PROTOCOL:
        return ""
    return (
        f"this snapshot keeper speaks version {PROTOCOL} of the keeper protocol, and who connects speaks version "
        f"{theirs}: run the same everstep on every node"
    )


class NameTaken(OSError):
    """Another keeper has this name."""


class Failure(enum.Enum):
    """Why a keeper ended before it served."""

    NAME_TAKEN = "name_taken"  # another keeper has the name
    OTHER = "other"  # the port, the certificates, the process itself: `why` says


@dataclass(frozen=True)
class KeeperStart:
    """A line on a new keeper's standard output: it serves on a TCP port, or it ended.

    `failure` says for which kind of reason, `why` for people.
    """

    port: int = 0
    failure: Failure | None = None
    why: str = ""

    def line(self) -> str:
        """The line to print."""
        failure = self.failure.value if self.failure is not None else None
        return json.dumps({"port": self.port, "failure": failure, "why": self.why})

    @classmethod
    def of(cls, line: str) -> KeeperStart:
        """The value of a line; of none, or of another text, a failure."""
        try:
            said = json.loads(line)
            failure = said["failure"] and Failure(said["failure"])
            return cls(int(said["port"]), failure, str(said["why"]))
        except (ValueError, KeyError, TypeError):
            return cls(failure=Failure.OTHER, why=line.strip())
