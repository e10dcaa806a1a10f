"""What a run is configured with, and the one place that reads the environment.

Precedence: command line (`--es-*`, which the launcher turns into variables) and `EVERSTEP_*` variables, then the
`[everstep]` table of the TOML file named by EVERSTEP_CONFIG, then the decorator's arguments, then the defaults.
"""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A run's settings. Batch sizes are in samples; `global_batch_size` is what one step consumes."""

    steps: int
    global_batch_size: int
    micro_batch_size: int
    stages: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch_size", "micro_batch_size", "stages"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UsageError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.global_batch_size % self.micro_batch_size:
            raise UsageError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of micro_batch_size "
                f"({self.micro_batch_size}): change one of them"
            )

    @property
    def micro_batches(self) -> int:
        return self.global_batch_size // self.micro_batch_size


def resolve(declared: Settings) -> Settings:
    """The decorator's settings, overridden by file and environment."""
    overrides: dict[str, Any] = {}
    path = os.environ.get("EVERSTEP_CONFIG")
    names = {field.name for field in fields(Settings)}
    if path:
        overrides.update(_from_file(Path(path), names))
    for name in names:
        variable = f"EVERSTEP_{name.upper()}"
        if variable in os.environ:
            overrides[name] = _whole(variable, os.environ[variable])
    return replace(declared, **overrides)


def _from_file(path: Path, names: set[str]) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text()).get("everstep", {})
    except OSError as error:
        raise UsageError(f"EVERSTEP_CONFIG names {path}, which cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}") from None
    unknown = sorted(set(table) - names)
    if unknown:
        raise UsageError(f"{path}: unknown setting {unknown[0]!r} in [everstep]; there are {', '.join(sorted(names))}")
    return dict(table)


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{name} must be a whole number, got {text!r}") from None


def threads() -> int:
    """Threads of a worker: OMP_NUM_THREADS, else one. Pinned, since another number may give other bits."""
    text = os.environ.get("OMP_NUM_THREADS", "1")
    count = _whole("OMP_NUM_THREADS", text)
    if count < 1:
        raise UsageError(f"OMP_NUM_THREADS must be at least 1, got {text!r}")
    return count


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """What the node agent tells a worker it forks; absent in a script that runs without the launcher."""

    rank: int
    incarnation: int
    world_size: int
    host: str
    host_id: str
    token: str
    control_fd: int
    progress_fd: int
    keeper_name: str
    shared_memory: bool = True

    VARIABLE = "EVERSTEP_WORKER"

    def to_environment(self) -> dict[str, str]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {self.VARIABLE: json.dumps(values)}

    @classmethod
    def from_environment(cls) -> WorkerContext | None:
        text = os.environ.get(cls.VARIABLE)
        return cls(**json.loads(text)) if text else None
