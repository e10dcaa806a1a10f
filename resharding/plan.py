"""A plan: how to get from the survivors' reports to one agreed state, computing again only what was lost."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

from .layout import Layout, Stage
from .lines import Lines, lines_of
from .moves import (
    PROTECTED,
    SAVED,
    Move,
    SourceKind,
    What,
    from_runs,
    own_moves,
    received,
    standing_in,
    to_runs,
    value_moves,
)
from .planners import change_layout
from .units import ModelSpec
from .work import AssignedLeg, Leg, legs_from_runs, legs_to_runs


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one live worker holds when a generation is aborted.

    Versions count committed steps: version v is the state before step v. `owned` are the shards it holds at
    `owned_version`; `values_version` is the version at which it holds every parameter of its layers `[start, stop)`, -1
    if they are torn. `agreed` is the last step whose agreement it passed, -1 if none, with that agreement. `protected`
    is (generation, version): the newest version that its node's keeper holds together with its parity;
    `protected_before` is the same for the generation before. `outlives` is the newest version that, by agreement,
    survives the loss of nodes, -1 if none. `held`, `started` and `todo` are micro-batches of step `values_version`:
    gradient held, forward done, neither. `calls` is how many calls of the script it has completed with all ranks.
    """

    rank: int
    generation: int
    fresh: bool = False
    owned_version: int = -1
    owned: tuple[int, ...] = ()
    values_version: int = -1
    layers: tuple[int, int] = (0, 0)
    agreed: int = -1
    agreement: str = ""
    protected: tuple[int, int] = (0, -1)
    protected_before: tuple[int, int] = (0, -1)
    outlives: int = -1
    held: tuple[Leg, ...] = ()
    started: tuple[Leg, ...] = ()
    todo: tuple[Leg, ...] = ()
    calls: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Report:
        raw: dict[str, Any] = json.loads(text)
        for name in ("held", "started", "todo"):
            raw[name] = tuple(Leg(*span) for span in raw[name])
        for name in ("owned", "layers", "protected", "protected_before"):
            raw[name] = tuple(raw[name])
        return cls(**raw)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all members do to enter `layout.generation`.

    `version`: the state that all are brought to; None if it is the version at which the members switch (a join, a
    departure, a rebalance). `agreement`: the agreement of step version - 1, for owners that have still to carry it out.
    `moves`: the shards that ranks lack, and where each is read; those to own first, in the order of shards. `fresh`:
    ranks whose state is not used: they have none yet, or go back to an older version. The lowest other rank sends them
    the position of the job. `protected`: the newest version at which every shard can be read, -1 if it has not changed.
    `work`: the segments of the interrupted step that are still to run; `started`: those of them whose forward is done.
    `kept`: the segments whose gradients are held. `checkpoint`: the name of the checkpoint from which everything is
    read; empty if it is in memory. `leaving`: ranks that are in the layout before, and agree on the switch, but are not
    members after it. `lines`: which records count; the last fork is this plan's own if other bytes follow its version
    than before. `caller` sends the results of the script's calls to the ranks `behind`, which lack some; -1: to none.
    """

    layout: Layout
    version: int | None
    agreement: str = ""
    moves: tuple[Move, ...] = ()
    fresh: tuple[int, ...] = ()
    work: tuple[AssignedLeg, ...] = ()
    started: tuple[AssignedLeg, ...] = ()
    kept: tuple[AssignedLeg, ...] = ()
    protected: int = -1
    checkpoint: str = ""
    leaving: tuple[int, ...] = ()
    lines: Lines = ()
    caller: int = -1
    behind: tuple[int, ...] = ()

    @property
    def generation(self) -> int:
        return self.layout.generation

    def to_json(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:  # cached: every rank gets the same text
        raw = {item.name: getattr(self, item.name) for item in fields(self)}
        raw |= {"layout": self.layout.to_json(), "moves": to_runs(self.moves)}
        raw |= {name: legs_to_runs(raw[name]) for name in ("work", "started", "kept")}
        return json.dumps(raw, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        raw: dict[str, Any] = json.loads(text)
        return cls(
            layout=Layout.from_json(raw["layout"]),
            version=raw["version"],
            agreement=raw["agreement"],
            moves=from_runs(raw["moves"]),
            fresh=tuple(raw["fresh"]),
            work=legs_from_runs(raw["work"]),
            started=legs_from_runs(raw["started"]),
            kept=legs_from_runs(raw["kept"]),
            protected=raw["protected"],
            checkpoint=raw["checkpoint"],
            leaving=tuple(raw["leaving"]),
            lines=lines_of(raw["lines"]),
            caller=raw["caller"],
            behind=tuple(raw["behind"]),
        )

    @property
    def forks(self) -> bool:
        """Whether records of this plan's version that were written before it are of another line than those after."""
        return bool(self.lines) and self.lines[-1].generation == self.generation

    @property
    def lines_before(self) -> Lines:
        """Which records count for reading what the plan continues from."""
        return self.lines[:-1] if self.forks else self.lines

    @property
    def guide(self) -> int | None:
        """The rank that sends the position of the job to the fresh ones; None when all are fresh."""
        fresh = set(self.fresh)
        return next((rank for rank in self.layout.ranks if rank not in fresh), None)

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @cached_property
    def gained(self) -> tuple[Move, ...]:
        """The moves of shards to their owners."""
        return tuple(move for move in self.moves if move.what is What.OWN)

    @cached_property
    def values(self) -> tuple[Move, ...]:
        """The moves of values to the ranks that compute with them."""
        return tuple(move for move in self.moves if move.what is What.VALUE)

    @cached_property
    def receivers(self) -> tuple[int, ...]:
        """The ranks that lack values, ascending."""
        return tuple(sorted({rank for ranks in {move.to for move in self.values} for rank in ranks}))

    @cached_property
    def stand_ins(self) -> tuple[int, ...]:
        """The lost shards that are approximated from neighbouring layers' shards, ascending."""
        return tuple(sorted({move.shard for move in self.moves if SourceKind.NEIGHBORS in move.sources}))

    def standing_in(self, shards: Collection[int]) -> Plan:
        """The same plan, with `shards`, which are lost everywhere, approximated from neighbouring layers'."""
        return replace(self, moves=standing_in(self.moves, self.layout, shards)) if shards else self

    def with_calls(self, reports: Iterable[Report]) -> Plan:
        """The same plan, in which ranks without the newest of the script's calls get their results from one with them.

        A rank returns from a call only when all have entered it. So an interrupted one is either complete on some rank,
        and then its result is the one that counts, or it is made again by all. A fresh rank has what a guide sent it in
        an aborted generation; where the guide is dead, no other rank may have it.
        """
        counts = {r.rank: r.calls for r in reports if r.rank in self.layout.ranks}
        most = max(counts.values(), default=0)
        if not most:
            return self
        caller = min(rank for rank, count in counts.items() if count == most)
        guided = set(self.fresh) if caller == self.guide else set()  # they get them with the position of the job
        behind = [rank for rank in self.layout.ranks if counts.get(rank, 0) < most and rank not in guided]
        return replace(self, caller=caller, behind=tuple(behind)) if behind else self

    def moves_of(self, shards: Iterable[int], rank: int, what: What) -> tuple[Move, ...]:
        """The moves of `shards` that `rank` lacks, to own them or to back them up.

        A shard that no move names is read from where training protects it, or from the checkpoint.
        """
        named = {move.shard: move for move in received(self.moves, rank) if move.what is what}
        sources = SAVED if self.checkpoint else PROTECTED
        return tuple(named.get(shard) or Move(shard, (rank,), what, sources) for shard in shards)

    def describe(self) -> str:
        """The plan on one line."""
        return (
            f"generation {self.generation}: {self.layout.describe()}; version {self.version}, "
            f"{len(self.gained)} shards to restore, {len(self.work)} segments to run, {len(self.kept)} kept, "
            f"fresh {list(self.fresh)}, refreshed {list(self.receivers)}"
        )


