"""What a job is, who computes it, and what is known of its checkpoints and of its end: values that events carry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from everstep.resharding.units import ModelSpec

from .causes import Ending


class WorkerId(NamedTuple):
    """A worker process: its rank, and how many processes had that rank before it."""

    rank: int
    incarnation: int

    def __str__(self) -> str:
        return f"{self.rank}.{self.incarnation}"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A worker's description of the job when it is ready; equal on all workers, or the job does not start."""

    steps: int
    stages: int  # 0: as many as the planner finds best
    micro_batches: int
    global_batch_size: int
    model: ModelSpec
    seed: int = 0
    values: str = ""  # a digest of the initial values of the model
    constants: str = ""  # a digest of what training does not change: frozen parameters, buffers
    samples: int = 0  # in the dataset
    shuffle: bool = True  # whether their order is permuted
    sample_digests: tuple[str, ...] = ()  # of the first, the middle and the last sample
    epochs: int = 0  # whose steps `steps` is; 0: it was given
    last_batch: str = "drop"
    loss_reduction: str = "mean"
    optimizer: str = ""  # its type, and how gradients become one, as text
    settings: str = ""  # of its parameter groups when the script handed it over, as text
    protection: str = "parity"  # parity | replay | replicate | none
    node_losses: int = 1  # how many nodes may be lost at once
    on_loss: str = "checkpoint"  # checkpoint | neighbors | stop
    checkpoints: bool = False  # whether it saves checkpoints
    one_stage: str = ""  # why it can have one pipeline stage only, with what to do; empty if it can have more
    on_damage: str = "stop"  # the response to a damaged checkpoint: stop | older
    state_bytes: tuple[int, ...] = ()  # of each shard's record
    gradient_bytes: tuple[int, ...] = ()  # of each shard's reduced gradient


@dataclass(frozen=True)
class Begun:
    """What a worker that was started after training began has to know of the job."""

    samples: int  # in the dataset that the job trains on
    values: str  # a digest of the initial values of the model
    settings: str  # of the optimizer's parameter groups at the start


class Saved(NamedTuple):
    """A committed checkpoint: the version, its name, and the agreement of step version - 1."""

    version: int
    name: str
    agreement: str


class Stopping(NamedTuple):
    """A stop is pending: the job waits for a checkpoint of a version after step `committed`, until `deadline_s`.

    `ending`: how the job ends then; PROCESS_ENDED: because of a mistake in the script.
    """

    why: str
    committed: int
    deadline_s: float
    ending: Ending = Ending.STOPPED

    @property
    def left(self) -> bool:
        """Whether the reason is a rank that ended its process."""
        return self.ending is Ending.PROCESS_ENDED
