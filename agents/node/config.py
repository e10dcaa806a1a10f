"""A node agent's configuration, set by its launcher, and the agent's errors for the user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from everstep.comms.base.process import host_id
from everstep.elastic.protocol.agent import AgentConfig
from everstep.elastic.protocol.liveness import FLOOR_S, USER_S

from .logs import WorkerLogs


class AgentError(Exception):
    """A node agent cannot do its work; the text is for the user."""


@dataclass(frozen=True, kw_only=True)
class NodeConfig(AgentConfig):
    """One node of a job."""

    job: str
    host: str
    order: int
    program: Mapping[str, Any]
    logs: WorkerLogs
    environment: Mapping[str, str]
    role: str = "default"
    max_restarts: int = 0
    max_nodes: int = 1
    domains: tuple[str, ...] = ()  # labels of the failure domains that it is in, such as rack=7
    memory_bytes: int = 0  # for protection; 0: unknown
    worker_memory_bytes: int = 0  # for the parameters, gradients and optimizer states of a worker; 0: unknown
    keeper_linger_s: float = 30.0  # how long its keeper waits for another agent after this one died
    hang_timeout_s: float = FLOOR_S
    user_timeout_s: float = USER_S
    shared_memory: bool = True
    share_gpu: bool = False
    virtual_local_rank: bool = False
    numa_binding: str = ""  # one of torch's AffinityMode
    preemption: str = ""  # one of preemption.PROVIDERS; empty: no provider is asked
    preemption_endpoint: str = ""  # empty: the provider's own
    metrics: str = ""  # host:port; empty: not served
    health_check: str = "quick"  # one of checkup.LEVELS
    host_id: str = field(default_factory=host_id)
