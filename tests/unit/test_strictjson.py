"""JSON that a strict parser accepts."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from everstep.agents.base.strict_json import dumps
from everstep.agents.coordinator.eventlog import EventLog, Listeners


def strictly(text: str) -> Any:
    """Parse a text, or raise for text that the standard does not allow."""

    def refuse(word: str) -> Any:
        raise AssertionError(f"{word} is no JSON: {text[:200]}")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_null(number: float) -> None:
    value = {"a": number, "b": [1.5, (number, "x")], "c": {"d": {"e": number}}, "f": True, "g": None, "h": "NaN"}
    assert strictly(dumps(value)) == {
        "a": None,
        "b": [1.5, [None, "x"]],
        "c": {"d": {"e": None}},
        "f": True,
        "g": None,
        "h": "NaN",
    }


def test_an_event_log_with_a_loss_that_is_none(tmp_path) -> None:
    path = tmp_path / "events"
    log = EventLog(path, Listeners())
    log.add([{"number": 1, "event": "committed", "step": 0, "at_s": 1.0, "loss": math.nan}])
    assert strictly(path.read_text())["loss"] is None


def test_nothing_writes_json_for_others_without_it() -> None:
    """One encoder writes all files and answers that other programs read."""
    import inspect

    from everstep.agents.coordinator import eventlog
    from everstep.agents.coordinator import server as coordinator
    from everstep.agents.monitoring import story, views
    from everstep.agents.tools import perfetto, status

    for module in (coordinator, eventlog, perfetto, status, story, views):
        assert "json.dumps(" not in inspect.getsource(module), module.__name__
