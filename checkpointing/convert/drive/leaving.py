"""The parts of a checkpoint that are left out, by name: the user's choice, and what the target cannot hold.

A conversion drops nothing silently: content that is not understood, or has no place in the target, is an error that
names it, unless `--drop PATTERN` matches it or the format is known not to have its kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from everstep.checkpointing.convert.core.content import Content, ConversionError
from everstep.checkpointing.convert.core.registered import PIECES, without_lacking

_FEW = 8  # names in an error
_WITHOUT_OPTIMIZER = ("hf",)
_HOLDING_OTHERS = ("universal", "dcp")
CLIENT_STATE = "client_state."  # what DeepSpeed's users save with a model; its checkpoints have a place for it


def leave_out(content: Content, patterns: Sequence[str]) -> None:
    """Take out what the patterns name: of what is not understood, of what is beside the model, of optimizer states."""
    used: set[str] = set()

    def dropped(name: str) -> bool:
        for pattern in patterns:
            if fnmatchcase(name, pattern):
                used.add(pattern)
                content.dropped.append((name, f"--drop {pattern}"))
                return True
        return False

    content.unknown = [name for name in content.unknown if not dropped(name)]
    content.other = {name: tensor for name, tensor in content.other.items() if not dropped(name)}
    if any(name.startswith(PIECES) for name, _ in content.dropped) and "everstep" in content.extra:
        pieces = {name.removeprefix(PIECES) for name in content.other}
        content.extra["everstep"], gone = without_lacking(content.extra["everstep"], pieces)
        content.dropped += [(name, "its large tensors were left out") for name in gone]
    for state in list(content.optimizer):
        tensors = content.optimizer[state]
        content.optimizer[state] = {n: tensor for n, tensor in tensors.items() if not dropped(f"optimizer/{state}/{n}")}
        if not content.optimizer[state]:
            del content.optimizer[state]
    for state in list(content.scalars):
        numbers = content.scalars[state]
        content.scalars[state] = {n: value for n, value in numbers.items() if not dropped(f"optimizer/{state}/{n}")}
        if not content.scalars[state]:
            del content.scalars[state]
    unused = [pattern for pattern in patterns if pattern not in used]
    content.warnings += [f"--drop {pattern}: names nothing that can be left out" for pattern in unused]


def check_understood(content: Content, source: str) -> None:
    """Raise ConversionError if something of the source is neither understood nor left out."""
    if content.unknown:
        raise ConversionError(
            f"{source}: not understood, and it would be lost: {_listed(content.unknown)}; leave it out with "
            "--drop PATTERN"
        )


def fit(content: Content, to: str) -> None:
    """Remove content that format `to` is known not to hold. Raises ConversionError for the rest of that kind."""
    if to in _WITHOUT_OPTIMIZER and (content.optimizer or content.scalars):
        states = ", ".join([*content.optimizer, *content.scalars])
        content.dropped.append((f"the optimizer's states ({states}) and settings", f"{to} holds no optimizer"))
        content.optimizer, content.scalars, content.groups = {}, {}, []
    if to in _HOLDING_OTHERS:
        return
    several = [".".join(map(str, each["path"])) for each in content.extra.get("dcp", {}).get("optimizers", ())]
    if len(several) > 1 and (content.optimizer or content.scalars):
        raise ConversionError(
            f"{to} has one optimizer, and the source has {len(several)}: {_listed(several)}; write dcp or universal, "
            "or leave their states out with --drop 'optimizer/*'"
        )
    homeless = [name for name in content.other if to != "deepspeed" or not name.startswith(CLIENT_STATE)]
    if homeless:
        raise ConversionError(
            f"{to} has no place for tensors that are neither the model's nor an optimizer's: {_listed(homeless)}; "
            "leave them out with --drop PATTERN"
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return ", ".join(names[:_FEW]) + more
