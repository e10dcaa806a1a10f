"""Why things happen, as values: decisions, metrics and tests read these, and never the texts beside them.

The texts are for people, and may say more.
"""

from __future__ import annotations

import enum


class Cause(enum.Enum):
    """Why a recovery began. The values are the `reason` of its line in the event log and of its metrics."""

    WORKER_DIED = "worker_died"
    WORKER_HUNG = "worker_hung"
    NODE_LOST = "node_lost"
    CORRUPTION = "corruption"  # a damaged frame, replica or backup
    NOT_WHOLE = "not_whole"  # shards of the planned version were found nowhere
    CHECKPOINT_DAMAGED = "checkpoint_damaged"
    OTHER = "other"  # workers join when no step is left to let them in after

    @staticmethod
    def of_death(hang: str) -> Cause:
        """The cause that a worker's death is; `hang`: see `WorkerDied`."""
        return Cause.WORKER_HUNG if hang else Cause.WORKER_DIED

    def after(self, earlier: Cause | None) -> Cause:
        """The cause of a recovery that `earlier` began and this one extends: the first, but a lost node weighs most."""
        return self if earlier in (None, Cause.OTHER) or self is Cause.NODE_LOST else earlier


class Departure(enum.Enum):
    """Who wants a node to leave the job."""

    ASKED = "asked"  # its operator: a signal, `everstep drain`, a preemption
    QUARANTINE = "quarantine"  # the coordinator, since its host has had too many troubles


class Ending(enum.Enum):
    """How a job ends. The values are the `reason` of the line `ended` in the event log."""

    DONE = "done"
    STOPPED = "stopped"  # on request
    NO_NODE_STAYS = "no_node_stays"  # nodes were asked to leave, and the others cannot go on without them
    TOO_MUCH_LOST = "too_much_lost"  # more than is protected, or the last node
    NO_MEMBER = "no_member"  # all members are lost, though nodes are there
    LEFT_ALONE = "left_alone"  # some ranks left the training loop, others went on
    PROCESS_ENDED = "process_ended"  # a rank ended its process inside the training function
    RAISED = "raised"  # the user's function did
    AFTER_TRAINING = "after_training"  # what a script does after training failed or was lost
    WORKER_FAILED = "worker_failed"  # one rank, as often as is allowed
    RANKS_DIFFER = "ranks_differ"  # in settings, data, model or values
    TOO_FEW_NODES = "too_few_nodes"  # before training began
    DOES_NOT_FIT = "does_not_fit"  # the model on these ranks, or what is kept of it in their memory
    CHECKPOINT_DAMAGED = "checkpoint_damaged"
    BUG = "bug"  # of everstep
