"""Numbers and texts in modules that a script changes during training, such as a dropout's `p` or a temperature.

A replacement runs the script from its beginning, so it lacks what the script has changed once, in a step or epoch that
is over. A rank that joins gets what the others have changed, and warns of what differs when its first forward begins:
then its script has had the chance to change the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from everstep.elastic.holding.stack import plain_name

PLAIN = frozenset({bool, int, float, str, type(None)})  # types of attributes
NAMED = 3  # in a warning
SENT = 100  # attributes
LONGEST = 200  # characters of a text


class ModuleAttributes:
    """The plain attributes of all modules of a model, since this object was made."""

    def __init__(self, model: nn.Module, warn: Callable[[str], None]) -> None:
        self._model = model
        self._warn = warn
        self._rooms = {
            f"{plain_name(path)}.{name}" if path else name: (vars(module), name)
            for path, module in model.named_modules()
            for name, value in vars(module).items()
            if type(value) in PLAIN
        }
        self._born = self._present()
        self._others: Mapping[str, Any] | None = None  # what the others had changed when this rank joined

    def _present(self) -> dict[str, Any]:
        return {name: room.get(attribute) for name, (room, attribute) in self._rooms.items()}

    def changed(self) -> dict[str, Any]:
        """Those that the script has changed so far. While a model evaluates, its modes are not looked at."""
        present = self._present()
        changed = {name: value for name, value in present.items() if not self._is_as_born(name, present)}
        changed = {name: value for name, value in changed.items() if _is_sent(value)}
        if not self._model.training:
            changed = {name: value for name, value in changed.items() if self._rooms[name][1] != "training"}
        return dict(list(changed.items())[:SENT])

    def join(self, others: Mapping[str, Any]) -> None:
        """This rank joins, and the others have changed these."""
        self._others = others

    def check(self) -> None:
        """A forward is over: warn, once, of what the others have changed, and this rank's script has not."""
        others, self._others = self._others, None
        if not others:
            return
        present = self._present()
        lacking = [name for name, value in others.items() if name in present and self._is_as_born(name, present)]
        if lacking:
            shown = [f"{name} is {present[name]!r} here and {others[name]!r} there" for name in lacking[:NAMED]]
            more = [f"{len(lacking) - NAMED} more"] if len(lacking) > NAMED else []
            self._warn(
                "the script has changed modules on the other ranks, and not on this replacement, which began later: "
                f"{', '.join(shown + more)}; results of forwards that use them differ. Set them in every step or "
                "epoch, by run.step or run.epoch, or from run.state"
            )

    def _is_as_born(self, name: str, present: Mapping[str, Any]) -> bool:
        return present[name] is self._born[name] or bool(present[name] == self._born[name])


def _is_sent(value: Any) -> bool:
    return type(value) in PLAIN and (not isinstance(value, str) or len(value) <= LONGEST)
