"""The inputs of the worker's machine (events, in the past tense) and its outputs (instructions, in the imperative)."""

from __future__ import annotations

from dataclasses import dataclass

from everstep.resharding.layout import Layout
from everstep.resharding.moves import Move
from everstep.resharding.plan import Plan
from everstep.resharding.work import Work

# ---------------------------------------------------------------- events


@dataclass(frozen=True)
class Started:
    """The worker is ready to train. `seeded`: its values are those that the seed gives."""

    seeded: bool = True


@dataclass(frozen=True)
class Interrupted:
    """The generation has ended."""


@dataclass(frozen=True)
class Assigned:
    """The coordinator's plan has arrived."""

    plan: Plan


@dataclass(frozen=True)
class Linked:
    """The links to the members of the plan's generation are open, and copies in progress have finished."""


@dataclass(frozen=True)
class Placed:
    """Another rank has sent the position of the job: its version, the last agreement, and where the loop was left."""

    version: int
    agreement: str
    left: int | None = None


@dataclass(frozen=True)
class Restored:
    """All shards that this rank owns in the new generation are present."""


@dataclass(frozen=True)
class Published:
    """Every value that this rank reads is of the published version."""


@dataclass(frozen=True)
class StepDue:
    """Training continues: the step of this version is to be computed."""


@dataclass(frozen=True)
class Computed:
    """This rank's work of the step is complete."""


@dataclass(frozen=True)
class Reduced:
    """The gradients of the owned shards are reduced, and stored in the keeper's memory."""


@dataclass(frozen=True)
class Agreed:
    """All members agree on the step. `proposal`: the join or departure offered here; `wanted`: by all members.

    `waits`: some member waits for shards that it copies before it enters the proposal.
    """

    agreement: str
    proposal: Plan | None = None
    wanted: bool = False
    waits: bool = False


@dataclass(frozen=True)
class Distrusted:
    """Replicas differ: the step is not agreed. Names the shards that are wrong here, and whether read values are."""

    shards: frozenset[int] = frozenset()
    values: bool = False


@dataclass(frozen=True)
class Spoiled:
    """The script has replaced committed values: no other rank may fetch them."""


@dataclass(frozen=True)
class SwitchDue:
    """The step boundary has been reached at which the agreed join or departure takes place."""


@dataclass(frozen=True)
class LoopLeft:
    """The user's code has left the training loop."""


@dataclass(frozen=True)
class EndDue:
    """No step is left: the last version has to be protected."""


@dataclass(frozen=True)
class PauseDue:
    """The user's code between two epochs is about to run: the version has to be protected."""


@dataclass(frozen=True)
class Concluded:
    """The version is whole here."""


Event = (
    Started
    | Interrupted
    | Assigned
    | Linked
    | Placed
    | Restored
    | Published
    | StepDue
    | Computed
    | Reduced
    | Agreed
    | Distrusted
    | Spoiled
    | SwitchDue
    | LoopLeft
    | EndDue
    | PauseDue
    | Concluded
)


# ---------------------------------------------------------------- instructions


@dataclass(frozen=True)
class SendReport:
    """Report to the coordinator what this rank holds (`report`)."""


@dataclass(frozen=True)
class AwaitPlan:
    """Wait for a plan that is not outdated; `first`: of this worker's life. Answer: Assigned."""

    first: bool = False


@dataclass(frozen=True)
class EditLinks:
    """Change the links to those of the plan's generation; wait until current copies have finished. Answer: Linked."""

    plan: Plan


@dataclass(frozen=True)
class AskPlace:
    """Ask a rank that has been training for the position of the job. Answer: Placed."""

    rank: int


@dataclass(frozen=True)
class TellPlace:
    """Send the position of the job to fresh ranks, before anything here is changed."""

    ranks: tuple[int, ...]
    version: int
    agreement: str


@dataclass(frozen=True)
class TakeUnseen:
    """On a fresh rank that no other rank guides: the user's code has not seen the step before `version`."""

    version: int
    agreement: str


@dataclass(frozen=True)
class Prefetch:
    """Begin to copy the shards that this rank is to own by `plan`, while training continues."""

    plan: Plan


@dataclass(frozen=True)
class DropPrefetched:
    """Copies that were made ahead of a plan are of no more use."""


@dataclass(frozen=True)
class EnterProtection:
    """Have this node's keeper enter the generation: from then on it holds for others what the plan's placement says."""

    plan: Plan


@dataclass(frozen=True)
class ForgetSince:
    """Go back from version `since` to `version`: agreements and results between them are discarded."""

    since: int
    version: int
    agreement: str


@dataclass(frozen=True)
class RunOptimizer:
    """Run the optimizer on the owned shards, with the reduced gradients, as agreed."""

    agreement: str


