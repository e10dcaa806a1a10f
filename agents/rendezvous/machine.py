"""The rendezvous of plain torchrun's agents: the nodes of each round, as a pure function of their messages.

    join -> gathering -> formed (ranks are assigned) -> a node fails, joins or is lost -> all join again -> ...

It follows torch's own rule (`DynamicRendezvousHandler`): a round forms when the maximum number of nodes has joined, or
the minimum has joined and the last call has passed. A node that comes later waits; the members of the round see the
number of waiting nodes, and join again. Beyond torch's rule, a lost member counts like a waiting node.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace


class Action(enum.Enum):
    """The request of a node."""

    JOIN = "join"
    STAY = "stay"
    LEAVE = "leave"
    CLOSE = "close"


class RoundPhase(enum.Enum):
    """The answer to a node."""

    WAITING = "waiting"
    FORMED = "formed"
    CLOSED = "closed"
    REFUSED = "refused"


@dataclass(frozen=True, kw_only=True)
class RoundLimits:
    """How many nodes a round has, and how long they are waited for. Equal on all of a job's nodes."""

    min_nodes: int
    max_nodes: int
    last_call_s: float
    lost_after_s: float


@dataclass(frozen=True)
class RoundPlace:
    """A node's place in a round."""

    round: int = 0
    rank: int = -1
    world_size: int = 0


@dataclass(frozen=True, kw_only=True)
class Said:
    """One message of a node. `store`: host and port of the round's store, from rank 0."""

    node: str
    action: Action
    limits: RoundLimits
    place: RoundPlace = RoundPlace()
    store: tuple[str, int] = ("", 0)


@dataclass(frozen=True)
class Answer:
    """The answer to a node. `waiting`: how many nodes have joined or were lost, so that a new round is due."""

    phase: RoundPhase
    place: RoundPlace = RoundPlace()
    store: tuple[str, int] = ("", 0)
    waiting: int = 0
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The nodes of a job. `members` are in the current round; if it is empty, the waiting nodes form the next one."""

    limits: RoundLimits | None = None
    round: int = 0
    size: int = 0  # of the round when it formed
    members: Mapping[str, int] = field(default_factory=dict)  # node -> rank
    waiting: tuple[str, ...] = ()
    heard_s: Mapping[str, float] = field(default_factory=dict)
    enough_since_s: float = -1.0  # since when the least number has been there
    adopted_s: float = -1.0  # when this coordinator adopted a round that another coordinator formed
    lost: int = 0  # members, since the round formed
    store: tuple[str, int] = ("", 0)
    closed: bool = False


def step(group: Group, said: Said, now: float) -> tuple[Group, Answer]:
    """The group after a node's message at time `now` (seconds, any origin), and the answer to the node."""
    if group.limits is not None and said.limits != group.limits:
        theirs, ours = said.limits, group.limits
        why = (
            f"the others have nnodes {ours.min_nodes}:{ours.max_nodes}, this node {theirs.min_nodes}:{theirs.max_nodes}"
        )
        if (theirs.min_nodes, theirs.max_nodes) == (ours.min_nodes, ours.max_nodes):
            why = "the others have another --rdzv-conf"
        return group, Answer(RoundPhase.REFUSED, why=why)
    group = expire(replace(group, limits=said.limits), now)
    if said.action is Action.LEAVE:
        group = _without(group, said.node)
    elif said.action is Action.CLOSE:
        group = replace(_without(group, said.node), closed=True)
    elif not group.closed:
        group = replace(group, heard_s={**group.heard_s, said.node: now})
        group = _joined(group, said.node) if said.action is Action.JOIN else _stays(group, said, now)
        group = _form(group, now)
    return group, _answer(group, said.node)


def expire(group: Group, now: float) -> Group:
    """Without the nodes that have been silent for too long."""
    if group.limits is None:
        return group
    after_s = group.limits.lost_after_s
    for node in [node for node, heard_s in group.heard_s.items() if now - heard_s > after_s]:
        group = _without(group, node)
    if group.adopted_s >= 0 and now - group.adopted_s > after_s:
        missing = group.size - len(group.members) - group.lost - len(group.waiting)
        group = replace(group, adopted_s=-1.0, lost=group.lost + max(0, missing))
    return group


def over(group: Group) -> bool:
    """Whether the job has ended and every node knows it."""
    return group.closed and not group.members and not group.waiting


def _without(group: Group, node: str) -> Group:
    """The group without a lost node. A round that has no store yet cannot continue without all of its members."""
    waiting = tuple(other for other in group.waiting if other != node)
    heard_s = {other: at for other, at in group.heard_s.items() if other != node}
    group = replace(group, waiting=waiting, heard_s=heard_s)
    if node not in group.members:
        return group
    members = {other: rank for other, rank in group.members.items() if other != node}
    if group.store[0]:
        return replace(group, members=members, lost=group.lost + 1)
    return replace(group, members={}, waiting=(*sorted(members, key=members.__getitem__), *waiting))


def _joined(group: Group, node: str) -> Group:
    """A node joins the next round: it leaves the current round, if it is a member."""
    if node in group.waiting or (node in group.members and not group.store[0]):
        return group
    members = {other: rank for other, rank in group.members.items() if other != node}
    return replace(group, members=members, waiting=(*group.waiting, node))


def _stays(group: Group, said: Said, now: float) -> Group:
    """A node is alive. A coordinator that has just started learns the current round from its members."""
    if said.node in group.members:
        if group.members[said.node] == 0 and said.place.round == group.round and said.store[0]:
            group = replace(group, store=said.store)
        return group
    strange = said.place.rank >= 0 and said.node not in group.waiting
    if not strange or group.round > said.place.round or (group.round == said.place.round and not _fits(group, said)):
        return group
    if group.round < said.place.round:
        group = replace(group, round=said.place.round, size=said.place.world_size, store=("", 0), adopted_s=now)
    store = said.store if said.store[0] else group.store
    return replace(group, members={**group.members, said.node: said.place.rank}, store=store)


def _fits(group: Group, said: Said) -> bool:
    return group.adopted_s >= 0 and said.place.rank not in group.members.values()


def _form(group: Group, now: float) -> Group:
    """Form a round if enough nodes wait and there is no current round."""
    limits = group.limits
    assert limits is not None
    if group.members or len(group.waiting) < limits.min_nodes:
        return replace(group, enough_since_s=-1.0)
    since_s = now if group.enough_since_s < 0 else group.enough_since_s
    if len(group.waiting) < limits.max_nodes and now - since_s < limits.last_call_s:
        return replace(group, enough_since_s=since_s)
    chosen = group.waiting[: limits.max_nodes]
    return replace(
        group,
        round=group.round + 1,
        size=len(chosen),
        members={node: rank for rank, node in enumerate(chosen)},
        waiting=group.waiting[limits.max_nodes :],
        enough_since_s=-1.0,
        adopted_s=-1.0,
        lost=0,
        store=("", 0),
    )


def _answer(group: Group, node: str) -> Answer:
    if group.closed:
        return Answer(RoundPhase.CLOSED)
    assert group.limits is not None
    room = group.limits.max_nodes - len(group.members)
    waiting = min(len(group.waiting), room) + group.lost  # nodes that do not fit are no reason for a new round
    if node not in group.members:
        return Answer(RoundPhase.WAITING, waiting=waiting)
    place = RoundPlace(group.round, group.members[node], group.size)
    return Answer(RoundPhase.FORMED, place, group.store, waiting)
