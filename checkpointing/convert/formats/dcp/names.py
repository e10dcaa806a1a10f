"""The nesting of an application's state in a torch distributed checkpoint: inferred, and kept for writing it again.

torch's flattened names are paths with dots, and so are parameters' names. The optimizer resolves the ambiguity:
`<optimizer>.state.<parameter>.<state>` beside `<optimizer>.param_groups...`, whose parameters must be in the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from everstep.checkpointing.convert.core.content import ConversionError

from .metadata import Index, Tensor

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Scheme:
    """`model`, `optimizer`: the keys under which they are. `flat`: the optimizer is in torchtitan's form, where a
    state's name is one string ("state.<parameter>.<state>") and settings are by parameter, not by group."""

    model: Path = ("model",)
    optimizer: Path = ("optimizer",)
    flat: bool = False

    def parameter(self, name: str) -> Path:
        return (*self.model, name)

    def state(self, name: str, state: str) -> Path:
        return (*self.optimizer, *self._joined("state", name, state))

    def setting(self, group: int | str, name: str) -> Path:
        """A setting of a group, by its number; or, in the flat form, of a parameter."""
        return (*self.optimizer, *self._joined("param_groups", group, name))

    def _joined(self, *parts: str | int) -> Path:
        return (".".join(map(str, parts)),) if self.flat else parts


def dotted(path: Path) -> str:
    """The name under which torch stores what is at a path."""
    return ".".join(map(str, path))


# What applications call the model's state, where they keep another copy of it (an average, the best) beside it.
_MODEL_KEYS = ("model", "module", "state_dict", "model_state_dict", "model_state", "net", "network")
EVERYTHING = "."  # the setting for: all tensors belong to the model, however they are nested
TOP = ""  # and for: the model is at the top level


@dataclass(frozen=True)
class Nesting:
    """How the state is nested: `model`: the path to it; `optimizers`: one scheme each; `warnings`: of what was chosen.
    `everything`: all tensors are the model's, under their whole names."""

    model: Path
    optimizers: tuple[Scheme, ...] = ()
    warnings: tuple[str, ...] = ()
    everything: bool = False


def find_nesting(index: Index, asked: str | None = None) -> Nesting:
    """A checkpoint's nesting; `asked`: the model's place according to the user. Raises ConversionError if it is
    ambiguous: of two copies of the model, none is chosen without a reason."""
    names = (*index.tensors, *index.objects)
    prefixes = sorted({name[: name.index("param_groups.")] for name in names if _has(name, "param_groups.")})
    with_state = [prefix for prefix in prefixes if any(name.startswith(prefix + "state.") for name in names)]
    if not with_state:
        return _without_optimizer(index, asked)
    parameters = {fqn for prefix in with_state for fqn, _ in states(index, prefix)}
    chosen, warnings = _chosen(index, _model_prefixes(index, parameters, with_state), asked)
    schemes = tuple(Scheme(_path(chosen), _path(prefix), _is_flat(names, prefix)) for prefix in with_state)
    return Nesting(_path(chosen), schemes, warnings)


def _is_flat(names: tuple[str, ...], prefix: str) -> bool:
    return not any(name.removeprefix(prefix + "param_groups.")[0].isdigit() for name in names if _in(name, prefix))


def _without_optimizer(index: Index, asked: str | None) -> Nesting:
    if asked == EVERYTHING:
        return Nesting((), everything=True)
    members: dict[Path, dict[Any, Tensor]] = {}
    for name, tensor in index.tensors.items():
        path = index.paths.get(name, (name,))
        members.setdefault(path[:-1], {})[path[-1]] = tensor
    if asked is None and len(members) <= 1:
        return Nesting(next(iter(members), ()))
    by_prefix = {dotted((*path, "")) if path else "": found for path, found in members.items()}
    shapes = {prefix: {name: each.shape for name, each in found.items()} for prefix, found in by_prefix.items()}
    largest = max(shapes, key=lambda prefix: len(shapes[prefix]), default="")
    copies = [prefix for prefix in shapes if shapes[prefix].items() <= shapes[largest].items() or prefix == largest]
    known = [prefix for prefix in by_prefix if _is_known(prefix)]
    if asked is not None:
        prefix = _prefix_of(asked)
        if any(name.startswith(prefix) for name in index.tensors):
            return Nesting(_path(prefix))
        return Nesting(_path(_asked(index, sorted(by_prefix), asked)))
    if len(copies) > 1:
        chosen, warnings = _chosen(index, copies, asked)
        return Nesting(_path(chosen), (), warnings)
    if len(known) == 1 or "" in by_prefix:
        return Nesting(_path(known[0] if len(known) == 1 else ""))
    raise ConversionError(
        f"{index.folder}: has tensors at {', '.join(map(_shown, sorted(by_prefix)))}, and which are the model's is not "
        f"said: give --set model=KEY (the rest is kept beside it), or --set model={EVERYTHING} for all"
    )


