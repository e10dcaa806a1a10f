"""Warnings about what the script of a replacement does in vain, since the job has begun without it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from everstep.elastic.contract.membership import Membership
from everstep.elastic.contract.notices import Notice, warn
from everstep.elastic.engine.engine import STATE
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
