"""The configuration of a run, and the only module that reads the environment.

Precedence: command line (`--es-*`, which the launcher turns into variables) and `EVERSTEP_*` variables, then the
`[everstep]` table of the TOML file named by EVERSTEP_CONFIG, then the decorator's arguments, then the defaults.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Required, TypedDict

from everstep.elastic.protocol.events import Begun

from .errors import UsageError
from .sizes import parse_size

AUTO_STAGES = -1


@dataclass(frozen=True)
class About:
    """A setting's metadata beside its name, type and default; `meaning` is Markdown, for users."""

    meaning: str
    more: str = ""  # what the reference adds
    unit: str = ""  # of its value: steps, samples, seconds, ...
    choices: tuple[str, ...] = ()
    least: int | None = None
    shown: str = ""  # how a symbolic default is written
    instead: tuple[tuple[str, int | float | str], ...] = ()  # symbolic texts and their values

    @property
    def plain(self) -> str:
        """The meaning without Markdown, for a terminal."""
        return self.meaning.replace("`", "")


def setting(meaning: str, *, default: Any = MISSING, **about: Any) -> Any:
    """A field of `Settings`, which needs no other declaration."""
    return field(default=default, metadata={"about": About(meaning, **about)})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A run's settings: each is an argument of the decorator, a flag, a variable and a key of the settings file.

    The texts of the command line help and of docs/reference.md are these.
    """

    steps: int = setting("Optimizer steps in all; or give `epochs`.", unit="steps", default=0, least=1)
    epochs: int = setting(
        "Passes over the dataset in all, instead of `steps`.",
        more="See [epochs](guide/data.md#epochs).",
        unit="epochs",
        default=0,
        least=1,
    )
    last_batch: str = setting(
        'With `epochs`, samples that do not fill the last batch of an epoch: `"drop"` leaves them out, `"pad"` fills '
        'the batch with the first samples of the epoch, `"short"` trains on a smaller batch.',
        more="See [the last batch](guide/data.md#order-and-last-batch).",
        default="drop",
        choices=("drop", "pad", "short"),
    )
    skip_bad_samples: int = setting(
        "How many samples of the dataset may raise when a rank reads them; the next one takes the place of each.",
        more="See [data](guide/data.md#samples-that-cannot-be-read).",
        unit="samples",
        default=0,
        least=0,
    )
    global_batch_size: int = setting("Samples per step.", unit="samples", least=1)
    micro_batch_size: int = setting("Samples per forward; divides `global_batch_size`.", unit="samples", least=1)
    stages: int = setting(
        'Pipeline stages; `"auto"`: as few as the memory of the workers allows, and another number after a loss or a '
        "join if that is faster.",
        more="See [below](#stages-and-memory).",
        unit="stages",
        default=1,
        least=1,
        instead=(("auto", AUTO_STAGES),),
    )
    worker_memory: int = setting(
        "What a worker may use for parameters, gradients and optimizer states, in bytes or as `8GiB`; activations "
        'come on top. `"auto"`: with `stages="auto"`, half of what its GPU, or its part of the node, has; else no '
        "limit.",
        more="See [below](#stages-and-memory).",
        unit="bytes",
        default=0,
        shown="auto",
        least=1,
        instead=(("auto", 0),),
    )
    seed: int = setting("Seed of the data order, dropout and initialisation.", default=0)
    master_dtype: str = setting(
        'The type in which the optimizer steps parameters of lower precision (bfloat16, float16): `"float32"`, or '
        '`"none"` for their own.',
        more="See [low precision](guide/models.md#low-precision).",
        default="float32",
        choices=("float32", "none"),
    )
    loss_reduction: str = setting(
        'What the loss of a micro-batch is: the `"mean"` or the `"sum"` over its samples, or the sum over its '
        '`"tokens"`, divided by the number of tokens of the whole step.',
        more="See [losses](guide/models.md#losses-that-are-sums).",
        default="mean",
        choices=("mean", "sum", "tokens"),
    )
    protection: str = setting(
        'How the state survives lost nodes: `"parity"`, `"replicate"`, `"replay"` or `"none"`.',
        more="See [below](#protection).",
        default="parity",
        choices=("parity", "replay", "replicate", "none"),
    )
    node_losses: int = setting("How many nodes may be lost at once.", unit="nodes", default=1, least=1)
    snapshot_every: int = setting(
        'Steps between the versions that outlive nodes; `"auto"`: as often as `snapshot_budget` allows.',
        unit="steps",
        default=0,
        shown="auto",
        instead=(("auto", 0),),
    )
    snapshot_budget: float = setting(
        'The share of a step\'s time that protection may cost, for `"auto"`.', unit="of a step", default=0.02
    )
    on_loss: str = setting(
        'When more is lost than is protected: return to the newest `"checkpoint"`, approximate the lost shards from '
        '`"neighbors"` (lossy), or `"stop"`.',
        default="checkpoint",
        choices=("checkpoint", "neighbors", "stop"),
    )
    verify_every: int = setting(
        "Steps between comparisons of the replicas of each parameter; 0: never.", unit="steps", default=100, least=0
    )
    repeat_every: int = setting(
        "Steps between those in which each rank computes its first micro-batch twice, to notice what turns leave for "
        "each other; 0: never.",
        more="See [what a turn depends on](guide/between-steps.md#what-a-turn-depends-on).",
        unit="steps",
        default=0,
        least=0,
    )
    on_corruption: str = setting(
        'What happens to a replica that differs: `"repair"` or `"evict"`.',
        default="repair",
        choices=("repair", "evict"),
    )
    checkpoint: str = setting(
        "The URL of the folder of this job's checkpoints.",
        more="[Checkpoints](checkpoints.md) explains this and the next settings.",
        unit="URL",
        default="",
    )
    checkpoint_every: int = setting("Steps between checkpoints.", unit="steps", default=1000, least=1)
    checkpoint_keep: int = setting("How many checkpoints are kept at least.", unit="checkpoints", default=2, least=1)
    checkpoint_keep_s: float = setting(
        "How long each is kept, if that is more, in seconds.", unit="seconds", default=0.0
    )
    checkpoint_timeout: float = setting(
        "Seconds without progress after which a save is given up.", unit="seconds", default=300.0
    )
    checkpoint_options: str = setting(
        "Options of the fsspec file system; JSON on the command line, in a variable and in the file.",
        unit="JSON",
        default="{}",
    )
    resume: str = setting(
        '`"auto"`: resume from the newest checkpoint of the job; `"never"`; or the URL of a checkpoint to start from '
        "when the job has none.",
        unit="auto, never or URL",
        default="auto",
    )
    resume_hyperparameters: str = setting(
        'Whether the learning rates and other settings of the optimizer come from the `"checkpoint"` or the '
        '`"script"`.',
        default="checkpoint",
        choices=("checkpoint", "script"),
    )
    on_damage: str = setting(
        'A damaged checkpoint ends the job (`"stop"`), or the one before it is used (`"older"`).',
        default="stop",
        choices=("stop", "older"),
    )
    resume_data: str = setting(
        'A checkpoint of another dataset, batch size or seed is refused (`"check"`) or continued (`"ignore"`).',
        default="check",
        choices=("check", "ignore"),
    )

    def __post_init__(self) -> None:
        for known in SETTINGS:
            value, least = getattr(self, known.name), known.about.least
            if known.about.choices and value not in known.about.choices:
                raise UsageError(f"{known.name} must be one of {', '.join(known.about.choices)}, got {value!r}")
            symbolic = [known.default, *(number for _, number in known.about.instead)]
            if value in symbolic and not isinstance(value, bool):
                continue
            if least is not None and not (_is_whole(value) and value >= least):
                raise UsageError(f"{known.name} must be a whole number of at least {least}, got {value!r}")
        if not _is_whole(self.snapshot_every) or self.snapshot_every < 0:
            raise UsageError(
                f'snapshot_every must be "auto" or a whole number of at least 1, got {self.snapshot_every!r}'
            )
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
        if self.global_batch_size % self.micro_batch_size:
            raise UsageError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of micro_batch_size "
                f"({self.micro_batch_size}): change one of them"
            )

    @property
    def micro_batches(self) -> int:
        return self.global_batch_size // self.micro_batch_size


class Arguments(TypedDict, total=False):
    """The settings as arguments of the decorator, for type checkers; the defaults are those of `Settings`."""

    steps: int
    epochs: int
    last_batch: str
    skip_bad_samples: int
    global_batch_size: Required[int]
    micro_batch_size: Required[int]
    stages: int | Literal["auto"]
    worker_memory: int | str
    seed: int
    master_dtype: str
    loss_reduction: str
    protection: str
    node_losses: int
    snapshot_every: int | Literal["auto"]
    snapshot_budget: float
    on_loss: str
    verify_every: int
    repeat_every: int
    on_corruption: str
    checkpoint: str
    checkpoint_every: int
    checkpoint_keep: int
    checkpoint_keep_s: float
    checkpoint_timeout: float
    checkpoint_options: Mapping[str, Any] | None
    resume: str
    resume_hyperparameters: str
    on_damage: str
    resume_data: str


class Setting(NamedTuple):
    """A setting, and its names in the places where a user may set it."""

    name: str
    kind: str  # int, float or str
    default: Any  # MISSING: it has to be given
    about: About

    @property
    def flag(self) -> str:
        """Of `everstep run`."""
        return f"--es-{self.name.replace('_', '-')}"

    @property
    def variable(self) -> str:
        """Of the environment."""
        return f"EVERSTEP_{self.name.upper()}"

    @property
    def argument(self) -> Any:
        """The default as the decorator has it."""
        return self.about.shown or self.default

    def parse(self, text: str, source: str) -> int | float | str:
        """Parse a text from `source`. Raises UsageError."""
        for written, value in self.about.instead:
            if text == written:
                return value
        if self.kind == "float":
            try:
                return float(text)
            except ValueError:
                raise UsageError(f"{source} must be a number, got {text!r}") from None
        if self.about.unit == "bytes":
            return _size(source, text)
        return _whole(source, text) if self.kind == "int" else text


SETTINGS = tuple(
    Setting(field.name, str(field.type), field.default, field.metadata["about"]) for field in fields(Settings)
)


def declared(arguments: Arguments) -> Settings:
    """The settings that the decorator's arguments are."""
    given = _with_values(arguments)
    if "checkpoint_options" in given:
        given["checkpoint_options"] = json.dumps(dict(arguments["checkpoint_options"] or {}))
    return Settings(**given)


