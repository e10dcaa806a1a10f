"""Protection from lost nodes: where parity is placed, how much memory it needs, and to which version a loss leads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from everstep.resharding.domains import spread
from everstep.resharding.layout import Layout
from everstep.resharding.lines import of_this_line
from everstep.resharding.memory import Memory
from everstep.resharding.neighbors import stand_ins
from everstep.resharding.placement import Placement, place
from everstep.resharding.plan import Plan, Report, plan_resume
from everstep.resharding.planners import change_layout
from everstep.resharding.survival import Survival, survival

from . import events as e
from .state import RecoveryStory, State

STATE_SLOTS = 3  # per shard: a protected version, the newest complete one, and the one being written
LOCAL_STATE_SLOTS = 2  # if no node loss is covered: the newest complete version, and the one being written
GRADIENT_SLOTS = 2
PARITY_SLOTS = 3
REPROTECTION_S = 60.0  # assumed until a loss shows how long it takes


def state_slots(protection: str, max_nodes: int, *, checkpoints: bool) -> int:
    """How many versions of a shard's state its keeper holds; one more if one may be in the process of being saved."""
    nodes = protection in ("parity", "replicate") and max_nodes > 1
    return (STATE_SLOTS if nodes else LOCAL_STATE_SLOTS) + checkpoints


def placement_for(state: State, layout: Layout) -> Placement:
    """Where the parity of each shard is placed in the generation of `layout`, with as few changes as possible."""
    job = state.job
    assert job is not None
    if job.protection == "none":
        return Placement(generation=layout.generation, width=0, losses=0, wanted=0, stripes=())
    node_of = {rank: worker.node for rank, worker in state.workers.items()}
    stages: dict[str, set[int]] = {}  # of nodes with members: only their keepers learn of a generation
    for number, stage in enumerate(layout.stages):
        for rank in stage.ranks:
            stages.setdefault(node_of[rank], set()).add(number)
    return place(
        [node_of[rank] for rank in layout.owners],
        job.state_bytes or [shard.elements for shard in job.model.shards],
        sorted(stages),
        losses=job.node_losses,
        width=0 if job.protection == "parity" else 1,
        stages={name: frozenset(numbers) for name, numbers in stages.items()},
        domains={name: state.nodes[name].domains for name in stages},
        old=state.placement,
        generation=layout.generation,
    )


def memory_needed(state: State, layout: Layout, placement: Placement) -> dict[str, int]:
    """Bytes of protection per node: the slots of its shards, and the parity it holds for others."""
    job = state.job
    assert job is not None
    slots = state_slots(job.protection, state.config.max_nodes, checkpoints=job.checkpoints)
    needed = dict.fromkeys(state.nodes, 0)
    for shard, owner in enumerate(layout.owners[: len(job.state_bytes)]):
        held = slots * job.state_bytes[shard] + GRADIENT_SLOTS * job.gradient_bytes[shard]
        needed[state.workers[owner].node] += held
    for stripe in placement.stripes if job.state_bytes else ():
        largest = max(job.state_bytes[shard] for shard in stripe.shards)
        held = PARITY_SLOTS * largest
        if job.protection == "replay":  # a live copy, and its snapshots
            held = (1 + slots) * largest + GRADIENT_SLOTS * max(job.gradient_bytes[shard] for shard in stripe.shards)
        for node in stripe.parity:
            needed[node] += held
    return needed


def worker_memory(state: State) -> Memory:
    """What layers need in the workers, and what each worker may use."""
    job = state.job
    assert job is not None
    limits = {rank: worker.memory_bytes for rank, worker in state.workers.items() if worker.memory_bytes}
    return Memory.of(job.model, job.state_bytes, job.gradient_bytes, limits)


def too_small(state: State, needed: Mapping[str, int]) -> str:
    """Which node lacks the memory that protection needs, as an error text; empty if none does."""
    for name, node in state.nodes.items():
        if 0 < node.memory_bytes < needed[name]:
            return (
                f"node {name} ({node.host}) needs {_mib(needed[name])} of memory for snapshots and parity, and may use "
                f"{_mib(node.memory_bytes)}: raise --es-keeper-memory, spread the job over more nodes, or lower "
                "node_losses (protection='none' needs least)"
            )
    return ""


def statements(state: State, layout: Layout, placement: Placement, needed: Mapping[str, int]) -> list[e.Effect]:
    """Describe the job's protection on each node's terminal and in the event log."""
    job = state.job
    assert job is not None
    describe = describe_protection(job.protection, placement)
    fields = {
        "mode": job.protection,
        "width": placement.width,
        "losses": placement.losses,
        "wanted": placement.wanted,
        "note": placement.note,
        "bytes": dict(needed),
    }
    chance = survival_of(state, placement)
    if chance is not None:
        fields |= {"day": chance.day, "mtbf_h": chance.mtbf_h, "reprotection_s": chance.reprotection_s}
        describe += f"; {chance.describe()}"
    told: list[e.Effect] = [e.Record("protection", fields), *_exposed(state, layout, placement)]
    for name in state.nodes:
        told.append(e.TellNode(name, f"{describe}; this node holds up to {_mib(needed[name])} for it"))
    return told


def survival_of(state: State, placement: Placement, reprotection_s: float = 0.0) -> Survival | None:
    """How probable it is that a day leads back to storage; None without protection. `reprotection_s` 0: not known."""
    return survival(placement, state.config.node_mtbf_h, reprotection_s or REPROTECTION_S)


