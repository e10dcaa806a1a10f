"""Recovery: from an aborted generation to one version on all ranks again, inside the step.

The survivor reports what it has; the coordinator's plan says what everybody does; carrying it out is the same code
for a loss, for a rank that joins, and for the start.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..checkpointing.keeper import KeeperClient
from ..checkpointing.record import read_record
from ..comms.communicator import Aborted, Key, Kind
from ..resharding.plan import Gain, Plan, Report, Span
from .engine import Engine
from .errors import UsageError
from .membership import Orders
from .progress import Phase
from .steps import StepState

KEEPER_PATIENCE_S = 5.0  # how long shards that no keeper has are waited for: one may be starting again
SHARDS_PER_FETCH = 16
_GUIDE = Key(Kind.SWITCH, 0)
Fetched = tuple[int, list[bytes]]  # version, [state] or [state, gradient that leads to the next]


class LostShards(UsageError):
    """No keeper holds what a plan needs: more was lost than is protected."""


class Recovery:
    """Reports, and carries out plans, for one engine."""

    def __init__(self, engine: Engine, token: str, fresh: bool) -> None:
        self.engine = engine
        self.token = token
        self.fresh = fresh  # has nothing of the job yet
        self.on_orders: Callable[[tuple[str, ...]], None] = lambda keepers: None

    def recover(self) -> None:
        """After `Aborted`: report, wait for the plan, carry it out; start again if it happens again."""
        engine = self.engine
        engine.progress.mark(Phase.RECOVER, engine.version)
        engine.switch = None
        while True:
            engine.membership.report(self.make_report)
            try:
                self.carry_out(engine.membership.orders(engine.progress.tick))
            except Aborted:
                continue
            return

    def enter(self) -> None:
        """A new worker: wait for the first plan that has a place for it, and carry it out."""
        engine = self.engine
        try:
            self.carry_out(engine.membership.orders(engine.progress.tick))
        except Aborted:
            self.recover()

    def make_report(self, generation: int) -> Report:
        """What this worker has."""
        engine = self.engine
        if self.fresh or engine.layout is None or engine.state is None:
            return Report(rank=engine.rank, generation=0, fresh=True)
        state = engine.state
        valid = engine.values_version == state.step
        return Report(
            rank=engine.rank,
            generation=engine.layout.generation,
            owned_version=engine.owned_version,
            owned=tuple(sorted(engine.owned)),
            values_version=engine.values_version,
            layers=(engine.stack.held.start, engine.stack.held.stop),
            agreed=engine.agreed,
            agreement=engine.agreement,
            held=tuple(sorted(state.held)) if valid else (),
            started=tuple(sorted(state.started)) if valid else (),
            todo=tuple(state.todo) if valid else (),
        )

    # ------------------------------------------------------------ carrying out a plan

    def carry_out(self, orders: Orders) -> None:
        """Enter the plan's generation with everything it asks for in place."""
        engine, plan = self.engine, orders.plan
        started = time.monotonic()
        self.on_orders(orders.keepers)
        engine.comm.edit(plan.generation, orders.peers)
        if engine.membership.superseded(plan.generation):  # an abort that the edit may have cleared
            raise Aborted(plan.generation)
        edited = time.monotonic()
        engine.snapshots.wait(engine.progress.tick)
        engine.pipeline.end_step()
        fresh = self.fresh
        version, agreement = self._find_place(plan)
        engine.progress.mark(Phase.JOIN if fresh else Phase.RESTORE, version)
        if not fresh and engine.owned_version == version - 1:
            engine.update(agreement)
        was_current = not fresh and engine.values_version == version
        self._take_places(plan, version)
        self._restore(plan, orders.keepers, version, agreement)
        if engine.rank in plan.refresh:
            engine.values_version = -1
        engine.exchange.publish(version, plan.layout, plan.refresh)
        self._settle(plan, version, agreement, was_current)
        self.fresh = False
        if plan.generation > 1:
            kind = "switched" if plan.version is None and not fresh else "resumed"
            times = {"edit_s": edited - started, "restore_s": time.monotonic() - edited}
            engine.membership.tell(kind, generation=plan.generation, **times)

    def _find_place(self, plan: Plan) -> tuple[int, str]:
        """The version the plan brings us to, and what was agreed in the step before it."""
        engine = self.engine
        if self.fresh and plan.guide is not None:
            message = json.loads(bytes(engine.comm.receive(plan.guide, _GUIDE)))
            return message["version"], message["agreement"]
        version = engine.version if plan.version is None else plan.version
        agreement = plan.agreement or engine.agreement
        if engine.rank == plan.guide:
            message = json.dumps({"version": version, "agreement": agreement}).encode()
            for rank in plan.fresh:
                engine.comm.send(rank, _GUIDE, [message])
        return version, agreement

    def _take_places(self, plan: Plan, version: int) -> None:
        """Hold the layers and own the shards of the plan; what is gained has no values yet."""
        engine, layout = self.engine, plan.layout
        stage = layout.stage_of(engine.rank)
        if (engine.stack.held.start, engine.stack.held.stop) != (stage.start, stage.stop):
            engine.values_version = engine.values_version if version == 0 else -1
            engine.stack.hold(stage.start, stage.stop, free=version > 0)
        shards = [s for s in engine.stack.spec.shards if layout.owners[s.index] == engine.rank]
        gained = {gain.shard for gain in plan.gains if gain.rank == engine.rank}
        kept = {s.index for s in shards} - gained if not self.fresh else set()
        engine.snapshots.leave({s.index for s in engine.optimizer.owned} - {s.index for s in shards})
        engine.optimizer.own(shards)
        engine.owned = kept if version > 0 else {s.index for s in shards}
        engine.owned_version = version

    def _restore(self, plan: Plan, keepers: Sequence[str], version: int, agreement: str) -> None:
        """Fetch the gained shards from the keepers, replaying the last step where only its gradient is there."""
        engine = self.engine
        missing = [s.index for s in engine.optimizer.owned if s.index not in engine.owned]
        if not missing:
            return
        found = self._fetch_all(plan, missing, keepers, version)
        terms = json.loads(agreement)
        replays: dict[int, torch.Tensor] = {}
        for index, (held, blobs) in found.items():
            engine.optimizer.load(index, read_record(blobs[0]))
            if held < version:
                dtype = engine.exchange.accumulation(engine.stack.spec.shards[index])
                replays[index] = torch.frombuffer(bytearray(blobs[1]), dtype=dtype)
        if replays:
            engine.optimizer.update(replays, terms["groups"], terms["scale"])
        engine.owned.update(found)

    def _fetch_all(self, plan: Plan, missing: list[int], keepers: Sequence[str], version: int) -> dict[int, Fetched]:
        """All the missing shards from whichever keepers have them; a keeper that restarts is waited for.

        Raises LostShards when some are in none, and Aborted when the generation ends meanwhile.
        """
        engine = self.engine
        deadline = time.monotonic() + KEEPER_PATIENCE_S
        found: dict[int, Fetched] = {}
        while True:
            for address in keepers:
                absent = [index for index in missing if index not in found]
                for first in range(0, len(absent), SHARDS_PER_FETCH):
                    group = absent[first : first + SHARDS_PER_FETCH]
                    found.update(fetch(address, self.token, group, version, replay=True))
                    engine.progress.tick()
                    engine.comm.ready(())  # raises Aborted
            if len(found) == len(missing):
                return found
            if time.monotonic() > deadline:
                lost = [gain for gain in plan.gains if gain.rank == engine.rank and gain.shard not in found]
                raise LostShards(describe_lost(lost, version, keepers))
            time.sleep(0.02)

    def _settle(self, plan: Plan, version: int, agreement: str, was_current: bool) -> None:
        """Everything is at `version`: go on with its step."""
        engine = self.engine
        fresh = self.fresh
        engine.layout = plan.layout
        engine.values_version = version
        terms: dict[str, Any] = json.loads(agreement) if agreement else {}
        if fresh:
            engine.version = version
            engine.agreed, engine.agreement = version - 1, agreement
            self._catch_up(terms)
            if terms:  # all who committed the step may have died before they could say so
                engine.tell_committed(terms, agreement)
        if was_current and engine.state is not None and plan.version is not None:
            engine.protect()
            engine.pipeline.extend_step()
            engine.state.resume(plan.work, plan.kept, plan.started)
            engine.pipeline.resend(engine.state, {Span(*s[1:]) for s in plan.started})
            return
        if not fresh and engine.version == version - 1:
            engine.agreed, engine.agreement = version - 1, agreement
            engine.commit(agreement)
        else:
            engine.protect()
        engine.state = StepState.begin(version, engine.rank, engine.settings.micro_batches, plan.work)
        engine.state.kept = plan.kept
        engine.pipeline.begin_step()

    def _catch_up(self, terms: dict[str, Any]) -> None:
        """Bring a new worker's registered objects (the scheduler) to where the others' are."""
        engine = self.engine
        if terms:
            engine.optimizer.set_hyper_parameters(terms["groups"])
        for name, state in terms.get("registered", {}).items():
            if name in engine.registered:
                engine.registered[name].load_state_dict(state)
        if terms:
            for advance in engine.on_commit:
                advance()


def fetch(address: str, token: str, shards: list[int], version: int, *, replay: bool) -> dict[int, Fetched]:
    """Shards from one keeper; none if it cannot be reached or goes away."""
    try:
        client = KeeperClient(address, token)
    except OSError:
        return {}
    try:
        return client.fetch(shards, version, replay)
    except (OSError, ValueError):
        return {}
    finally:
        client.close()


def describe_lost(lost: list[Gain], version: int, keepers: Sequence[str]) -> str:
    """Which shards are gone, and who had them."""
    ranks = sorted({gain.before for gain in lost})
    shards = ", ".join(str(gain.shard) for gain in lost[:8]) + ("..." if len(lost) > 8 else "")
    return (
        f"{len(lost)} shards ({shards}) of version {version} are gone: rank(s) {ranks} owned them and none of the "
        f"{len(keepers)} reachable snapshot keepers holds them"
    )