class PlanError(ValueError):
    """The reports contradict each other: a bug of Everstep, never a user's mistake."""


def plan_start(layout: Layout) -> Plan:
    """The first plan: every rank has version 0 already, made from the seed."""
    return Plan(layout=layout, version=0, fresh=layout.ranks, work=layout.segments())


def plan_join(spec: ModelSpec, old: Layout, joiners: Collection[int], generation: int) -> Plan:
    """The plan by which `joiners` become members at a step boundary, without a pause in training."""
    return plan_switch(spec, old, change_layout(spec, old, {*old.ranks, *joiners}, generation))


def plan_leave(spec: ModelSpec, old: Layout, leavers: Collection[int], generation: int) -> Plan:
    """The plan by which `leavers` hand over and leave at a step boundary, without a pause in training.

    Raises LayoutError when no member would be left.
    """
    return plan_switch(spec, old, change_layout(spec, old, set(old.ranks) - set(leavers), generation))


def plan_switch(spec: ModelSpec, old: Layout, layout: Layout) -> Plan:
    """The plan by which the members go from `old` to `layout` at a step boundary, without a pause in training."""
    gained = [s.index for s in spec.shards if layout.owners[s.index] != old.owners[s.index]]
    valid = {rank: _layers(old.stage_of(rank)) for rank in layout.ranks if rank in old}
    return Plan(
        layout=layout,
        version=None,
        moves=(*own_moves(layout, gained), *value_moves(spec, layout, valid)),
        fresh=tuple(rank for rank in layout.ranks if rank not in old),
        work=layout.segments(),
        leaving=tuple(rank for rank in old.ranks if rank not in layout),
    )


