"""Warnings of the runtime: one catalogue, and one function that emits them.

A warning is shown on standard error (by the log of the coordinator, or by the script itself when it runs alone), is a
line of the event log, and is shown once per text. docs/troubleshooting.md has the cause and remedy of each; a test
compares it with this catalogue.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, Protocol


class Notice(enum.StrEnum):
    """What a warning is about. The value is its name in the event log and in docs/troubleshooting.md."""

    CHANGED_ON_SOME_RANKS = "changed-on-some-ranks"  # a learning rate set by some ranks' code and not by others'
    HYPERPARAMETERS_DIFFER = "hyperparameters-differ"  # the script's differ from the checkpoint's
    LOSS_NOT_FINITE = "loss-not-finite"  # the loss of a committed step is NaN or infinite
    LOSS_IS_A_SUM = "loss-is-a-sum"  # of a micro-batch, and loss_reduction says that it is a mean
    NO_PROGRESS = "no-progress"  # a worker makes no progress, and half of its hang timeout has passed
    HUNG_ALIVE = "hung-alive"  # a worker was killed as hung though it showed signs of life
    COLLECTIVE = "collective-stuck"  # the script waits in a collective of torch.distributed for a lost worker
    WAITING = "waiting"  # ranks, or the job, have waited for long: for which rank, and where that is
    SETTING_IGNORED = "setting-ignored"  # a setting of the script has no effect here
    ATTRIBUTE_CHANGED = "attribute-changed"  # a forward changes a number in the module, which the next one may use
    BUFFER_RESTORED = "buffer-restored"  # one with a rule (batch-norm statistics) was changed between steps, in vain
    TURN_NOT_REPEATABLE = "turn-not-repeatable"  # a micro-batch has another gradient when it is computed again
    DATA_GREW = "data-grew"  # a replacement's dataset has more samples than at the job's start
    DATA_NOT_REPEATABLE = "data-not-repeatable"  # the same index gives another sample when it is fetched again
    LOOP_WITHOUT_BATCHES = "loop-without-batches"  # a loop over the prepared batches began when none were left
    BATCHES_LEFT = "batches-left"  # the script took a number of turns, and ended before the last step
    OTHER_LOADER = "other-loader"  # the script takes batches of another DataLoader in its turns
    DATASET_CHANGED = "dataset-changed"  # by the script, while worker processes have it as it was
    DATA_WORKER_LOST = "data-worker-lost"  # a worker process of a DataLoader ended
    SAMPLE_SKIPPED = "sample-skipped"  # a sample of the dataset raised, and the next one takes its place
    STREAM_ENDED = "stream-ended"  # before the last step of the job
    SAMPLER_DIFFERS = "sampler-differs"  # of a replacement: the order of the other ranks is used
    RESUME_DATA = "resume-data"  # the data differs from that of the checkpoint's training
    FOREIGN_CHECKPOINT = "foreign-checkpoint"  # the job resumes from another framework's: what its reader says
    REPLACEMENT_VALUES = "replacement-values"  # a replacement's script loaded values that the job does not use
    REPLACEMENT_STATE = "replacement-state"  # a replacement has none of the script's own variables
    STATE_UNKNOWN = "state-unknown"  # steps are repeated that began before all present workers did
    PREFETCH_FAILED = "prefetch-failed"  # a rank could not copy shards ahead of a rebalance
    SAVE_STALLS = "save-stalls"  # a checkpoint is being saved, and the storage accepts no data
    SAVE_WAITED_FOR = "save-waited-for"  # training has ended, and its last checkpoint is not complete yet
    CHECKPOINT_FOLDER = "checkpoint-folder"  # has another run's checkpoints, or older ones cannot be removed
    NOTHING_LEFT = "nothing-left-to-train"  # the checkpoint that the job resumes from has all steps already


class WarningChannel(Protocol):
    """The worker's way to the coordinator, or, when the script runs alone, to standard error."""

    def note(self, what: str, fields: Mapping[str, Any]) -> None: ...


def warn(channel: WarningChannel, notice: Notice, text: str, **fields: Any) -> None:
    """Warn the user. `text` says what, where, and what to do; `fields` (rank, step) go into the event log.

    A worker warns for itself; the log shows equal texts of several ranks once.
    """
    channel.note("warning", {"notice": str(notice), "text": text, **fields})


class Shown:
    """Which warnings have been shown: each text once, and no more texts than a person can read."""

    LIMIT = 1000

    def __init__(self) -> None:
        self._texts: set[tuple[str, str]] = set()

    def first(self, notice: str, text: str) -> bool:
        """Whether this warning is shown for the first time."""
        key = (notice, text)
        if key in self._texts or len(self._texts) >= self.LIMIT:
            return False
        self._texts.add(key)
        return True
