"""Why things happen, as enumerated values: decisions, metrics and tests read these, and never the texts beside them.

The texts are for people, and may contain more detail.
"""

from __future__ import annotations

import enum


class Cause(enum.Enum):
    """Why a recovery began. The values are the `reason` of its line in the event log and of its metrics."""

    WORKER_DIED = "worker_died"
    WORKER_HUNG = "worker_hung"
    NODE_LOST = "node_lost"
    CORRUPTION = "corruption"  # a damaged frame, replica or backup
    NOT_WHOLE = "not_whole"  # shards of the planned version were not found anywhere
    CHECKPOINT_DAMAGED = "checkpoint_damaged"
    OTHER = "other"  # workers join when no step remains for a planned switch

    @staticmethod
    def of_death(hang: str) -> Cause:
        """The cause that corresponds to a worker's death; `hang`: see `WorkerDied`."""
        return Cause.WORKER_HUNG if hang else Cause.WORKER_DIED

    def after(self, earlier: Cause | None) -> Cause:
        """The cause of a recovery that `earlier` began and this one extends: the first, unless a node is lost."""
        return self if earlier in (None, Cause.OTHER) or self is Cause.NODE_LOST else earlier


class Departure(enum.Enum):
    """The party that requests a node to leave the job."""

    ASKED = "asked"  # its operator: a signal, `everstep drain`, a preemption
    QUARANTINE = "quarantine"  # the coordinator, because its host had too many failures


class Ending(enum.Enum):
    """How a job ends. The values are the `reason` of the line `ended` in the event log."""

    DONE = "done"
    STOPPED = "stopped"  # on request
    NO_NODE_STAYS = "no_node_stays"  # nodes were asked to leave, and the others cannot continue without them
    TOO_MUCH_LOST = "too_much_lost"  # more than the protection covers, or the last node
    NO_MEMBER = "no_member"  # all members are lost, though nodes remain
    LEFT_ALONE = "left_alone"  # some ranks left the training loop, others did not
    PROCESS_ENDED = "process_ended"  # a rank ended its process inside the training function
    RAISED = "raised"  # the training function raised
    AFTER_TRAINING = "after_training"  # the code after training failed or was lost
    WORKER_FAILED = "worker_failed"  # one rank failed as often as --max-restarts allows
    RANKS_DIFFER = "ranks_differ"  # in settings, data, model or values
    TOO_FEW_NODES = "too_few_nodes"  # before training began
    DOES_NOT_FIT = "does_not_fit"  # the model does not fit these ranks, or their snapshots do not fit the memory
    CHECKPOINT_DAMAGED = "checkpoint_damaged"
    BUG = "bug"  # of Everstep
