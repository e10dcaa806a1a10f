"""Golden transcripts: a coordinator's events, and its effects, as readable text."""

from __future__ import annotations

from pathlib import Path

from everstep.elastic.protocol import events as e

from .golden_draining import SCRIPTS as DRAINING_SCRIPTS
from .golden_nodes import NODE_SCRIPTS
from .golden_relayout import SCRIPTS as RELAYOUT_SCRIPTS
from .script import Script, w

FOLDER = Path(__file__).parent / "transcripts"


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
    """A ready worker was sent a join plan; then a member dies, and the join is cancelled."""
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
        s(e.HeartbeatsReceived(("n0",)), 20.0)
        s(e.Ticked())
    return s


def node_lost() -> Script:
    s = Script(min_nodes=2, max_nodes=2)
    s.node("n0")
    s.node("n1")
    s(e.HeartbeatsReceived(("n0",)), 4.0)
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
    """Rank 0 dies in the user's function after the last step: the job waits for its replacement."""
    s = Script(workers=2)
    s.train()
    s.committed(w(0), 7)
    s.died(w(0), step=8)
    s.reported(w(1))
    s(e.WorkerFinished(w(1)))
    s.ready(w(0, 1))
    s.reported(w(1))
    s(e.WorkerResumed(w(1), 3, 0.01, 0.02))
    s(e.WorkerResumed(w(0, 1), 3, 0.01, 0.02))
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
    *NODE_SCRIPTS,
    *DRAINING_SCRIPTS,
    *RELAYOUT_SCRIPTS,
)


if __name__ == "__main__":  # writes them; read the difference before you commit it
    FOLDER.mkdir(exist_ok=True)
    for script in SCRIPTS:
        (FOLDER / f"{script.__name__}.txt").write_text(script().text())
