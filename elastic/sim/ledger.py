"""Checks of a simulated job while it runs, and which of the guarantees its faults leave in force."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.state import Phase, State
from everstep.elastic.protocol.terms import Terms
from everstep.resharding.neighbors import stand_ins
from everstep.resharding.plan import Plan

from .keeper import Keeper
from .values import Reference, ShardState, continued, made_up
from .worker import SimWorker


class Ledger:
    """Checks that agreements, plans and states are those of the undisturbed run.

    Once shards were approximated, the reference is the undisturbed run that continues from them.
    """

    def __init__(self, job: e.Job, expected: Reference, *, verified: bool) -> None:
        self._job = job
        self._verified = verified  # what a rank holds may be wrong until replicas are compared, before each agreement
        self._expected = expected
        self._last = job.steps
        self._plans: dict[int, str] = {}
        self._owners: dict[tuple[int, int], int] = {}  # generation, shard -> rank
        self._rollbacks: set[int] = set()  # generations
        self._made_up: Plan | None = None  # the plan that approximates shards, until all members have entered it
        self._entered: dict[int, ShardState] = {}  # what the members that have entered it own
        self._stand_ins: dict[tuple[int, int], set[ShardState]] = {}  # version, shard -> possible approximations
        self.substituted = 0  # number of approximated shards

    def ends_at(self, version: int) -> None:
        """The user's code leaves training at this version."""
        self._last = version

    def agreed(self, step: int, agreement: str) -> None:
        """A rank passed the agreement of a step, or reported that it did."""
        expected = Terms.of(self._expected.agreements[step])
        of_the_run = {name: getattr(expected, name) for name in ("generation", "protected", "every")}
        if replace(Terms.of(agreement), **of_the_run) != expected:
            raise AssertionError(f"step {step} was agreed with other bytes than in the undisturbed run")

    def told(self, state: State, effects: Sequence[e.Effect], *, broken: bool) -> None:
        """The coordinator made a decision: what it takes as agreed, and the generation it enters, must be expected."""
        if state.agreed >= 0:
            self.agreed(state.agreed, state.agreement)
        if state.rolled_back and state.rolled_back not in self._rollbacks:
            self._rollbacks.add(state.rolled_back)
            if self._job.protection == "replay" and not broken:
                raise AssertionError(f"generation {state.rolled_back} goes back, and backups have the newest version")
        for effect in effects:
            if isinstance(effect, e.CarryOut) and effect.plan.stand_ins:
                if not broken:
                    raise AssertionError(f"shards {effect.plan.stand_ins} are made up, and are not lost")
                self._makes_up(effect.plan)
            same = isinstance(effect, e.Record) and effect.fields.get("same", True)
            if isinstance(effect, e.Record) and not same and not self.substituted:
                raise AssertionError(f"a step came out differently when it was computed again: {effect.fields}")

    def _makes_up(self, plan: Plan) -> None:
        """Every lost shard may be approximated from its neighbours as they were."""
        if self._made_up == plan:
            return
        assert plan.version is not None
        self._made_up, self._entered = plan, {}
        before = self._expected.states[plan.version]
        for shard, neighbors in stand_ins(self._job.model, plan.stand_ins).items():
            state = made_up({neighbor: before[neighbor] for neighbor in neighbors})
            self._stand_ins.setdefault((plan.version, shard), set()).add(state)

    def entered(self, worker: e.WorkerId, plan: Plan, version: int) -> None:
        """A worker carried out a plan."""
        if self._plans.setdefault(plan.generation, plan.digest) != plan.digest:
            raise AssertionError(f"generation {plan.generation} has two plans")

    def went_back(self, worker: e.WorkerId, plan: Plan, since: int) -> None:
        """A worker discards what it holds of version `since`."""
        if plan.generation not in self._rollbacks:
            raise AssertionError(f"{worker} goes from {since} to {plan.version}, and nothing that others hold is lost")

    def owned(self, worker: e.WorkerId, generation: int, version: int, states: dict[int, ShardState]) -> None:
        """A worker owns shards in a generation, in these states."""
        for shard, state in states.items():
            if self._owners.setdefault((generation, shard), worker.rank) != worker.rank:
                raise AssertionError(f"shard {shard} has two owners in generation {generation}")
            may_be = {self._expected.states[version][shard]}
            if self._made_up is not None and self._made_up.generation == generation:
                self._entered[shard] = state
                if shard in self._made_up.stand_ins:
                    may_be |= self._stand_ins[version, shard]  # or, as it was, from the seed
            if state not in may_be and not self._verified:
                raise AssertionError(f"{worker} enters generation {generation} with {state} of shard {shard}")
        if len(self._entered) == len(self._expected.states[0]):
            self._go_on_from(version)

    def _go_on_from(self, version: int) -> None:
        """All shards are present again: the states expected from now on follow from them."""
        assert self._made_up is not None
        past = self._expected
        states = tuple(state for _, state in sorted(self._entered.items()))
        past = Reference(past.agreements[:version], (*past.states[:version], states))
        self._expected = continued(self._job.model, self._job.micro_batches, self._job.steps, past)
        self.substituted += len(self._made_up.stand_ins)
        self._made_up, self._entered = None, {}

    def ended(self, workers: list[SimWorker], *, went_back: bool) -> None:
        """The job succeeded: every shard is present, with the bytes of the undisturbed run.

        If it `went_back`, a worker that had finished may still be at its last step for the second time.
        """
        states = self._expected.states[self._last]
        for worker in workers:
            if not worker.finished or worker.version < self._last - went_back:
                raise AssertionError(f"{worker.id} ended at version {worker.version} of {self._last}")
            for shard in worker.owned if worker.version == self._last else ():
                state, expected = worker.shard_state(shard), states[shard]
                if state != expected:
                    raise AssertionError(f"shard {shard} ends as {state} on {worker.id}, undisturbed as {expected}")
        generations = {worker.layout.generation for worker in workers if worker.layout is not None}
        owned = sorted(shard for worker in workers for shard in worker.owned)
        if len(generations) == 1 and owned != list(range(len(states))):
            raise AssertionError(f"the shards owned at the end are {owned}")