def resolve(declared: Settings) -> Settings:
    """The decorator's settings, overridden by file and environment."""
    overrides: dict[str, Any] = {}
    path = os.environ.get("EVERSTEP_CONFIG")
    if path:
        overrides.update(_from_file(Path(path)))
    for known in SETTINGS:
        if known.variable in os.environ:
            overrides[known.name] = known.parse(os.environ[known.variable], known.variable)
    lengths = {name: overrides[name] for name in ("steps", "epochs") if name in overrides}
    if len(lengths) == 1:  # the decorator's counts only where nothing else says how long
        overrides = {"steps": 0, "epochs": 0, **overrides}
    settings = replace(declared, **overrides)
    if settings.steps and settings.epochs:
        raise UsageError(
            f"steps ({settings.steps}) and epochs ({settings.epochs}) are both given: leave one of them out, since "
            "each says how long to train"
        )
    if not settings.steps and not settings.epochs:
        raise UsageError("nothing says how long to train: give steps=N (optimizer steps) or epochs=N")
    return settings


def _from_file(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text()).get("everstep", {})
    except OSError as error:
        raise UsageError(f"EVERSTEP_CONFIG names {path}, which cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}") from None
    unknown = sorted(set(table) - {known.name for known in SETTINGS})
    if unknown:
        there = ", ".join(sorted(known.name for known in SETTINGS))
        raise UsageError(f"{path}: unknown setting {unknown[0]!r} in [everstep]; there are {there}")
    return _with_values(table)


