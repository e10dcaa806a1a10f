"""What a snapshot keeper says to the agent that starts it: one line of JSON on its standard output."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass


class Failure(enum.Enum):
    """Why a keeper ended before it served."""

    NAME_TAKEN = "name_taken"  # another keeper has the name
    OTHER = "other"  # the port, the certificates, the process itself: `why` says


@dataclass(frozen=True)
class Started:
    """A keeper serves on a TCP port, or it ended: `failure` says for which kind of reason, `why` for people."""

    port: int = 0
    failure: Failure | None = None
    why: str = ""

    def line(self) -> str:
        """The line to print."""
        failure = self.failure.value if self.failure is not None else None
        return json.dumps({"port": self.port, "failure": failure, "why": self.why})

    @classmethod
    def of(cls, line: str) -> Started:
        """The value of a line; of none, or of another text, a failure."""
        try:
            said = json.loads(line)
            failure = said["failure"] and Failure(said["failure"])
            return cls(int(said["port"]), failure, str(said["why"]))
        except (ValueError, KeyError, TypeError):
            return cls(failure=Failure.OTHER, why=line.strip())