def plan_recovery(
    spec: ModelSpec, old: Layout, reports: Sequence[Report], generation: int, known: tuple[int, str] = (-1, "")
) -> Plan:
    """The plan after a loss, from the reports of the live workers.

    `old` is the newest layout that any of them had entered. All are brought forward to the newest agreed version;
    gradients of its step that survivors hold are kept, and the other micro-batches go to the rank that had them, or, if
    that rank is dead, to the least loaded rank of the stage. `known` is the newest step that was known before to be
    agreed on, with its agreement: a survivor may have carried it out although no rank that passed the agreement is
    left. Raises PlanError when the reports contradict each other.
    """
    by_rank = {report.rank: report for report in reports}
    if len(by_rank) != len(reports):
        raise PlanError(f"two reports of one rank among those of {sorted(report.rank for report in reports)}")
    layout = change_layout(spec, old, by_rank, generation)
    agreed, agreement = max(((r.agreed, r.agreement) for r in reports if not r.fresh), default=known)
    if known[0] > agreed:
        agreed, agreement = known
    version = agreed + 1
    behind = [r.rank for r in reports if not r.fresh and r.owned_version not in (version - 1, version)]
    if behind:
        raise PlanError(f"ranks {behind} hold shards of other versions than {version - 1} and {version}")
    owned = {report.rank: frozenset(report.owned) for report in reports}
    gained = [s.index for s in spec.shards if s.index not in owned[layout.owners[s.index]]]
    current = [r for r in reports if not r.fresh and r.values_version == version]
    valid = {report.rank: range(*report.layers) for report in current}
    kept = _in_order(AssignedLeg(r.rank, *span) for r in current for span in r.held)
    work = _remaining_work(layout, kept, current)
    forwarded = {AssignedLeg(r.rank, *span) for r in current for span in r.started}
    return Plan(
        layout=layout,
        version=version,
        agreement=agreement,
        moves=(*own_moves(layout, gained), *value_moves(spec, layout, valid)),
        fresh=tuple(sorted(r.rank for r in reports if r.fresh)),
        work=work,
        started=tuple(segment for segment in work if segment in forwarded),
        kept=kept,
    )


def plan_rollback(
    spec: ModelSpec, old: Layout, live: Collection[int], generation: int, version: int, agreement: str
) -> Plan:
    """The plan by which all go back to `version`, at which every shard can be read, and compute again from there.

    `agreement` is that of step version - 1, empty for version 0. Nothing that a rank holds in its own memory is used.
    """
    layout = change_layout(spec, old, live, generation)
    return Plan(
        layout=layout,
        version=version,
        agreement=agreement,
        moves=(*own_moves(layout, range(len(spec.shards))), *value_moves(spec, layout, {})),
        fresh=layout.ranks,
        work=layout.segments(),
        protected=version,
    )


def plan_resume(spec: ModelSpec, layout: Layout, version: int, agreement: str, checkpoint: str) -> Plan:
    """The plan by which all resume from a checkpoint of `version`: the owner of every shard reads it from there."""
    return Plan(
        layout=layout,
        version=version,
        agreement=agreement,
        moves=(*own_moves(layout, range(len(spec.shards)), SAVED), *value_moves(spec, layout, {})),
        fresh=layout.ranks,
        work=layout.segments(),
        checkpoint=checkpoint,
    )


def _layers(stage: Stage) -> range:
    return range(stage.start, stage.stop)


def _remaining_work(layout: Layout, kept: Sequence[AssignedLeg], current: Sequence[Report]) -> tuple[AssignedLeg, ...]:
    claims = {span: r.rank for r in current for span in (*r.todo, *r.started)}
    if not kept and not claims:
        return layout.segments()
    held: dict[int, list[AssignedLeg]] = {}
    for segment in kept:
        held.setdefault(segment.micro_batch, []).append(segment)
    load = dict.fromkeys(layout.ranks, 0.0)
    work: list[AssignedLeg] = []
    orphans: list[tuple[Leg, Stage]] = []
    for stage in layout.stages:
        for micro_batch in range(layout.micro_batches):
            for start, stop in _gaps(stage, micro_batch, held.get(micro_batch, ())):
                span = Leg(micro_batch, start, stop)
                rank = claims.get(span)
                if rank in stage.ranks:
                    work.append(AssignedLeg(rank, *span))
                    load[rank] += stop - start
                else:
                    orphans.append((span, stage))
    for span, stage in orphans:
        rank = min(stage.ranks, key=lambda r: (load[r], r))
        work.append(AssignedLeg(rank, *span))
        load[rank] += span.stop - span.start
    return _in_order(work)


def _in_order(legs: Iterable[AssignedLeg]) -> tuple[AssignedLeg, ...]:
    """As `Layout.segments` has them: by stage, in which the micro-batches of a rank stand together."""
    return tuple(sorted(legs, key=lambda leg: (leg.start, leg.micro_batch)))


def _gaps(stage: Stage, micro_batch: int, kept: Iterable[AssignedLeg]) -> list[tuple[int, int]]:
    """The maximal ranges of the stage's layers in which no gradient of the micro-batch is held (in `kept`)."""
    spans = sorted((s.start, s.stop) for s in kept)
    for (_, left), (right, _) in itertools.pairwise(spans):
        if right < left:
            raise PlanError(f"the gradient of micro-batch {micro_batch} at layer {right} is held twice")
    gaps, at = [], stage.start
    for start, stop in spans:
        if stop <= stage.start or start >= stage.stop:
            continue
        if start > at:
            gaps.append((at, start))
        at = max(at, stop)
    if at < stage.stop:
        gaps.append((at, stage.stop))
    return gaps
