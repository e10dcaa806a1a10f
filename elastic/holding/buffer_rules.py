"""How the changes that micro-batches make to a buffer in their forwards are combined to its value after the step.

Each micro-batch of a step begins with the buffer's value before the step.

    mean   the mean of the values after each micro-batch, as for a batch norm's statistics: moving averages
    sum    the value before the step, plus the change that each micro-batch made: counts
    max    the largest of the values after each micro-batch, element by element: histories of largest magnitudes
    last   the value after the last micro-batch of the step
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from everstep.elastic.contract.errors import UsageError

Rule = Literal["mean", "sum", "max", "last"]
RULES = ("mean", "sum", "max", "last")


def rules_of(buffers: Mapping[str, Tensor], declared: Mapping[str, Rule], saved: set[str]) -> dict[str, Rule]:
    """Name -> rule, for the buffers whose names a pattern of `declared` matches. Raises UsageError."""
    found: dict[str, Rule] = {}
    for pattern, rule in declared.items():
        if rule not in RULES:
            raise UsageError(f"buffers={{{pattern!r}: {rule!r}}}: the rule must be one of {', '.join(RULES)}")
        matching = [name for name in buffers if fnmatchcase(name, pattern)]
        if not matching:
            known = ", ".join(sorted(buffers)[:10]) or "none"
            raise UsageError(
                f"buffers={{{pattern!r}: {rule!r}}}: no buffer of the model has such a name; it has {known}"
            )
        for name in matching:
            found[name] = rule
            if name not in saved:
                raise UsageError(f"buffers={{{pattern!r}: {rule!r}}}: {name!r} is not saved: register it as persistent")
            if buffers[name].dtype == torch.bool or buffers[name].is_complex():
                raise UsageError(
                    f"buffers={{{pattern!r}: {rule!r}}}: {name!r} has {buffers[name].dtype}, which has no sum and no "
                    "largest value"
                )
    return found


def leaf(rule: Rule, base: Tensor, after: Tensor, *, is_last: bool) -> Tensor:
    """What a micro-batch brings to the sum over the step, or for "max" to its largest value; `base`: the value before.

    All of one dimension and type.
    """
    if rule == "sum":
        return after - base
    return after if rule in ("mean", "max") or is_last else torch.zeros_like(after)


def after_step(rule: Rule, before: Tensor, total: Tensor) -> Tensor:
    """The value after the step; `before`: the one before it.

    `total`: the sum of the leaves, for "mean" their mean, for "max" the largest of them.
    """
    total = total.view(before.shape)
    if rule == "max":
        # Which of two equal zeros, or of two NaNs, is the largest depends on where an element lies in its tensor.
        total = total.masked_fill(total.isnan(), math.nan) + 0.0
    total = total if before.is_floating_point() else total.round()
    return before + total.to(before.dtype) if rule == "sum" else total


def check_synced(model: nn.Module) -> None:
    """Raises UsageError for a batch norm whose forward would gather statistics from all ranks, in a process group.

    Without one it is an ordinary batch norm.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise UsageError(
                f"{repr(name) if name else 'the model'} is a SyncBatchNorm, whose forward gathers statistics from all "
                "ranks, and in an elastic job these compute different micro-batches at that moment: leave out "
                "convert_sync_batchnorm(...). A batch norm's running statistics are the means over a step's "
                "micro-batches"
            )


def ready_rules(model: nn.Module) -> dict[str, Rule]:
    """Name -> rule, for buffers that need no declaration: batch norms' running statistics, spectral norms' vectors."""
    found: dict[str, Rule] = {}
    for prefix, module in model.named_modules():
        rule: Rule | None = None
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            rule = "mean"
        elif isinstance(module, nn.utils.parametrizations._SpectralNorm):
            rule = "last"
        if rule is not None:
            names = [name for name, _ in module.named_buffers(recurse=False)]
            found.update({f"{prefix}.{name}" if prefix else name: rule for name in names})
    return found
