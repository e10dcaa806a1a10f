"""Golden transcripts: what happens to a coordinator, and what it answers, as readable text."""

from __future__ import annotations

from pathlib import Path

from everstep.elastic.protocol import coordinator, invariants
from everstep.elastic.protocol import events as e
from everstep.elastic.protocol.state import Config, State
from everstep.elastic.sim.run import model
from everstep.elastic.sim.transcript import brief, brief_plan
from everstep.resharding.plan import Report, Span

FOLDER = Path(__file__).parent / "transcripts"


class Script:
    """Feeds events to a coordinator and writes down both sides."""

    def __init__(self, *, workers: int = 2, stages: int = 1, **config: object) -> None:
        self.job = e.Job(steps=8, stages=stages, micro_batches=4, global_batch_size=4, model=model(4, False))
        self.state: State = coordinator.initial_state(Config(**config), 0.0)
        self.now = 0.0
        self.lines: list[str] = []
        self.workers = workers

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

    def ready(self, *workers: e.WorkerId) -> None:
        for worker in workers:
            self(e.WorkerReady(worker, {"at": str(worker)}, self.job))

    def committed(self, worker: e.WorkerId, step: int) -> None:
        self(e.WorkerCommitted(worker, step, f"a{step}"))

    def died(self, worker: e.WorkerId, step: int = 3) -> None:
        self(e.WorkerDied(worker, "killed by SIGKILL", step=step, phase="compute"))

    def reported(self, worker: e.WorkerId, *, held: int = 0, fresh: bool = False) -> None:
        """A survivor reports, from the step after the last that was agreed on.

        It holds the gradients of the first `held` of its micro-batches.
        """
        layout = self.state.layout
        assert layout is not None
        if fresh:
            report = Report(rank=worker.rank, generation=0, fresh=True)
        else:
            spans = [Span(*s[1:]) for s in layout.segments() if s.rank == worker.rank]
            stage = layout.stage_of(worker.rank)
            owned = tuple(shard for shard, owner in enumerate(layout.owners) if owner == worker.rank)
            report = Report(
                rank=worker.rank,
                generation=layout.generation,
                owned_version=self.state.agreed + 1,
                owned=owned,
                values_version=self.state.agreed + 1,
                layers=(stage.start, stage.stop),
                agreed=self.state.agreed,
                agreement=self.state.agreement,
                held=tuple(spans[:held]),
                todo=tuple(spans[held:]),
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


def start() -> Script:
    s = Script(workers=3, stages=2)
    s.node()
    s.elastic(w(0))
    s.ready(w(2), w(0), w(1))
    s.committed(w(0), 0)
    return s


def plain_loss() -> Script:
    s = Script(workers=3)
    s.train()
    s.died(w(1))
    s.reported(w(0), held=1)
    s.reported(w(2))
    s(e.WorkerResumed(w(0), 2, 0.01, 0.02))
    s.committed(w(0), 3)
    return s


def loss_during_recovery() -> Script:
    s = Script(workers=3, stages=3)
    s.train()
    s.died(w(1))
    s.reported(w(0), held=1)
    s.died(w(2))
    s.reported(w(0), held=1)
    return s


def ready_while_recovering() -> Script:
    s = Script(workers=3)
    s.train()
    s.died(w(1))
    s.reported(w(0))
    s.elastic(w(1, 1))
    s.ready(w(1, 1))
    s.reported(w(2))
    s.committed(w(0), 3)
    return s


def join() -> Script:
    s = plain_loss()
    s.lines = ["... until the others have recovered from the loss of rank 1"]
    s.ready(w(1, 1))
    s.committed(w(0), 4)
    s(e.WorkerSwitched(w(0), 3))
    s(e.WorkerSwitched(w(2), 3))
    return s


def joiner_dies() -> Script:
    s = plain_loss()
    s.lines = ["... until the others have recovered from the loss of rank 1"]
    s.ready(w(1, 1))
    s.died(w(1, 1))
    s.reported(w(0))
    s.reported(w(2))
    s.ready(w(1, 2))
    return s


def join_of_an_older_generation() -> Script:
    """A ready worker was sent a join plan; then a member dies, and the join is off."""
    s = plain_loss()
    s.lines = ["... until the others have recovered from the loss of rank 1"]
    s.ready(w(1, 1))
    s.died(w(2))
    s.reported(w(1, 1), fresh=True)
    s.ready(w(2, 1))
    s.reported(w(0))
    return s


def joiner_finishes_first() -> Script:
    s = plain_loss()
    s.lines = ["... until the others have recovered from the loss of rank 1"]
    s.committed(w(0), 6)
    s.ready(w(1, 1))
    s.committed(w(0), 7)
    s(e.WorkerFinished(w(1, 1)))
    s(e.WorkerSwitched(w(0), 3))
    s(e.WorkerFinished(w(0)))
    s(e.WorkerFinished(w(2)))
    return s


def all_dead() -> Script:
    s = Script(workers=2)
    s.train()
    s.died(w(0))
    s.died(w(1))
    s.ready(w(1, 1))
    s.ready(w(0, 1))
    return s


def all_dead_before_the_first_commit() -> Script:
    s = Script(workers=2)
    s.node()
    s.elastic(w(0))
    s.ready(w(0), w(1))
    s.died(w(1))
    s.died(w(0))
    s.ready(w(0, 1))
    s.ready(w(1, 1))
    return s


def user_exception() -> Script:
    s = Script(workers=2)
    s.train()
    s(e.WorkerRaised(w(1), "ValueError: negative loss", "Traceback ..."))
    s.died(w(1))
    return s


def classic_restarts() -> Script:
    s = Script(workers=2, max_restarts=1)
    s.node()
    s(e.WorkerDied(w(0), "exit status 3"))
    s(e.WorkerDied(w(1), "killed by SIGKILL"))
    s(e.WorkerDied(w(0, 1), "exit status 0", clean=True))
    s(e.WorkerDied(w(1, 1), "exit status 3"))
    return s


def classic_success() -> Script:
    s = Script(workers=2)
    s.node()
    s(e.WorkerDied(w(0), "exit status 0", clean=True))
    s(e.WorkerDied(w(1), "exit status 0", clean=True))
    return s


def too_few_nodes() -> Script:
    s = Script(min_nodes=2, max_nodes=3, join_timeout_s=30.0)
    s.node()
    for _ in range(2):
        s(e.HeartbeatReceived("n0"), 20.0)
        s(e.Ticked())
    return s


def node_lost() -> Script:
    s = Script(min_nodes=2, max_nodes=2)
    s.node("n0")
    s.node("n1")
    s(e.HeartbeatReceived("n0"), 4.0)
    s(e.Ticked(), 2.0)
    return s


def crash_loop() -> Script:
    s = Script(workers=2, crash_limit=3)
    s.train()
    s.died(w(1))
    s.reported(w(0))
    s.died(w(1, 1))
    s.died(w(1, 2))
    return s


def death_after_the_last_step() -> Script:
    """Rank 0 dies in what the user's function does after the last step: the job waits for its replacement."""
    s = Script(workers=2)
    s.train()
    s.committed(w(0), 7)
    s.died(w(0), step=8)
    s.reported(w(1))
    s(e.WorkerFinished(w(1)))
    s.ready(w(0, 1))
    s.reported(w(1))
    s(e.WorkerFinished(w(0, 1)))
    return s


SCRIPTS = (
    start,
    plain_loss,
    loss_during_recovery,
    ready_while_recovering,
    join,
    joiner_dies,
    join_of_an_older_generation,
    joiner_finishes_first,
    all_dead,
    all_dead_before_the_first_commit,
    user_exception,
    classic_restarts,
    classic_success,
    too_few_nodes,
    node_lost,
    crash_loop,
    death_after_the_last_step,
)


if __name__ == "__main__":  # writes them anew; read the difference before committing it
    FOLDER.mkdir(exist_ok=True)
    for script in SCRIPTS:
        (FOLDER / f"{script.__name__}.txt").write_text(script().text())
