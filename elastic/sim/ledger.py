"""What happens in a simulated job, checked as it happens, and what the faults leave of the promise."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence

from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.state import Phase, State
from everstep.resharding.plan import Plan

from .keeper import Keeper
from .values import Reference, ShardState
from .worker import SimWorker


class Ledger:
    """The same agreements, plans and states as in the undisturbed run."""

    def __init__(self, job: e.Job, expected: Reference) -> None:
        self._job = job
        self._expected = [json.loads(agreement) for agreement in expected.agreements]
        self._states = expected.states
        self._last = job.steps
        self._plans: dict[int, str] = {}
        self._owners: dict[tuple[int, int], int] = {}  # generation, shard -> rank

    def ends_at(self, version: int, expected: Reference) -> None:
        """Training is left at this version."""
        self._last, self._states = version, expected.states

    def agreed(self, step: int, agreement: str) -> None:
        """A step was agreed on, or is said to have been."""
        terms = json.loads(agreement)
        if any(terms[name] != value for name, value in self._expected[step].items()):
            raise AssertionError(f"step {step} was agreed with other bytes than in the undisturbed run")

    def told(self, state: State, effects: Sequence[e.Effect]) -> None:
        """The coordinator decided something: what it holds for agreed, and what it enters, is what was expected."""
        if state.agreed >= 0:
            self.agreed(state.agreed, state.agreement)
        for effect in effects:
            if isinstance(effect, e.Record) and not effect.fields.get("same", True):
                raise AssertionError(f"a step came out differently when it was computed again: {effect.fields}")

    def entered(self, worker: e.WorkerId, plan: Plan, version: int) -> None:
        """A worker carried out a plan."""
        if self._plans.setdefault(plan.generation, plan.digest) != plan.digest:
            raise AssertionError(f"generation {plan.generation} has two plans")

    def owned(self, worker: e.WorkerId, generation: int, version: int, states: dict[int, ShardState]) -> None:
        """A worker owns shards in a generation, in these states."""
        for shard in states:
            if self._owners.setdefault((generation, shard), worker.rank) != worker.rank:
                raise AssertionError(f"shard {shard} has two owners in generation {generation}")

    def ended(self, workers: list[SimWorker], *, went_back: bool) -> None:
        """The job succeeded: every shard is there, with the bytes of the undisturbed run.

        If it `went_back`, one that had finished may still be at its last step for the second time.
        """
        for worker in workers:
            if not worker.finished or worker.version < self._last - went_back:
                raise AssertionError(f"{worker.id} ended at version {worker.version} of {self._last}")
            for shard in worker.owned if worker.version == self._last else ():
                state, expected = worker.shard_state(shard), self._states[shard]
                if state != expected:
                    raise AssertionError(f"shard {shard} ends as {state} on {worker.id}, undisturbed as {expected}")
        generations = {worker.layout.generation for worker in workers if worker.layout is not None}
        owned = sorted(shard for worker in workers for shard in worker.owned)
        if len(generations) == 1 and owned != list(range(len(self._states))):
            raise AssertionError(f"the shards owned at the end are {owned}")


class Promise:
    """Whether the faults so far are among those that a job must survive.

    It must survive the loss of any `losses` nodes at once, and again once its newest version is whole again everywhere.
    Where workers die too (`deaths`), it counts as whole only when the coordinator has heard so: they may all be dead
    before they can say it.
    """

    def __init__(self, losses: int) -> None:
        self.deaths = False
        self._allowed = losses
        self._lost: set[str] = set()  # since the job was whole
        self._doomed: set[str] = set()  # about to be
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
        self.broken = self.broken or len(self._lost) > self._allowed

    def released(self, node: str, staying: int) -> None:
        """A node has handed over what it held; of those that have members, one has to be left."""
        self._doomed.discard(node)
        self._allowed = min(self._allowed, staying - 1)

    def came_back(self, node: str) -> None:
        """A node that was silent is heard again, and was not declared lost."""
        if not self.broken:
            self._lost.discard(node)

    def look(self, state: State, keepers: Mapping[str, Keeper], doubtful: Collection[str]) -> None:
        """See whether a version is whole. `doubtful` are nodes that are lost or silent."""
        placement, layout = state.placement, state.layout
        if placement is None or layout is None or state.phase is not Phase.RUNNING or doubtful & state.nodes.keys():
            return
        holders = {node for stripe in placement.stripes for node in (*stripe.nodes, *stripe.parity)}
        complete = [keepers[node].complete for node in holders]
        current = placement.generation == layout.generation and bool(holders or not placement.losses)
        whole = min((version for _, version in complete), default=0)
        known = whole <= state.protected or not (self.deaths and holders)
        if current and whole >= 0 and known and all(generation == layout.generation for generation, _ in complete):
            self._lost = set(self._doomed)
            self._allowed = placement.losses
