"""What a rank sends to one that joins: the position of the job, and how the user's code has left its state there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from everstep.comms.mesh.tensors import host_bytes, of_bytes
from everstep.elastic.protocol.codec import decode_record, encode_record

from .user_loop import Step


@dataclass(frozen=True)
class Position:
    """`left`: the version at which the user's code has left the loop. `begun`: its loop has begun.

    `unseen`: the steps before `version` for which the sender's code has not run, or is at; `turning`: it is not in the
    turn of the last one. `after`: the state of the user's code; `records`: of the settings, by step; `turns`: what
    steps began with that may be computed again; `calls`: the calls that the script has made; `attributes`: of modules,
    which it has changed.
    """

    version: int
    agreement: str
    left: int | None
    begun: bool
    unseen: tuple[Step, ...]
    turning: bool
    after: Mapping[str, Any]
    records: Mapping[str, Any]
    turns: Mapping[str, Any]
    calls: Mapping[str, Any]
    attributes: Mapping[str, Any]

    def to_message(self) -> Tensor:
        return of_bytes(json.dumps(encode_record(self)).encode())

    @classmethod
    def of_message(cls, message: Tensor) -> Position:
        """Raises Unreadable."""
        position: Position = decode_record(cls, json.loads(bytes(host_bytes(message))))
        return position