def _is_known(prefix: str) -> bool:
    return prefix.rstrip(".").rpartition(".")[2] in _MODEL_KEYS


def _shown(prefix: str) -> str:
    return repr(prefix.rstrip(".")) if prefix else "the top"


def _prefix_of(asked: str) -> str:
    return "" if asked in (TOP, EVERYTHING) else asked.rstrip(".") + "."


def _asked(index: Index, candidates: Sequence[str], asked: str) -> str:
    prefix = _prefix_of(asked)
    if prefix not in candidates:
        raise ConversionError(
            f"{index.folder}: --set model={asked}: the model's parameters are not there, but at "
            f"{' and at '.join(map(_shown, candidates))}"
        )
    return prefix


def _chosen(index: Index, candidates: Sequence[str], asked: str | None) -> tuple[str, tuple[str, ...]]:
    """The model's prefix, chosen among those that have its parameters, and a note about the others."""
    if asked is not None:
        return _asked(index, candidates, asked), ()
    if len(candidates) == 1:
        return candidates[0], ()
    known = [prefix for prefix in candidates if _is_known(prefix)]
    all_of_them = " and at ".join(map(_shown, candidates))
    if len(known) != 1:
        raise ConversionError(
            f"{index.folder}: holds the model's parameters {len(candidates)} times, at {all_of_them}: say which are "
            "the model's with --set model=KEY (no KEY for the top); the others are kept beside it"
        )
    return known[0], (
        f"{index.folder}: holds the model's parameters {len(candidates)} times, at {all_of_them}: those at "
        f"{_shown(known[0])} are taken, and the others kept beside them; --set model=KEY takes others",
    )


def states(index: Index, prefix: str) -> list[tuple[str, str]]:
    """Every (parameter, state) of the optimizer at `prefix`."""
    start = prefix + "state."
    found = []
    for name in (*index.tensors, *index.objects):
        if name.startswith(start):
            parameter, _, state = name.removeprefix(start).rpartition(".")
            found.append((parameter, state))
    return found


def _has(name: str, part: str) -> bool:
    return name.startswith(part) or f".{part}" in name


def _in(name: str, prefix: str) -> bool:
    return name.startswith(prefix + "param_groups.")


def _path(prefix: str) -> Path:
    return tuple(part for part in prefix.split(".") if part)


def _model_prefixes(index: Index, parameters: set[str], optimizers: Sequence[str]) -> list[str]:
    """The prefixes under which all of the parameters are found. Raises ConversionError if there is none."""
    candidates: set[str] | None = None
    for parameter in sorted(parameters):
        found = {
            name.removesuffix(parameter)
            for name in index.tensors
            if (name == parameter or name.endswith("." + parameter))
            and not any(name.startswith(prefix + "state.") for prefix in optimizers)
        }
        exact = {prefix for prefix in found if index.paths.get(prefix + parameter, ("",))[-1] == parameter}
        found = exact or found  # "model.layer.weight" is no "weight" at "model.layer", where a dictionary says so
        candidates = found if candidates is None else candidates & found
        if not candidates:
            raise ConversionError(
                f"{index.folder}: the optimizer at {', '.join(map(_shown, optimizers))} has state of {parameter}, but "
                "no model beside it has that parameter and those before it"
            )
    return sorted(candidates or {""})
