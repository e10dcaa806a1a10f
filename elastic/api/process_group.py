"""torch.distributed between steps: the default process group of a script is all live ranks, and survives losses.

`get_rank` and `get_world_size` follow the membership, and collectives are the calls of `sharing`: complete on all live
ranks, or made again by those that are left, and summed in the order of ranks. Scripts for DistributedDataParallel log,
evaluate and stop early by them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, Work
from torch.distributed import distributed_c10d

from everstep.elastic.contract.errors import UsageError

if TYPE_CHECKING:
    from .sharing import Operation, Sharing

BACKEND = "everstep"
_MAKERS: tuple[Any, ...] = (dist, distributed_c10d)  # where scripts, and torch itself, find `new_group`
_torch_new_group = dist.new_group
_OPERATIONS: tuple[tuple[Any, Operation], ...] = (
    (dist.ReduceOp.SUM, "sum"),
    (dist.ReduceOp.AVG, "mean"),
    (dist.ReduceOp.MIN, "min"),
    (dist.ReduceOp.MAX, "max"),
)
_OTHERS = (
    *("scatter", "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced"),
    *("alltoall", "alltoall_base", "allgather_coalesced", "allreduce_coalesced", "send", "recv", "recv_anysource"),
    *("allgather_into_tensor_coalesced", "monitored_barrier", "split_group"),
)


def begin(run: Sharing) -> None:
    """Make all live ranks the default process group. Raises UsageError if the script has made another one."""
    if dist.is_initialized():
        raise UsageError(
            f"run.init_process_group() was called, and there is a process group ({dist.get_backend()}) already: leave "
            "out dist.init_process_group(...)"
        )
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _made, devices=["cpu", "cuda"])
    _made_for.append(run)
    try:
        dist.init_process_group(BACKEND, store=HashStore(), rank=run.rank, world_size=run.world_size)
    finally:
        _made_for.clear()
    for module in _MAKERS:
        module.new_group = _new_group


def end() -> None:
    """The run is over: its process group with it."""
    for module in _MAKERS:
        module.new_group = _torch_new_group
    if dist.is_initialized() and isinstance(dist.group.WORLD, LiveRanks):
        dist.destroy_process_group()


def _new_group(ranks: Sequence[int] | None = None, *arguments: Any, **named: Any) -> Any:
    """In place of torch's: the group of all live ranks, whatever its backend is to be. Raises UsageError for others.

    Torch would give a group fixed members; one of another backend would wait for ranks that the store does not know.
    """
    world = dist.group.WORLD
    if not isinstance(world, LiveRanks):
        return _torch_new_group(ranks, *arguments, **named)
    if ranks is not None and sorted(ranks) != list(range(world.size())):
        raise UsageError(
            f"dist.new_group({sorted(ranks)}): an elastic job of {world.size()} ranks has no group of some of them, "
            "since any may be lost: leave ranks out for the group of all live ranks, and use run.gather(...) for what "
            "some ranks compute from the others' values"
        )
    return world


_made_for: list[Sharing] = []  # the run whose group is being made: torch passes nothing of ours on


def _made(store: Any, rank: int, size: int, timeout: timedelta) -> LiveRanks:
    """Called by torch for each group of this backend. Raises UsageError for one that a script makes by itself."""
    if not _made_for:
        raise UsageError(
            "the process group of an elastic job is all live ranks: call run.init_process_group() for it, in place of "
            "dist.init_process_group(...), and make no group of some ranks, since any of them may be lost"
        )
    return LiveRanks(_made_for[0])


class _Done(Work):
    """A collective that is complete."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self._future: torch.futures.Future[Any] = torch.futures.Future()
        self._future.set_result(result)

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        return self._future


class LiveRanks(dist.ProcessGroup):
    """The process group of all live ranks of a run."""

    survives_losses = True

    def __init__(self, run: Sharing) -> None:
        super().__init__(run.rank, run.world_size)  # type: ignore[call-arg]
        self._run = run

    def rank(self) -> int:
        return self._run.rank

    def size(self) -> int:
        return self._run.world_size

    def getBackendName(self) -> str:
        return BACKEND

    def allreduce(self, tensors: Sequence[Tensor], opts: Any) -> Work:  # type: ignore[override]
        operation = next((name for known, name in _OPERATIONS if opts.reduceOp == known), None)
        if operation is None:
            raise UsageError("all_reduce in an elastic job takes SUM, AVG, MIN or MAX: use run.gather(...) for another")
        for tensor in tensors:
            tensor.copy_(self._run.reduce(tensor.detach(), operation))
        return _Done(tensors)

    def reduce(self, tensors: Sequence[Tensor], opts: Any) -> Work:  # type: ignore[override]
        return self.allreduce(tensors, opts)  # other ranks may have the result, too

    def broadcast(self, tensors: Sequence[Tensor], opts: Any) -> Work:  # type: ignore[override]
        source = opts.rootRank
        for tensor in tensors:
            tensor.copy_(self._run.broadcast(tensor.detach() if self.rank() == source else None, source))
        return _Done(tensors)

    def allgather(  # type: ignore[override]
        self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any
    ) -> Work:
        for places, tensor in zip(outputs, inputs, strict=True):
            self._fill(places, tensor)
        return _Done(outputs)

    def _allgather_base(self, output: Tensor, tensor: Tensor, opts: Any) -> Work:  # type: ignore[override]
        self._fill(output.view(-1, *tensor.shape), tensor)
        return _Done([output])

    def gather(  # type: ignore[override]
        self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any
    ) -> Work:
        for number, tensor in enumerate(inputs):
            if self.rank() == opts.rootRank:
                self._fill(outputs[number], tensor)
            else:
                self._run.gather(tensor.detach())
        return _Done(outputs)

    def _fill(self, places: Sequence[Tensor] | Tensor, tensor: Tensor) -> None:
        found = self._run.gather(tensor.detach())
        if len(found) != len(places):
            raise UsageError(
                f"a gathering call has room for the tensors of {len(places)} ranks, and {len(found)} gave one, since a "
                "rank was lost or has joined meanwhile: use run.gather(...), which returns those that there are"
            )
        for place, value in zip(places, found, strict=True):
            place.copy_(value)

    def barrier(self, opts: Any = None) -> Work:
        self._run.barrier()
        return _Done([])


def _refusing(name: str) -> Callable[..., NoReturn]:
    def refuse(self: LiveRanks, *arguments: Any, **named: Any) -> NoReturn:
        raise UsageError(
            f"an elastic job has no {name.strip('_')} of torch.distributed: between steps it has all_reduce, "
            "broadcast, all_gather, gather, barrier and those for objects, and run.mean, run.gather and run.evaluate"
        )

    return refuse


for _name in _OTHERS:
    setattr(LiveRanks, _name, _refusing(_name))
