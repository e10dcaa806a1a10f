"""How an application nested its state in a torch distributed checkpoint: found by structure, kept to write it so again.

torch's flattened names are paths with dots, and so are parameters' names: what is what is told by the optimizer,
`<optimizer>.state.<parameter>.<state>` beside `<optimizer>.param_groups...`, whose parameters must be somewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from .content import ConversionError
from .dcp_metadata import Index


@dataclass(frozen=True)
class Scheme:
    """`model`, `optimizer`: the keys under which they are. `flat`: the optimizer is in torchtitan's form, where a
    state's name is one string ("state.<parameter>.<state>") and settings are by parameter, not by group."""

    model: tuple[str | int, ...] = ("model",)
    optimizer: tuple[str | int, ...] = ("optimizer",)
    flat: bool = False

    def parameter(self, name: str) -> tuple[str | int, ...]:
        return (*self.model, name)

    def state(self, name: str, state: str) -> tuple[str | int, ...]:
        return (*self.optimizer, *self._joined("state", name, state))

    def setting(self, group: int | str, name: str) -> tuple[str | int, ...]:
        """A setting of a group, by its number; or, in the flat form, of a parameter."""
        return (*self.optimizer, *self._joined("param_groups", group, name))

    def _joined(self, *parts: str | int) -> tuple[str | int, ...]:
        return (".".join(map(str, parts)),) if self.flat else parts


def dotted(path: tuple[str | int, ...]) -> str:
    """The name under which torch stores what is at a path."""
    return ".".join(map(str, path))


def find_scheme(index: Index) -> tuple[Scheme, bool]:
    """(how it is nested, whether it has an optimizer). Raises ConversionError if that cannot be told."""
    names = (*index.tensors, *index.objects)
    prefixes = sorted({name[: name.index("param_groups.")] for name in names if _has(name, "param_groups.")})
    with_state = [prefix for prefix in prefixes if any(name.startswith(prefix + "state.") for name in names)]
    if len(with_state) > 1:
        raise ConversionError(f"{index.folder}: holds several optimizers, {', '.join(with_state)}; expected one")
    if not with_state:
        return Scheme(model=_common_path(index), optimizer=("optimizer",)), False
    prefix = with_state[0]
    flat = not any(name.removeprefix(prefix + "param_groups.")[0].isdigit() for name in names if _in(name, prefix))
    parameters = {fqn for fqn, _ in states(index, prefix)}
    model = _model_prefix(index, parameters, prefix)
    return Scheme(_path(model), _path(prefix), flat), True


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


def _path(prefix: str) -> tuple[str | int, ...]:
    return tuple(part for part in prefix.split(".") if part)


def _model_prefix(index: Index, parameters: set[str], optimizer: str) -> str:
    """What stands before the parameters' names. Raises ConversionError if some have none."""
    candidates: set[str] | None = None
    for parameter in sorted(parameters):
        found = {
            name.removesuffix(parameter)
            for name in index.tensors
            if (name == parameter or name.endswith("." + parameter)) and not name.startswith(optimizer + "state.")
        }
        candidates = found if candidates is None else candidates & found
        if not candidates:
            raise ConversionError(
                f"{index.folder}: the optimizer at {optimizer or 'the top'!r} has state of {parameter}, but no model "
                "beside it has that parameter and those before it"
            )
    return min(candidates or {""}, key=len)


def _common_path(index: Index) -> tuple[str | int, ...]:
    """Without an optimizer: what all tensors were nested in, if the checkpoint says how they were."""
    paths = {index.paths.get(name, (name,))[:-1] for name in index.tensors}
    return paths.pop() if len(paths) == 1 else ()