def _with_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same with symbolic texts replaced by their values."""
    instead = {(known.name, text): value for known in SETTINGS for text, value in known.about.instead}
    sizes = {known.name for known in SETTINGS if known.about.unit == "bytes"}
    found: dict[str, Any] = {}
    for name, value in given.items():
        found[name] = instead.get((name, value), value) if isinstance(value, str) else value
        if name in sizes and isinstance(found[name], str):
            found[name] = _size(name, found[name])
    return found


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{name} must be a whole number, got {text!r}") from None


def _size(name: str, text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from None


def threads() -> int:
    """Threads of a worker: OMP_NUM_THREADS, else one. Pinned, since another number may give other bits."""
    text = os.environ.get("OMP_NUM_THREADS", "1")
    count = _whole("OMP_NUM_THREADS", text)
    if count < 1:
        raise UsageError(f"OMP_NUM_THREADS must be at least 1, got {text!r}")
    return count


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """Parameters from the node agent to a forked worker; absent in a script that runs without the launcher."""

    rank: int
    incarnation: int
    world_size: int
    host: str
    host_id: str
    token: str
    keeper_name: str
    control_fd: int = -1  # these two are set in the forked process
    progress_fd: int = -1
    node: str = ""
    max_nodes: int = 1
    shared_memory: bool = True
    local_rank: int = 0  # which of the GPUs that this process sees is its own
    gpu_workers: int = 1  # of this node, that see the same GPUs
    share_gpu: bool = False  # there may be more of them than GPUs
    begun: Begun | None = None  # training had begun when this worker was started
    memory_bytes: int = 0  # its part of the node's memory for parameters, gradients and optimizer states; 0: not known

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