class Promise:
    """Whether the faults so far are among those that a job must survive.

    It must survive the loss of any `losses` nodes at once, or of all nodes of a rack if there are others. The next loss
    may come once its newest version is whole everywhere. Where workers die too (`deaths`), it counts as whole only once
    the coordinator knows: all of them may die before they can report it.
    """

    def __init__(self, losses: int, *, replay: bool, rack_of: Callable[[str], str]) -> None:
        self._rack_of = rack_of
        self._spread = False  # whether the nodes that are there are in several racks
        self.deaths = False
        self.agreed_in = 0  # the newest generation in which a step was agreed on
        self._replay = replay
        self._allowed = losses
        self._lost: set[str] = set()  # since the job was last whole
        self._doomed: set[str] = set()  # about to be lost
        self.broken = False

    @property
    def left(self) -> int:
        """How many nodes may be lost now."""
        return max(0, self._allowed - len(self._lost))

    def doom(self, node: str) -> None:
        """A node will be lost very soon."""
        self._lost.add(node)
        self._doomed.add(node)

    def struck(self, node: str) -> None:
        """A node is lost, or may be."""
        self._lost.add(node)
        self._doomed.discard(node)
        self.broken = self.broken or (len(self._lost) > self._allowed and not self._is_a_rack(self._lost))

    def may_lose(self, nodes: set[str]) -> bool:
        """Whether all these may be lost now, as nodes of one rack."""
        return self._is_a_rack(self._lost | nodes)

    def _is_a_rack(self, nodes: set[str]) -> bool:
        racks = {self._rack_of(node) for node in nodes}
        return self._spread and len(racks) == 1 and "" not in racks

    def released(self, node: str, staying: int) -> None:
        """A node has handed over what it held; at least one node with members has to remain."""
        self._doomed.discard(node)
        self._allowed = min(self._allowed, staying - 1)

    def came_back(self, node: str) -> None:
        """A silent node is heard again, and was not declared lost."""
        if not self.broken:
            self._lost.discard(node)

    def look(self, state: State, keepers: Mapping[str, Keeper], doubtful: Collection[str]) -> None:
        """Check whether a version is whole. `doubtful` are nodes that are lost or silent."""
        placement, layout = state.placement, state.layout
        if placement is None or layout is None or state.phase is not Phase.RUNNING or doubtful & state.nodes.keys():
            return
        there = {state.workers[rank].node for rank in layout.ranks}
        placement = state.placements.get(layout.generation, placement) if self._replay else placement
        if self._replay:  # backups hold all of a version before its step is agreed on
            if placement.generation == layout.generation == self.agreed_in:
                self._whole(placement.losses, there)
            return
        holders = {node for stripe in placement.stripes for node in (*stripe.nodes, *stripe.parity)}
        complete = [keepers[node].versions.complete for node in holders]
        current = placement.generation == layout.generation and bool(holders or not placement.losses)
        whole = min((version for _, version in complete), default=0)
        known = whole <= state.protected or not (self.deaths and holders)
        if current and whole >= 0 and known and all(generation == layout.generation for generation, _ in complete):
            self._whole(placement.losses, there)

    def _whole(self, losses: int, there: set[str]) -> None:
        """From now on so many of the nodes that are there may be lost."""
        self._lost, self._allowed = set(self._doomed), losses
        self._spread = len({self._rack_of(node) or node for node in there}) > 1
