"""Actions that wait for other ranks. When the generation ends meanwhile, this rank recovers and continues."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from everstep.comms.mesh.communicator import Aborted
from everstep.elastic.contract.errors import UsageError
from everstep.elastic.engine.engine import Engine
from everstep.elastic.engine.recovery import Recovery
from everstep.elastic.protocol import events as e

from .calls import Calls


class Interruptible:
    """Carries out a rank's part in training, from the user's calls to the end, through recoveries."""

    def __init__(self, engine: Engine, recovery: Recovery) -> None:
        self._engine = engine
        self._recovery = recovery
        self._membership = engine.membership
        self._progress = engine.progress
        self._refused: UsageError | None = None

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Remember what the runtime refuses meanwhile: a script that catches the error must not go on."""
        try:
            yield
        except UsageError as error:
            self._refused = error
            raise

    def check(self) -> None:
        """Raise again what the script has caught, such as by `except Exception: continue` around its turn."""
        if self._refused is not None:
            raise self._refused

    def do(self, action: Callable[..., None], *arguments: Any) -> None:
        """Do something that waits for others; if the generation ends, recover instead."""
        try:
            action(*arguments)
        except Aborted:
            self.interrupted()

    def until_done(self, action: Callable[[], None]) -> None:
        """Do something that waits for others; after a recovery again, until it is done."""
        while True:
            try:
                return action()
            except Aborted:
                self.interrupted()

    def interrupted(self) -> None:
        """After `Aborted`: recover; or, if no rank trains any further, save the last version and wait for the end."""
        while self._membership.conclusion is not None:
            self._conclude()
            if self._membership.wait_for_end(self._progress.tick):
                raise AssertionError("training is over, and this rank is in the midst of it")
        self._recovery.recover()

    def switch(self) -> None:
        """Enter the generation of a join or leave that all ranks agreed on."""
        self.do(self._recovery.switch)

    def _conclude(self) -> None:
        """Save this rank's part of the last version, if that is due."""
        conclusion = self._membership.take_conclusion()
        if conclusion is None:
            return
        try:
            why = self._engine.save_last(conclusion.version, conclusion.name, self._wait_at_end)
        except Aborted:
            self._recovery.recover()
        else:
            self._membership.tell(e.WorkerConcluded(self._membership.worker, conclusion.name, why))

    def _wait_at_end(self) -> None:
        self._progress.tick()
        if self._membership.interrupted():
            raise Aborted(self._engine.comm.generation)

    def finish(self, calls: Calls) -> None:
        """The user's function is over: help the others until they are there too, and training is over."""
        engine = self._engine
        calls.make_due()
        engine.leave_loop()
        self.until_whole()
        self._membership.tell(e.WorkerFinished(self._membership.worker, engine.version, engine.last_name()))
        while not self._wait_for_end(calls):
            if self._membership.conclusion is not None:
                self._conclude()
            else:
                self.interrupted()
            while not engine.ended():
                self.compute_again()
        self._progress.after_training(engine.version)

    def reach(self, version: int) -> None:
        """In `run.steps`: compute again what a recovery has taken back of the steps before `version`."""
        while not self._engine.loops and self._engine.version < version:
            self.compute_again()
            self._progress.leave()

    def until_whole(self) -> None:
        """Past the last step: return when its version is whole on this rank, and no other generation is due."""
        engine = self._engine
        while True:
            if engine.switch is not None:
                engine.user_loop.end_turn()  # who joins now has not seen the last step, and need not
                self.switch()
            elif not engine.ended():
                self.compute_again()
            else:
                self.do(engine.conclude)
                if engine.ended() and engine.switch is None:
                    return

    def compute_again(self) -> None:
        """More was lost than the last version outlived: it is computed again."""
        if self._engine.loops:
            raise UsageError(
                "the last steps were lost with a node after the training loop had ended: only the loop "
                "can compute them again; use run.steps(...), or protect every step (snapshot_every=1)"
            )
        large = self._engine.large
        large.interrupt()
        large.pass_by(self._engine.version)
        self.do(self._engine.run_step)
        large.pass_by(self._engine.version)

    def _wait_for_end(self, calls: Calls) -> bool:
        def on_wait() -> None:
            self._progress.tick()
            calls.answer_late()

        calls.announce_end()
        with self._progress.waiting("the other ranks, whose training function has not returned"):
            return self._membership.wait_for_end(on_wait)
