"""The environment of a worker: torchrun's variables, and one of ours."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from everstep.comms.control import everstep_pb2 as pb
from everstep.elastic.contract.settings import WorkerContext

_LAUNCHERS_OWN = {
    ("GRPC_ENABLE_FORK_SUPPORT", "0"),
    ("GRPC_VERBOSITY", "ERROR"),
}  # what comms/control/rpc.py sets for this process


def torch_environment(
    start: pb.StartWorkers, *, rank: int, local_rank: int, slots: int, role: str, max_restarts: int, job: str
) -> dict[str, str]:
    """The variables that torchrun's agent sets, but for the error file's."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(start.world_size),
        "LOCAL_WORLD_SIZE": str(slots),
        "GROUP_RANK": str(start.group_rank),
        "GROUP_WORLD_SIZE": str(start.group_world_size),
        "ROLE_RANK": str(rank),
        "ROLE_WORLD_SIZE": str(start.world_size),
        "ROLE_NAME": role,
        "MASTER_ADDR": start.master_addr,
        "MASTER_PORT": str(start.master_port),
        "TORCHELASTIC_RESTART_COUNT": str(start.restart_count),
        "TORCHELASTIC_MAX_RESTARTS": str(max_restarts),
        "TORCHELASTIC_RUN_ID": job,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def virtual_rank(environment: Mapping[str, str], local_rank: int) -> dict[str, str]:
    """Torchrun's --virtual-local-rank: every worker is local rank 0, and sees one GPU, its own."""
    devices = environment.get("CUDA_VISIBLE_DEVICES")
    own = devices.split(",")[local_rank].strip() if devices is not None else str(local_rank)
    return {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": own}


def worker_environment(
    inherited: Mapping[str, str], torch: Mapping[str, str], context: WorkerContext
) -> dict[str, str]:
    """The whole environment of a worker: the launcher's, torch's variables, and ours."""
    inherited = {name: value for name, value in inherited.items() if (name, value) not in _LAUNCHERS_OWN}
    kept = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": inherited.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")}
    return {**inherited, **kept, **torch, **context.to_environment()}


def program_for(program: Mapping[str, Any], local_rank: int) -> dict[str, Any]:
    """The program with torchrun's macro ${local_rank} filled in."""
    arguments = [argument.replace("${local_rank}", str(local_rank)) for argument in program["arguments"]]
    return {**program, "arguments": arguments}


@contextlib.contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set these variables in this process temporarily."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
