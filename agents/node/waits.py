"""What a node waits for, as text for users."""

from __future__ import annotations

from everstep.elastic.protocol.agent import ALONE_S
from everstep.elastic.protocol.agent_state import AgentPhase, AgentState, WorkerStage


def waits_for(state: AgentState, unheard_s: float, where: str) -> str:
    """What blocks this node; empty if nothing does. `where`: its coordinators' addresses."""
    if state.phase in (AgentPhase.UNFIT, AgentPhase.ENDING, AgentPhase.ENDED):
        return ""
    if state.phase not in (AgentPhase.CHECKING, AgentPhase.SERVING):
        return f"this node waits for the coordinator at {where} to take it in"
    if unheard_s > ALONE_S:
        return (
            f"this node has no word from a coordinator at {where}; training continues, and its workers are stopped "
            f"after {state.config.coordinator_wait_s:g} s without progress"
        )
    if state.leaving:
        return "this node waits for workers of the last attempt to end"
    if any(worker.stage is WorkerStage.WAITING for worker in state.workers.values()):
        return "this node waits for the process that its workers are forked from, which imports --es-preload"
    if not state.began:
        return (
            "this node has joined, and waits for the coordinator to start workers on it: for other nodes, or, as a "
            "spare, for a place"
        )
    return ""