def _exposed(state: State, layout: Layout, placement: Placement) -> list[e.Effect]:
    """A warning for each kind of failure domain whose loss as a whole is not covered."""
    if not placement.losses:
        return []
    nodes = sorted({state.workers[rank].node for rank in layout.ranks})
    impossible = spread(nodes, {name: state.nodes[name].domains for name in nodes}, placement.losses, 1).impossible
    return [e.Record("domain_exposed", {"kind": kind, "why": why}) for kind, why in impossible.items()]


def describe_protection(mode: str, placement: Placement) -> str:
    """The protection as one line of text."""
    note = f" ({placement.note})" if placement.note else ""
    if not placement.stripes:
        return f"protection: of lost workers, not of lost nodes{note}"
    width = f", stripes of {placement.width}+{placement.losses}" if mode == "parity" else ""
    nodes = "1 lost node" if placement.losses == 1 else f"{placement.losses} lost nodes at once"
    return f"protection: {mode}, of {nodes}{width}{note}"


def _mib(count: int) -> str:
    return f"{count / (1 << 20):,.1f} MiB"


def protected_now(state: State, reports: Iterable[tuple[str, Report]]) -> int:
    """The newest version that the live nodes' keepers hold with its parity; -1 if one of them does not confirm it.

    The placement of parity in a generation determines which nodes have to confirm. What a lost node held of such a
    version can be reconstructed from its parity, so lost nodes need not confirm.
    """
    said: dict[tuple[str, int], int] = {}
    for node, report in reports:
        for generation, version in (report.protected, report.protected_before):
            said[(node, generation)] = min(said.get((node, generation), version), version)
    found = [-1]
    for generation, placement in state.placements.items():
        holders = {node for stripe in placement.stripes for node in (*stripe.nodes, *stripe.parity)}
        found.append(min((said.get((node, generation), -1) for node in holders & set(state.nodes)), default=-1))
    return max(found)


def outliving(state: State, reports: Iterable[Report]) -> int:
    """The newest version that outlives nodes, also by what members say who have entered this line of history."""
    line = state.lines[-1].generation if state.lines else 0
    return max([state.protected, *(report.outlives for report in reports if report.generation >= line)])


def committed_protected(state: State, event: e.WorkerCommitted) -> int:
    """The newest version that outlives nodes, also by what was agreed in a step."""
    return max(state.protected, event.protected) if of_this_line(state.lines, event.step) else state.protected


def still_missing(state: State, recovery: RecoveryStory, newest: int) -> RecoveryStory:
    """The recovery without the losses that an earlier plan has repaired: all members had carried that plan out."""
    if not 0 <= recovery.planned < newest:
        return recovery
    losses = tuple(loss for loss in recovery.losses if not loss.planned)
    return replace(recovery, losses=losses, ceiling=None, lacking=(), substitutes=(), lines=state.lines)


def target(state: State, recovery: RecoveryStory, newest: int, reports: Sequence[tuple[str, Report]]) -> int:
    """The version to resume from: `newest`, or, if a lost node held part of that, the newest version that is whole.

    A lost node held nothing exclusively if its members had only just entered at `newest`: the shards they own still
    exist where they fetched them from, or, at version 0, follow from the seed. -1 if there is no such version.
    """
    exposed = any(loss.since < newest for loss in recovery.losses)
    if recovery.ceiling is None and not exposed:
        return newest
    candidates = [state.protected, protected_now(state, reports)]
    if state.job is not None and state.job.protection == "replay":
        candidates.append(newest)  # a backup holds what the owner held, or the gradient that leads there
    limit = newest if recovery.ceiling is None else min(newest, recovery.ceiling)
    return max((version for version in candidates if version <= limit), default=-1)


def stand_in(state: State, job: e.Job, recovery: RecoveryStory, newest: int) -> tuple[int, RecoveryStory]:
    """The version to resume from with lost shards approximated from neighbouring layers; -1 if that is impossible.

    It is the version that was attempted last, or, if no version is protected, the newest.
    """
    assert state.layout is not None
    if recovery.ceiling is not None:
        version, gone = recovery.ceiling + 1, set(recovery.lacking)
    else:
        version, gone = newest, {i for i, owner in enumerate(state.layout.owners) if owner not in state.workers}
    substitutes = tuple(sorted(gone | set(recovery.substitutes)))
    if len(stand_ins(job.model, substitutes)) < len(substitutes):
        return -1, recovery
    return version, replace(recovery, substitutes=substitutes)


def resumable(state: State, recovery: RecoveryStory, newest: int) -> bool:
    """Whether the job may return to its newest checkpoint, when no memory holds what is needed.

    To return to the checkpoint from which the job has only just resumed loses nothing, whatever `on_loss` says.
    """
    job = state.job
    if job is None or not state.saved:
        return False
    return job.on_loss == "checkpoint" or recovery.ceiling == -1 or newest <= state.saved[0].version


def resume_plan(state: State, ranks: list[int]) -> tuple[State, Plan]:
    """The plan by which all resume from the newest checkpoint, and the state without the steps after it."""
    assert state.job is not None
    assert state.layout is not None
    newest = state.saved[0]
    layout = change_layout(state.job.model, state.layout, ranks, state.generation)
    plan = plan_resume(state.job.model, layout, newest.version, newest.agreement, newest.name)
    return replace(state, protected=-1, agreements={newest.version - 1: newest.agreement}), plan
