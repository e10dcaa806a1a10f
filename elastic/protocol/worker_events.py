"""What a worker hears of (events, in the past tense), and what it wants done (instructions, in the imperative)."""

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
    """The coordinator's plan has come."""

    plan: Plan


@dataclass(frozen=True)
class Linked:
    """The links to the members of the plan's generation are there, and what was being copied is copied."""


@dataclass(frozen=True)
class Placed:
    """Another rank has said where the job is: its version, what was agreed last, and where the loop was left."""

    version: int
    agreement: str
    left: int | None = None


@dataclass(frozen=True)
class Restored:
    """Every shard that is owned in the new generation is here."""


@dataclass(frozen=True)
class Published:
    """Every value that this rank reads is of the version that was published."""


@dataclass(frozen=True)
class StepDue:
    """Training goes on: the step of this version is to be computed."""


@dataclass(frozen=True)
class Computed:
    """This rank's work of the step is done."""


@dataclass(frozen=True)
class Reduced:
    """The gradients of the owned shards are reduced, and are in the keeper's memory."""


@dataclass(frozen=True)
class Agreed:
    """All members agree on the step. `proposal`: the join or leave offered here; `wanted`: by all members."""

    agreement: str
    proposal: Plan | None = None
    wanted: bool = False


@dataclass(frozen=True)
class Distrusted:
    """Replicas differ: the step is not agreed. The shards here that are wrong, and whether values read here are."""

    shards: frozenset[int] = frozenset()
    values: bool = False


@dataclass(frozen=True)
class Spoiled:
    """The script has put other values in place of the committed ones: no other rank may have them."""


@dataclass(frozen=True)
class SwitchDue:
    """The step boundary is here at which the agreed join or leave takes place."""


@dataclass(frozen=True)
class LoopLeft:
    """The user's code has left the training loop."""


@dataclass(frozen=True)
class EndDue:
    """No step is left: the last version is to be protected."""


@dataclass(frozen=True)
class Concluded:
    """The last version is whole here."""


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
    | Concluded
)


# ---------------------------------------------------------------- instructions


@dataclass(frozen=True)
class SendReport:
    """Report to the coordinator what is held here (`report`)."""


@dataclass(frozen=True)
class AwaitPlan:
    """Wait for a plan that is not out of date; `first`: of this worker's life. Answer: Assigned."""

    first: bool = False


@dataclass(frozen=True)
class EditLinks:
    """Edit the links to the members of the plan's generation; wait until nothing is copied any more. Answer: Linked."""

    plan: Plan


@dataclass(frozen=True)
class AskPlace:
    """Ask a rank that has been training where the job is. Answer: Placed."""

    rank: int


@dataclass(frozen=True)
class TellPlace:
    """Tell fresh ranks where the job is, before anything here is changed."""

    ranks: tuple[int, ...]
    version: int
    agreement: str


@dataclass(frozen=True)
class TakeUnseen:
    """A fresh rank that no other rank guides: the step before `version` is what the user's code has not seen."""

    version: int
    agreement: str


@dataclass(frozen=True)
class EnterProtection:
    """The keeper of this node enters the generation: what it holds for others is that of the plan's placement."""

    plan: Plan


@dataclass(frozen=True)
class ForgetSince:
    """Go back from version `since` to `version`: what was agreed and computed between is dropped."""

    since: int
    version: int
    agreement: str


@dataclass(frozen=True)
class RunOptimizer:
    """Run the optimizer on the owned shards, with the reduced gradients, as agreed."""

    agreement: str


@dataclass(frozen=True)
class TakePlaces:
    """Hold the layers and own the shards of the plan. `free`: layers not held any more, and new ones, have no values.

    `discard`: nothing that was held is used. `seeded`: every value is that of the seed.
    """

    plan: Plan
    version: int
    layers: tuple[int, int] | None  # None: as before
    shards: frozenset[int]
    discard: bool
    seeded: bool


@dataclass(frozen=True)
class OpenCheckpoint:
    """Open the plan's checkpoint, of `version`, and read from it what training does not change."""

    name: str
    version: int
    agreement: str


@dataclass(frozen=True)
class Restore:
    """Carry out the moves of shards to own here, at `version`, and those of its backups. Answer: Restored."""

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
    """The membership has changed at `version`: the script's next changes of settings may come on some ranks only."""

    version: int


@dataclass(frozen=True)
class ComeUp:
    """A fresh rank: bring what the user's code and the scheduler have changed to where the job is."""

    plan: Plan
    version: int
    agreement: str


@dataclass(frozen=True)
class AdoptAgreement:
    """Take over what was agreed about protection."""

    agreement: str


@dataclass(frozen=True)
class TellCommitted:
    """Tell the coordinator that the step of this agreement is committed: a line of the ledger."""

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
    """Have the keeper hold this version of every owned shard, and its parity too."""


@dataclass(frozen=True)
class BeginStep:
    """Begin the step of `version`, of which nothing is done here."""

    version: int
    work: Work


@dataclass(frozen=True)
class ResumeStep:
    """Go on with the step under way: keep what is held, send again what other ranks need of it."""

    plan: Plan


@dataclass(frozen=True)
class TellEntered:
    """The plan is carried out, by a switch at a step boundary or a recovery. `tell`: the coordinator waits to hear."""

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
    """Send partial sums to the owners of shards; sum those of the owned ones. Answer: Reduced."""

    step: int


@dataclass(frozen=True)
class Agree:
    """Wait for this rank's snapshots, and agree with all members. Answer: Agreed. `last`: no step follows."""

    step: int
    last: bool


@dataclass(frozen=True)
class TellIdled:
    """Tell the coordinator that this rank will not enter a proposed generation: it is past its last step."""

    generation: int


@dataclass(frozen=True)
class ForgetSnapshots:
    """All owners have this version in their keepers: copies of older ones may be written over."""


@dataclass(frozen=True)
class HandOver:
    """The other ranks go on without this one: it stays until the coordinator lets it go. Ends the job, or aborts."""

    generation: int


@dataclass(frozen=True)
class ReportLeft:
    """Tell the coordinator that the user's code has left the loop, and decline what is proposed from now on."""

    version: int


@dataclass(frozen=True)
class WaitUntilWhole:
    """Wait until the last version, its parity and its checkpoints are whole here. Answer: Concluded."""

    protect: bool


Instruction = (
    SendReport
    | AwaitPlan
    | EditLinks
    | AskPlace
    | TellPlace
    | TakeUnseen
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
