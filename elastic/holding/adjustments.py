"""What the user's code may change between steps: the groups' settings, which parameters are frozen, clipping.

That code runs at a different time on each rank, and not at all on a rank without a micro-batch in a step. So a change
is a difference from the last agreement, and every step agrees on all changes: a change on any rank applies to all, and
two contradicting ones are an error. A step that is computed again uses the values that were agreed then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from everstep.elastic.contract.errors import UsageError

from .hyperparameters import (
    pack,
    same,
    settings_of,
    unpack,
)
from .stack import LayerStack
from .user_optimizer import UserOptimizer

Key = tuple[Any, ...]  # ("group", number, setting) | ("frozen", parameter): True | ("clip", "norm" or "value")
Values = dict[Key, Any]
NAMES = ("groups", "frozen", "clip")  # the parts of an agreement that concern settings


class Adjustments:
    """The settings in force on one rank, the agreed ones, and those of steps that may have to be computed again."""

    def __init__(self, optimizer: UserOptimizer, stack: LayerStack) -> None:
        self.clip: dict[str, float | None] = {"norm": None, "value": None}
        self._optimizer = optimizer
        self._tensors: dict[str, list[Tensor]] = {}  # of a trained parameter: one per layer that holds it
        for layer in stack.layers:
            for held in layer.parameters:
                if held.rule is None:
                    self._tensors.setdefault(stack.spec.parameters[held.index].name, []).append(held.tensor)
        self._untrained = [(name, p) for name, p in stack.model.named_parameters() if not p.requires_grad]
        self._members = self._members_now()
        self._agreed = self.present()
        self._known: dict[int, dict[str, Any]] = {}  # step -> the agreement of that step
        # When this rank joined: its code sets values before the loop that are long outdated.
        self._entered: Values | None = None
        self._noticed: tuple[int, Values | None] = (-1, None)  # step -> changes in its last micro-batch here

    def _members_now(self) -> list[list[int]]:
        return [[id(parameter) for parameter in group["params"]] for group in self._optimizer.user.param_groups]

    # ------------------------------------------------------------ here

    def present(self) -> Values:
        """The values in force here."""
        values: Values = {
            ("group", number, name): value
            for number, group in enumerate(self._optimizer.user.param_groups)
            for name, value in settings_of(group).items()
        }
        values.update((("frozen", name), True) for name, held in self._tensors.items() if not held[0].requires_grad)
        values.update((("clip", kind), limit) for kind, limit in self.clip.items())
        return values

    def terms(self, values: Values | None = None) -> dict[str, Any]:
        """Values (by default those in force) in the form of an agreement."""
        values = self.present() if values is None else values
        groups: list[dict[str, Any]] = [{} for _ in self._optimizer.user.param_groups]
        for key, value in values.items():
            if key[0] == "group":
                groups[key[1]][key[2]] = value
        frozen = sorted(name for kind, name, *_ in values if kind == "frozen" and values[(kind, name)])
        return {"groups": pack(groups), "frozen": frozen, "clip": {kind: values[("clip", kind)] for kind in self.clip}}

    def set(self, terms: Mapping[str, Any]) -> None:
        """Put the values of an agreement in force here."""
        self._optimizer.set_hyper_parameters(unpack(terms["groups"]))
        frozen = set(terms.get("frozen", ()))
        for name, tensors in self._tensors.items():
            if tensors[0].requires_grad == (name in frozen):
                self._apply({("frozen", name): name in frozen})
        self.clip.update(terms.get("clip", {}))

    def _apply(self, values: Values) -> None:
        groups: list[dict[str, Any]] = [{} for _ in self._optimizer.user.param_groups]
        for (kind, of, *name), value in values.items():
            if kind == "group":
                groups[of][name[0]] = value
            elif kind == "clip":
                self.clip[of] = value
            else:
                for tensor in self._tensors[of]:
                    tensor.requires_grad_(not value)
        self._optimizer.set_hyper_parameters(groups)

    def changed(self) -> bool:
        """Whether the user's code has made changes since the last agreement."""
        return bool(self._changes())

    def _changes(self) -> Values:
        if self._members_now() != self._members:
            raise UsageError(
                "a parameter group was added to, or changed in, the optimizer after run.prepare or run.steps: what is "
                "trained is laid out there. Put the parameters into a group before, freeze them after it "
                "(requires_grad_(False)), and unfreeze them when their time comes; rates may be changed at any time"
            )
        for name, parameter in self._untrained:
            if parameter.requires_grad:
                raise UsageError(
                    f"parameter {name!r} was frozen at run.prepare or run.steps, and has requires_grad=True now: what "
                    "is trained is laid out there. Freeze it after that call instead of before; then it can be "
                    "unfrozen at any step"
                )
        return self._other_than(self._agreed)

    def _other_than(self, values: Values) -> Values:
        present = self.present()
        found = {key: now for key, now in present.items() if key not in values or not same(values[key], now)}
        found.update((key, False) for key in values if key[0] == "frozen" and key not in present)
        return found

    # ------------------------------------------------------------ the user's code

    def begin(self) -> list[str]:
        """The loop begins: settings made before it on a joining rank belong to the start. Returns what those were."""
        entered, self._entered = self._entered, None
        if entered is None:
            return []
        undone = [key for key in self._other_than(entered) if key in entered or key[0] == "frozen"]
        self._apply({key: entered.get(key, False) for key in undone})
        return [_name(key) for key in undone]

    def notice(self, step: int) -> None:
        """A micro-batch of the user's loop is done: all of a step's micro-batches have to set the same values."""
        changes, (known_step, before) = self._changes(), self._noticed
        self._noticed = (step, None if step == known_step and before is None else changes)
        if step != known_step or before is None or step in self._known:
            return
        for key in changes.keys() | before.keys():
            values = (before.get(key, self._agreed.get(key)), changes.get(key, self._agreed.get(key)))
            if not same(*values):
                raise UsageError(
                    f"{_name(key)} was {values[0]} in one micro-batch of step {step} and {values[1]} in the next: how "
                    "many a rank computes in a step changes with the number of workers. Work it out from run.step "
                    "alone, and set it before optimizer.step()"
                )

    # ------------------------------------------------------------ agreeing

    def share(self, step: int) -> dict[str, Any]:
        """This rank's contribution to the agreement of a step."""
        if step in self._known:
            return {"changes": [], "again": self._known[step]}
        return {"changes": [[*key, value] for key, value in self._changes().items()], "again": None}

    def merge(self, shares: Mapping[int, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, list[int]]]:
        """The meaning of the ranks' shares: for the agreement, and which ranks made changes that not all made."""
        for rank in sorted(shares):
            if shares[rank]["again"] is not None:
                return dict(shares[rank]["again"]), {}
        values, made = dict(self._agreed), dict[Key, list[int]]()
        for rank in sorted(shares):
            for *parts, value in shares[rank]["changes"]:
                key = tuple(parts)
                if key in made and not same(values[key], value):
                    raise UsageError(
                        f"rank {made[key][0]} set {_name(key)} to {values[key]} and rank {rank} to {value}: work it "
                        "out from what is equal on all ranks, such as run.step and the loss of a step"
                    )
                values[key] = value
                made.setdefault(key, []).append(rank)
        return self.terms(values), {_name(key): ranks for key, ranks in made.items() if len(ranks) < len(shares)}

    def adopt(self, step: int, terms: Mapping[str, Any]) -> None:
        """`step` is committed: its agreement is in force. Next the runtime steps schedulers, then calls `settle`."""
        self._known[step] = {name: terms[name] for name in NAMES if name in terms}
        self.set(terms)

    def settle(self) -> None:
        """The values in force now are equal on all ranks."""
        self._agreed = self.present()
        if self._entered is not None:
            clip = any(key[0] == "clip" for key in self._entered)
            self._entered = {key: value for key, value in self._agreed.items() if clip or key[0] != "clip"}

    def forget(self, before: int) -> None:
        """Steps before this one will not be computed again."""
        for step in [step for step in self._known if step < before]:
            del self._known[step]

    # ------------------------------------------------------------ recovery

    def join(self, step: int, *, clip: bool) -> None:
        """This rank joined a job at `step`, with the job's settings in force. See `begin`."""
        if step > 0:
            values = self.present()
            self._entered = {key: value for key, value in values.items() if clip or key[0] != "clip"}

    def interrupted(self, step: int) -> None:
        """`step` continues after a recovery: its micro-batches here may have begun with other values."""
        self._noticed = (step, None)

    def records(self) -> dict[str, Any]:
        """The agreements of steps that may be computed again, for a rank that joins."""
        return {str(step): terms for step, terms in self._known.items()}

    def take_records(self, records: Mapping[str, Any]) -> None:
        """Adopt those, on a rank that joins."""
        self._known = {int(step): dict(terms) for step, terms in records.items()}


def _name(key: Key) -> str:
    if key[0] == "group":
        return f"{key[2]} of parameter group {key[1]}"
    return f"requires_grad of {key[1]}" if key[0] == "frozen" else f"the {key[1]} that gradients are clipped to"
