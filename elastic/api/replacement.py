"""Warnings about what the script of a replacement does in vain, since the job has begun without it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from everstep.elastic.contract.membership import Membership
from everstep.elastic.contract.notices import Notice, warn
from everstep.elastic.engine.engine import STATE
from everstep.elastic.engine.resume import differences
from everstep.elastic.holding.hyperparameters import give_settings, pack, settings_of, unpack
from everstep.elastic.holding.several_optimizers import AnyOptimizer, parts_of
from everstep.elastic.holding.user_optimizer import has_state
from everstep.elastic.protocol.job import Begun
from everstep.elastic.step.schedule import ScheduleState
from everstep.elastic.step.stream_states import StreamStates
from everstep.elastic.step.streams import Streams


def loads_values(membership: Membership, begun: Begun | None, values: str) -> bool:
    """Whether a replacement's script loads values into its model, in vain; if so, warns about it."""
    if begun is None or values == begun.values:
        return False
    warn(
        membership,
        Notice.REPLACEMENT_VALUES,
        "the script of a replacement initialised its model with other values than the job began with (a "
        "checkpoint that it loads by itself?): the job's own values take their place; checkpoint=URL saves "
        "and resumes by itself, and run.is_replacement tells a replacement",
    )
    return True


def begin_as_others(membership: Membership, begun: Begun, optimizer: Any) -> None:
    """Undo what a replacement's script has loaded into its optimizer, and warn about it.

    A script that reads the last file which it has saved, if there is one, is the same on all ranks at the start, and
    another one on a replacement. Its optimizer gets the settings with which the job began, and no state.
    """
    if not isinstance(optimizer, AnyOptimizer):
        return  # refused by what follows
    loaded = []
    if has_state(optimizer):
        loaded.append("a state")
        for part in parts_of(optimizer):
            part.state.clear()
    theirs, ours = unpack(json.loads(begun.settings)), [settings_of(group) for group in optimizer.param_groups]
    if json.dumps(pack(ours)) != begun.settings and len(theirs) == len(ours):
        loaded.append("; ".join(["other settings", *differences(theirs, ours)[:1]]))
        for group, old, new in zip(optimizer.param_groups, theirs, ours, strict=True):
            for name in new.keys() - old.keys():
                del group[name]  # such as the initial_lr of a scheduler that the script builds later
        give_settings(optimizer.param_groups, theirs)
    if loaded:
        warn(
            membership,
            Notice.REPLACEMENT_VALUES,
            f"the script of a replacement gave its optimizer {' and '.join(loaded)} in front of run.prepare or "
            "run.steps, which the job did not begin with (a file that it loads by itself?): the job's own take their "
            "place; checkpoint=URL saves and resumes by itself, and run.is_replacement tells a replacement",
        )


def note_variables(membership: Membership, registered: Mapping[str, Any]) -> None:
    """Warn about variables that a replacement's script lacks, where the job keeps none of them."""
    state = registered[STATE]
    own = [item for item in registered.values() if not isinstance(item, ScheduleState | Streams | StreamStates)]
    if own == [state] and not state:
        warn(
            membership,
            Notice.REPLACEMENT_STATE,
            "a replacement runs the script from its beginning: the script's own variables (averages, counters, "
            "best scores) start again on it, and files opened with 'w' are emptied; run.state and "
            "run.register_state(name, item) keep variables equal on all ranks, and run.is_replacement tells a "
            "replacement",
        )
