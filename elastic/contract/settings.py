"""What a run is configured with, and the one place that reads the environment.

Precedence: command line (`--es-*`, which the launcher turns into variables) and `EVERSTEP_*` variables, then the
`[everstep]` table of the TOML file named by EVERSTEP_CONFIG, then the decorator's arguments, then the defaults.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from everstep.elastic.protocol.events import Begun

from .errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A run's settings. Batch sizes are in samples; `global_batch_size` is what one step consumes."""

    steps: int
    global_batch_size: int
    micro_batch_size: int
    stages: int = 1
    seed: int = 0
    protection: str = "parity"  # what lost nodes are made up from: parity | replay | replicate | none
    node_losses: int = 1  # how many nodes may be lost at once
    snapshot_every: int = 0  # steps between versions that outlive nodes; 0: "auto"
    snapshot_budget: float = 0.02  # of a step's time, for "auto"
    on_loss: str = "checkpoint"  # when more is lost than is protected: checkpoint | neighbors | stop
    verify_every: int = 100  # steps between comparisons of the replicas of a parameter; 0: never
    on_corruption: str = "repair"  # of a replica that differs: repair | evict
    checkpoint: str = ""  # the URL of the folder in which checkpoints are saved, and looked for; empty: none are
    checkpoint_every: int = 1000  # steps
    checkpoint_keep: int = 2  # how many are kept at least
    checkpoint_keep_s: float = 0.0  # and for how long, if that is more
    checkpoint_timeout: float = 300.0  # seconds without progress after which saving one is given up
    checkpoint_options: str = "{}"  # of the fsspec file system, as JSON
    resume: str = "auto"  # auto: from the newest there; never; or the URL of one to start from when there is none
    resume_hyperparameters: str = "checkpoint"  # whose rates and other settings go on: checkpoint | script
    on_damage: str = "stop"  # what is done about a damaged checkpoint: stop | older
    resume_data: str = "check"  # of other data, or batch sizes, than the checkpoint was trained with: check | ignore

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name, least in (("node_losses", 1), ("verify_every", 0), ("checkpoint_every", 1), ("checkpoint_keep", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"{name} must be a whole number of at least {least}, got {value!r}")
        every = self.snapshot_every
        if not isinstance(every, int) or isinstance(every, bool) or every < 0:
            raise UsageError(f'snapshot_every must be "auto" or a whole number of at least 1, got {every!r}')
        if not isinstance(self.snapshot_budget, int | float) or not 0 < self.snapshot_budget <= 10:
            raise UsageError(
                f"snapshot_budget must be a share of a step's time, more than 0, such as 0.02; got "
                f"{self.snapshot_budget!r}"
            )
        if not isinstance(self.checkpoint_timeout, int | float) or not self.checkpoint_timeout > 0:
            raise UsageError(f"checkpoint_timeout must be a number of seconds, got {self.checkpoint_timeout!r}")
        if self.resume not in ("auto", "never") and "/" not in self.resume:
            raise UsageError(f'resume must be "auto", "never" or the URL of a checkpoint, got {self.resume!r}')
        try:
            if not isinstance(json.loads(self.checkpoint_options), dict):
                raise ValueError("it is no object")
        except ValueError as error:
            raise UsageError(f"checkpoint_options must be a JSON object: {error}") from None
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


CHOICES = {
    "protection": ("parity", "replay", "replicate", "none"),
    "on_loss": ("checkpoint", "neighbors", "stop"),
    "on_corruption": ("repair", "evict"),
    "on_damage": ("stop", "older"),
    "resume_data": ("check", "ignore"),
    "resume_hyperparameters": ("checkpoint", "script"),
}
TEXTS = ("checkpoint", "checkpoint_options", "resume")
NUMBERS = ("snapshot_budget", "checkpoint_keep_s", "checkpoint_timeout")


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
            overrides[name] = _value(name, variable, os.environ[variable])
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
    if table.get("snapshot_every") == "auto":
        table["snapshot_every"] = 0
    return dict(table)


def _value(name: str, variable: str, text: str) -> int | float | str:
    if name in CHOICES or name in TEXTS:
        return text
    if name == "snapshot_every" and text == "auto":
        return 0
    if name in NUMBERS:
        try:
            return float(text)
        except ValueError:
            raise UsageError(f"{variable} must be a number, got {text!r}") from None
    return _whole(variable, text)


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
    keeper_name: str
    control_fd: int = -1  # these two are known in the process that is forked
    progress_fd: int = -1
    node: str = ""
    max_nodes: int = 1
    shared_memory: bool = True
    local_rank: int = 0  # which of the GPUs that this process sees is its own
    gpu_workers: int = 1  # of this node, that see the same GPUs
    share_gpu: bool = False  # there may be more of them than GPUs
    begun: Begun | None = None  # training had begun when this worker was started

    VARIABLE = "EVERSTEP_WORKER"

    def to_environment(self) -> dict[str, str]:
        return {self.VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> WorkerContext | None:
        return cls.of(os.environ) if os.environ.get(cls.VARIABLE) else None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> WorkerContext:
        values = json.loads(environment[cls.VARIABLE])
        begun = values.pop("begun")
        return cls(**values, begun=Begun(**begun) if begun else None)
