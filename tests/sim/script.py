"""A coordinator that receives the events of a script, and its answers as readable text."""

from __future__ import annotations

from everstep.elastic.protocol import coordinator, invariants
from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.state import Config, State
from everstep.elastic.sim.run import model
from everstep.elastic.sim.transcript import brief, brief_plan
from everstep.resharding.plan import Report
from everstep.resharding.work import Leg


class Script:
    """Sends events to a coordinator and records both sides."""

    def __init__(self, *, workers: int = 2, stages: int = 1, losses: int = 1, **config: object) -> None:
        self.job = e.Job(
            steps=8,
            stages=stages,
            micro_batches=4,
            global_batch_size=4,
            model=model(4, False),
            node_losses=losses,
        )
        self.state: State = coordinator.initial_state(Config(**config), 0.0)
        self.now = 0.0
        self.lines: list[str] = []
        self.workers = workers
        self.protected = -1  # the protected version, as agreed by the members
        self.whole: dict[str, tuple[int, int]] = {}  # node -> what its keeper holds: generation, version

    def __call__(self, event: e.Event, after_s: float = 0.1) -> list[e.Effect]:
        self.now += after_s
        before = self.state
        self.state, effects = coordinator.step(before, event, self.now)
        invariants.check_step(before, self.state, effects)
        self.lines.append(f"> {brief(event)}")
        self.lines += [f"  {brief(effect)}" for effect in effects]
        plans = {x.plan.generation: x.plan for x in effects if isinstance(x, e.CarryOut)}
        self.lines += [f"    plan {brief_plan(plan)}" for plan in plans.values()]
        self.lines.append(f"  = {self.state.phase.value}, generation {self.state.generation}")
        return effects

    def node(self, name: str = "n0", slots: int | None = None) -> None:
        self(e.NodeJoined(name, f"host-{name}", self.workers if slots is None else slots, f"{name}:1"))

    def elastic(self, *workers: e.WorkerId) -> None:
        for worker in workers:
            self(e.WorkerDeclaredElastic(worker))

    def ready(self, *workers: e.WorkerId) -> list[e.Effect]:
        """Returns what followed."""
        return [x for worker in workers for x in self(e.WorkerReady(worker, {"at": str(worker)}, self.job))]

    def committed(self, worker: e.WorkerId, step: int) -> None:
        assert self.state.layout is not None
        generation = self.state.layout.generation
        self(e.WorkerCommitted(worker, step, f"a{step}", generation=generation, protected=self.protected))

    def died(self, worker: e.WorkerId, step: int = 3) -> None:
        self(e.WorkerDied(worker, "killed by SIGKILL", step=step, phase="compute"))

    def reported(self, worker: e.WorkerId, *, held: int = 0, fresh: bool = False, agreed: int | None = None) -> None:
        """A survivor reports, from the step after the last that was `agreed`.

        It holds the gradients of the first `held` of its micro-batches.
        """
        agreed = self.state.agreed if agreed is None else agreed
        layout = self.state.layout
        assert layout is not None
        if fresh:
            report = Report(rank=worker.rank, generation=0, fresh=True)
        else:
            spans = [Leg(*s[1:]) for s in layout.segments() if s.rank == worker.rank]
            stage = layout.stage_of(worker.rank)
            owned = tuple(shard for shard, owner in enumerate(layout.owners) if owner == worker.rank)
            report = Report(
                rank=worker.rank,
                generation=layout.generation,
                owned_version=agreed + 1,
                owned=owned,
                values_version=agreed + 1,
                layers=(stage.start, stage.stop),
                agreed=agreed,
                agreement=f"a{agreed}" if agreed >= 0 else "",
                protected=self.whole.get(self.state.workers[worker.rank].node, (0, -1)),
                outlives=self.protected,
                held=tuple(spans[:held]),
                todo=tuple(spans[held:]),
            )
        self(e.WorkerReported(worker, self.state.generation, report))

    def late(self, worker: e.WorkerId, *, agreed: int, generation: int) -> None:
        """A survivor reports that did not carry out the last plan: it is still in an older generation."""
        report = Report(
            rank=worker.rank,
            generation=generation,
            owned_version=agreed + 1,
            values_version=agreed + 1,
            layers=(0, 4),
            agreed=agreed,
            agreement=f"a{agreed}",
            outlives=self.protected,
        )
        self(e.WorkerReported(worker, self.state.generation, report))

    def train(self) -> None:
        """From nothing to step 3."""
        self.node()
        first = [e.WorkerId(rank, 0) for rank in range(self.workers)]
        self.elastic(first[0])
        self.ready(*first)
        self.committed(first[0], 2)
        self.lines = ["... until step 2 is committed"]

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


def w(rank: int, incarnation: int = 0) -> e.WorkerId:
    return e.WorkerId(rank, incarnation)
