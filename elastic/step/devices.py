"""The device that a worker computes on, its random numbers, and the transfer of batches to it.

The code works for every kind of accelerator that torch supports, by `torch.accelerator` and its module (`torch.cuda`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everstep.comms.mesh.tensors import aligned
from everstep.elastic.contract.errors import UsageError
from everstep.elastic.contract.settings import WorkerContext

_CPU = torch.device("cpu")


def own_device(context: WorkerContext | None) -> torch.device:
    """Make this worker's accelerator the current one, and return it; the CPU where there is none.

    Raises UsageError if there are more workers than accelerators on this node, unless they may share.
    """
    kind = torch.accelerator.current_accelerator()
    if kind is None or not torch.accelerator.is_available():
        return _CPU
    local_rank, workers, shares = 0, 1, False
    if context is not None:
        local_rank, workers, shares = context.local_rank, context.gpu_workers, context.share_gpu
    count = torch.accelerator.device_count()
    if workers > count and not shares:
        raise UsageError(
            f"this node has {workers} workers and {count} {kind.type} device{'s' if count > 1 else ''}: start at most "
            f"{count} (--nproc-per-node={count}), or let several workers share a device (--es-share-gpu)"
        )
    device = torch.device(kind.type, local_rank % count)
    make_current(device)
    return device


def make_current(device: torch.device) -> None:
    """Make a device without an index of this kind mean this device."""
    if device.type != "cpu" and device.index is not None:
        torch.get_device_module(device).set_device(device.index)


def memory_for_state(device: torch.device, host_bytes: int, workers: int) -> int:
    """Bytes for a worker's parameters, gradients and optimizer states: half of its device's, for activations need some.

    On the CPU `host_bytes`, its part of the node. `workers` of the node share its devices. 0: not known.
    """
    if device.type == "cpu":
        return host_bytes
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return 0
    sharing = -(-workers // torch.accelerator.device_count())
    return int(module.mem_get_info(device)[1]) // 2 // sharing


def seed_torch(seed: int) -> None:
    """Seed the generators in use. `torch.manual_seed` would format a stack trace for CUDA at every call."""
    torch.default_generator.manual_seed(seed)
    kind = torch.accelerator.current_accelerator()
    if kind is not None:
        module = torch.get_device_module(kind)
        if module.is_initialized():
            module.manual_seed_all(seed)


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Put the global generators of Python, NumPy and torch back to where they were, at the end."""
    kind = torch.accelerator.current_accelerator()
    module = torch.get_device_module(kind) if kind is not None else None
    devices = module.get_rng_state_all() if module is not None and module.is_initialized() else None
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if module is not None and devices is not None:
            module.set_rng_state_all(devices)


def seed_generators(seed: int) -> None:
    """Seed them all."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    seed_torch(seed)


def to_device(value: Any, device: torch.device) -> Any:
    """A batch with its tensors on `device`, at any depth of nesting; tensors that are there already are not copied.

    Mappings, sequences, named tuples and dataclasses keep their type; objects with a method `to(device)`, such as the
    batches of text and graph libraries, move themselves. On the CPU a batch stays as the collation returned it, but for
    tensors that begin at an odd address, as views of an array may: they are copied, since the address, which differs
    between processes, decides about the bits of products.
    """
    if isinstance(value, Tensor):
        return aligned(value) if device.type == "cpu" else value.to(device)
    if callable(getattr(value, "to", None)):
        return value if device.type == "cpu" else value.to(device)
    if isinstance(value, Mapping):
        before: dict[Any, Any] = dict(value)
    elif isinstance(value, tuple | list):
        before = dict(enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        before = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    else:
        return value
    moved = {key: to_device(item, device) for key, item in before.items()}
    if all(moved[key] is item for key, item in before.items()):
        return value
    if isinstance(value, Mapping):
        return _like(value, moved)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*moved.values())
    if isinstance(value, tuple | list):
        return _like(value, list(moved.values()))
    return dataclasses.replace(value, **moved)


def _like(value: Any, moved: Any) -> Any:
    """`moved` in the type of `value`, or unchanged if that type's constructor takes other arguments."""
    if type(value) is type(moved):
        return moved
    try:
        return type(value)(moved)
    except TypeError:
        return moved