@dataclass(frozen=True)
class TakePlaces:
    """Hold the layers and own the shards of the plan. `free`: layers no longer held, and new ones, have no values.

    `discard`: use nothing that was held. `seeded`: every value is that of the seed.
    """

    plan: Plan
    version: int
    layers: tuple[int, int] | None  # None: unchanged
    shards: frozenset[int]
    discard: bool
    seeded: bool


@dataclass(frozen=True)
class OpenCheckpoint:
    """Open the plan's checkpoint, of `version`, and read the state from it that training does not change."""

    name: str
    version: int
    agreement: str


@dataclass(frozen=True)
class Restore:
    """Carry out the moves of shards that this rank owns at `version`, and of its backups. Answer: Restored."""

    plan: Plan
    version: int
    agreement: str
    moves: tuple[Move, ...]


@dataclass(frozen=True)
class Publish:
    """Owners send `version` of their shards to the ranks of `layout` that compute with them. Answer: Published."""

    version: int
    layout: Layout


@dataclass(frozen=True)
class Refresh:
    """Carry out the moves of values: owners send `version` of them to the ranks that lack them. Answer: Published."""

    plan: Plan
    version: int
    agreement: str


@dataclass(frozen=True)
class NoteChange:
    """The membership has changed at `version`: the script may change settings on some ranks before others."""

    version: int


@dataclass(frozen=True)
class ComeUp:
    """On a fresh rank: bring the settings that the user's code and the scheduler have changed to the job's position."""

    plan: Plan
    version: int
    agreement: str


@dataclass(frozen=True)
class AdoptAgreement:
    """Adopt what was agreed about protection."""

    agreement: str


@dataclass(frozen=True)
class TellCommitted:
    """Report to the coordinator that the step of this agreement is committed: a line of the ledger."""

    agreement: str
    generation: int


@dataclass(frozen=True)
class CommitStep:
    """The version after the agreed step is whole here: begin to protect it. `free` frees layers of other stages."""

    agreement: str
    layout: Layout
    free: bool


@dataclass(frozen=True)
class Protect:
    """Have the keeper hold this version of every owned shard, and its parity."""


@dataclass(frozen=True)
class BeginStep:
    """Begin the step of `version`, of which nothing is computed here."""

    version: int
    work: Work


@dataclass(frozen=True)
class ResumeStep:
    """Continue the interrupted step: keep what is held, and send again what other ranks need of it."""

    plan: Plan


@dataclass(frozen=True)
class TellEntered:
    """The plan is carried out, by a switch at a step boundary or a recovery. `tell`: confirm it to the coordinator."""

    generation: int
    switched: bool
    tell: bool


@dataclass(frozen=True)
class Compute:
    """Run this rank's work of the step, with at most `depth` micro-batches in flight. Answer: Computed."""

    step: int
    depth: int


@dataclass(frozen=True)
class Reduce:
    """Send partial sums to the owners of shards; sum those of the owned shards. Answer: Reduced."""

    step: int


@dataclass(frozen=True)
class Agree:
    """Wait for this rank's snapshots, and agree with all members. Answer: Agreed. `last`: no step follows."""

    step: int
    last: bool


@dataclass(frozen=True)
class TellIdled:
    """Report to the coordinator that this rank will not enter a proposed generation: it is past its last step."""

    generation: int


@dataclass(frozen=True)
class ForgetSnapshots:
    """All owners hold this version in their keepers: copies of older versions may be overwritten."""


@dataclass(frozen=True)
class HandOver:
    """The other ranks continue without this one: it waits until the coordinator releases it. Ends in an abort."""

    generation: int


@dataclass(frozen=True)
class ReportLeft:
    """Report to the coordinator that the user's code has left the loop, and decline later proposals."""

    version: int


@dataclass(frozen=True)
class WaitUntilWhole:
    """Wait until the version and its parity are whole here. Answer: Concluded. `last`: its checkpoints, too."""

    protect: bool
    last: bool = True


Instruction = (
    SendReport
    | AwaitPlan
    | EditLinks
    | AskPlace
    | TellPlace
    | TakeUnseen
    | Prefetch
    | DropPrefetched
    | EnterProtection
    | ForgetSince
    | RunOptimizer
    | TakePlaces
    | OpenCheckpoint
    | Restore
    | Refresh
    | Publish
    | NoteChange
    | ComeUp
    | AdoptAgreement
    | TellCommitted
    | CommitStep
    | Protect
    | BeginStep
    | ResumeStep
    | TellEntered
    | Compute
    | Reduce
    | Agree
    | TellIdled
    | ForgetSnapshots
    | HandOver
    | ReportLeft
    | WaitUntilWhole
)
