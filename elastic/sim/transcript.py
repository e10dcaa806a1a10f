"""Events and effects as text, for transcripts."""

from __future__ import annotations

from everstep.elastic.protocol import events as e
from everstep.resharding.plan import Plan

_LEAVES = e.DrainRequested | e.ReleaseNode


def brief(item: e.Event | e.Effect) -> str:
    """An event or effect in a few characters."""
    if isinstance(item, e.Record):
        return f"({item.event})"
    if isinstance(item, e.CarryOut):
        return f"CarryOut[{item.worker} g{item.plan.generation}]"
    parts = [str(item.worker)] if hasattr(item, "worker") else []
    parts += [f"g{item.generation}"] if hasattr(item, "generation") else []
    if isinstance(item, e.StartWorkers | e.KillWorkers):
        parts += [item.node, *map(str, item.workers)]
    if isinstance(item, e.NodeJoined | e.NodeLost | e.RefuseNode | e.FenceNode | _LEAVES):
        parts.append(item.node)
    if isinstance(item, e.HeartbeatsReceived):
        parts += item.nodes
    if isinstance(item, e.WorkerCommitted):
        parts.append(f"step {item.step}")
    if isinstance(item, e.WorkerLeft | e.WorkerFinished | e.TellLeft | e.Conclude) and item.version >= 0:
        parts.append(f"version {item.version}")
    if isinstance(item, e.WorkerWentOn):
        parts.append(f"step {item.step}")
    if isinstance(item, e.EndJob):
        parts.append("succeeded" if item.succeeded else f"failed: {item.why}")
        parts += [f"lost: {lost}" for lost in item.lost]
    name = type(item).__name__
    return f"{name}[{' '.join(parts)}]" if parts else name


def brief_plan(plan: Plan) -> str:
    """A plan on one line: its ranks, its version, and the amounts of moves and work."""
    version = "at the switch" if plan.version is None else f"version {plan.version}"
    parts = [f"g{plan.generation}", version, plan.layout.describe()]
    parts += [f"fresh {','.join(map(str, plan.fresh))}"] if plan.fresh else []
    parts += [f"refresh {','.join(map(str, plan.receivers))}"] if plan.receivers else []
    parts += [f"leaving {','.join(map(str, plan.leaving))}"] if plan.leaving else []
    parts += [f"{len(plan.gained)} gains", f"{len(plan.work)} to run ({len(plan.started)} started)"]
    parts += [f"{len(plan.kept)} kept"]
    parts += [f"protected {plan.protected}"] if plan.protected >= 0 else []
    return "; ".join(parts)
