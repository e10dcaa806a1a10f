"""Write docs/machines.md from the state machines in elastic/protocol: `python docs/machines.py`.

`tests/unit/test_machines.py` checks that the page is up to date.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from everstep.elastic.protocol import agent, coordinator, events, invariants, state, worker, worker_events, worker_state

PAGE = Path(__file__).parent / "machines.md"
HEAD = """# The state machines

<!-- Written by docs/machines.py from the code: edit the docstrings there. -->

Everything that Everstep decides is decided by pure state machines in `elastic/protocol/`.
Each takes a state and an event, and returns the next state and what is to be done.
They use no clock, socket, thread or tensor, so the simulator (`elastic/sim/`) runs the same code as a job.

An event is *handled* in the phases that its row names.
In other phases it is *late*, and changes nothing, or *illegal*: then it cannot happen unless there is a bug, and the
machine raises an error that says what happened before.
"""


def page() -> str:
    """The page as the code has it."""
    return "\n".join([HEAD, *_coordinator(), *_worker(), *_agent()]).rstrip() + "\n"


def _coordinator() -> list[str]:
    handled, illegal = (
        {kind: [phase.value for phase in state.Phase if (phase, kind) in table] for kind in events.Event.__args__}
        for table in (coordinator.HANDLED, coordinator.ILLEGAL)
    )
    checks = [getattr(invariants, name) for name in vars(invariants) if name.startswith("check_")]
    return [
        "## The coordinator",
        "",
        "The code is `elastic/protocol/coordinator.py`.",
        "The leader (`agents/coordinator/leader.py`) drives it: it stores each decision, then carries it out.",
        "",
        *_phases(state.Phase),
        *_events(events.Event.__args__, lambda kind: handled[kind]),
        "Illegal:",
        "",
        *(f"- `{kind.__name__}` while {', '.join(phases)}" for kind, phases in illegal.items() if phases),
        "",
        "A node that says what is illegal is expelled; what is neither handled nor illegal is late.",
        "",
        *_told("Effects", events.Effect.__args__),
        "### Invariants",
        "",
        "They are checked after each event, in jobs (`check_turn`) and in the simulator.",
        "A decision that breaks one ends the job, and is neither written nor carried out.",
        "",
        "| check | what it checks |",
        "|---|---|",
        *(f"| `{check.__name__}` | {_first_line(check)} |" for check in checks),
        "",
    ]


def _worker() -> list[str]:
    handled = {
        kind: [phase.value for phase in worker_state.WorkerPhase if (phase, kind) in worker.HANDLED]
        for kind in worker_events.Event.__args__
    }
    late = [kind.__name__ for kind in worker.ANSWERS]
    return [
        "## The worker",
        "",
        "The code is `elastic/protocol/worker.py`, with `worker_events.py` and `worker_state.py`.",
        "The engine (`elastic/engine/`) carries out its instructions on tensors, the simulator on hashes.",
        "`resharding/legs.py` decides the order of work in a step, and `protecting.py` which versions outlive nodes.",
        "",
        *_phases(worker_state.WorkerPhase),
        *_events(worker_events.Event.__args__, lambda kind: handled[kind]),
        "Late, while the worker is waiting:",
        f"{', '.join(f'`{name}`' for name in late)}.",
        "",
        *_told("Instructions", worker_events.Instruction.__args__),
        "### Invariants",
        "",
        "They are checked after each event, in jobs and in the simulator.",
        "",
        *(f"- {text}" for text in worker_state.INVARIANTS.values()),
        "",
    ]


def _agent() -> list[str]:
    late = {
        kind: [phase.value for phase in agent.AgentPhase if (phase, kind) in agent.LATE]
        for kind in agent.Event.__args__
    }
    handled = {
        kind: [phase.value for phase in agent.AgentPhase if (phase, kind) in agent.HANDLED]
        for kind in agent.Event.__args__
    }
    return [
        "## The node agent",
        "",
        "The code is `elastic/protocol/agent.py`.",
        "The agent's loop (`agents/node/node.py`) and the simulator carry out its instructions.",
        "",
        *_phases(agent.AgentPhase),
        *_events(agent.Event.__args__, lambda kind: handled[kind]),
        "Late:",
        "",
        *(f"- `{kind.__name__}` while {', '.join(phases)}" for kind, phases in late.items() if phases),
        "",
        *_told("Instructions", agent.Instruction.__args__),
        "### Invariants",
        "",
        "They are checked after each event, in jobs and in the simulator.",
        "",
        *(f"- {text}" for text in agent.INVARIANTS.values()),
        "",
    ]


def _phases(phases: type[enum.Enum]) -> list[str]:
    meanings = _comments(phases)
    rows = [f"| {phase.value} | {meanings.get(phase.name, '')} |" for phase in phases]
    return ["### Phases", "", "| phase | meaning |", "|---|---|", *rows, ""]


def _comments(phases: type[enum.Enum]) -> dict[str, str]:
    """The comment behind each member."""
    found = {}
    for line in inspect.getsource(phases).splitlines():
        name, _, rest = line.strip().partition(" = ")
        if "#" in rest:
            found[name] = rest.partition("#")[2].strip()
    return found


def _events(kinds: Iterable[type[Any]], handled: Callable[[type[Any]], list[str]]) -> list[str]:
    rows = [f"| `{kind.__name__}` | {_first_line(kind)} | {', '.join(handled(kind))} |" for kind in kinds]
    return ["### Events", "", "| event | meaning | handled when |", "|---|---|---|", *rows, ""]


def _told(title: str, kinds: Iterable[type[Any]]) -> list[str]:
    rows = [f"| `{kind.__name__}` | {_first_line(kind)} |" for kind in kinds]
    return [f"### {title}", "", f"| {title[:-1].lower()} | meaning |", "|---|---|", *rows, ""]


def _first_line(item: Any) -> str:
    return (item.__doc__ or "").strip().partition("\n\n")[0].replace("\n", " ").replace("    ", "")


if __name__ == "__main__":
    PAGE.write_text(page())
