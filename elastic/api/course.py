"""What both loops do between steps: the script sees each committed step once, and its calls have their places."""

from __future__ import annotations

from collections.abc import Callable

from everstep.elastic.engine.call_log import Place
from everstep.elastic.engine.engine import Engine, Step

from .calls import AFTER, Calls


class Course:
    """The course of the user's loop on one rank. `begin` is called when it begins."""

    def __init__(
        self, engine: Engine, calls: Calls, functions: list[Callable[[Step], None]], begin: Callable[[], None]
    ) -> None:
        self._engine = engine
        self._calls = calls
        self._functions = functions
        self.begin = begin

    def show(self) -> Step:
        """The next step that the script has not seen, after its functions have had it."""
        engine = self._engine
        engine.progress.leave()
        step = engine.turn = engine.results.pop(0)
        self._calls.at(Place(f"after step {step.index}", until=step.index + 1))
        for function in self._functions:
            function(step)
        return step

    def go_on(self) -> None:
        """The script has done what it does between two steps, and asks for the next one."""
        self._engine.turn = None
        self._calls.away()

    def stops(self) -> bool:
        """Whether a script has asked for the end, and all ranks agreed on it: then the user's loop ends."""
        engine = self._engine
        if engine.results or not engine.stop_request.agreed(engine.agreement):
            return False
        self.end()
        return True

    def end(self) -> None:
        """The loop is over: the code behind it runs."""
        self._engine.progress.leave()
        self._calls.at(AFTER)
