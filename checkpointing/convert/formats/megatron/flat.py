"""The optimizer of one rank of legacy Megatron-LM, which stores no names: they follow from the model's order.

Plain mixed precision keeps lists by group: parameters with weight decay in the order of the model, then those without.
The distributed optimizer keeps flat tensors, gathered of all data-parallel ranks: parameters in the reverse order of
the model, each aligned to 64 elements within its bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from everstep.checkpointing.convert.core.content import ConversionError
from everstep.checkpointing.convert.files.filetensor import FileTensor

from .groups import is_decayed

_ALIGNMENT = 64  # elements
_SMALLEST_BUCKET = 40_000_000  # elements, if the arguments lack it
_BUCKET_PER_RANK = 1_000_000
MAIN = "param"


@dataclass(frozen=True)
class Member:
    """A parameter of a rank, by its name in the whole model. `shared`: an embedding that two stages have."""

    name: str
    weight: FileTensor
    shared: bool


def groups_of(optimizer: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of an optimizer's groups, without their members and the step."""
    groups = optimizer.get("optimizer", optimizer).get("param_groups", [])
    return [{key: value for key, value in group.items() if key not in ("params", "step")} for group in groups]


def step_of(optimizer: dict[str, Any]) -> float | int | None:
    """The step, where it is kept with the settings, as the distributed optimizer does."""
    groups = optimizer.get("optimizer", optimizer).get("param_groups", [])
    return next((group["step"] for group in groups if "step" in group), None)


def listed(members: Sequence[Member], optimizer: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """{parameter: {state: tensor}} of an optimizer that lists its parameters by group."""
    inner = optimizer.get("optimizer", optimizer)
    groups, state = inner.get("param_groups", []), inner.get("state", {})
    main = optimizer.get("fp32_from_fp16_params") or [[] for _ in groups]
    found: dict[str, dict[str, Any]] = {}
    for at, group in enumerate(groups):
        mine = [
            member
            for member in members
            if len(groups) == 1 or is_decayed(member.name, member.weight.shape) == (group.get("wd_mult", 1.0) != 0.0)
        ]
        ids = group.get("params", [])
        if len(ids) != len(mine):
            raise ConversionError(f"{where}: group {at} has {len(ids)} parameters; the model has {len(mine)} for it")
        for order, (number, member) in enumerate(zip(ids, mine, strict=True)):
            states = dict(state.get(number, {}))
            if main[at]:
                states[MAIN] = main[at][order]
            found[member.name] = states
    for member in members:
        for name, value in found.get(member.name, {}).items():
            if isinstance(value, FileTensor) and value.shape not in ((), member.weight.shape):
                raise ConversionError(
                    f"{where}: {name} of {member.name} has shape {list(value.shape)}; the model's weight has "
                    f"{list(member.weight.shape)}: the order of this model's parameters is not known"
                )
    return found


def bucket_elements(args: dict[str, Any], stage: int, chunk: int) -> int | None:
    """From how many elements on a rank begins a new bucket, by the arguments of the run; None if it has but one."""
    if not args.get("overlap_grad_reduce") or stage > 0 or chunk > 0:
        return None
    if args.get("ddp_bucket_size"):
        return int(args["ddp_bucket_size"])
    return max(_SMALLEST_BUCKET, _BUCKET_PER_RANK * int(args.get("data_parallel_size") or 1))


def flat(
    members: Sequence[Member], stored: dict[Any, Any], bucket: int | None, where: str
) -> dict[str, dict[str, FileTensor]]:
    """{parameter: {state: tensor}} of the flat tensors of one chunk of the model, by the elements' types."""
    found: dict[str, dict[str, FileTensor]] = {}
    for types, tensors in stored.items():
        dtype = getattr(types[0] if isinstance(types, tuple) else types, "name", None)
        mine = [member for member in members if dtype is None or member.weight.dtype == dtype]
        starts, ends = _lay_out(mine, bucket)
        for state, tensor in tensors.items():
            if not isinstance(tensor, FileTensor):
                continue  # how many elements there are, or the step
            if tensor.elements != ends:
                raise ConversionError(
                    f"{where}: {state} of {dtype} has {tensor.elements} elements; this model's parameters take {ends}: "
                    "their order, or the buckets they were in, are not known"
                )
            for member in mine:
                part = tensor.part(starts[member.name], member.weight.elements)
                found.setdefault(member.name, {})[state] = part.view(*member.weight.shape)
    return found


def _lay_out(members: Sequence[Member], bucket: int | None) -> tuple[dict[str, int], int]:
    """(where each parameter begins, where the last one ends), in a tensor from which buckets' padding was cut."""
    starts: dict[str, int] = {}
    base, begin = 0, 0  # of the bucket in the tensor, and in the bucket
    for member in reversed(members):
        begin = -(-begin // _ALIGNMENT) * _ALIGNMENT
        if member.shared and begin:
            base, begin = base + begin, 0
        starts[member.name] = base + begin
        begin += member.weight.elements
        if member.shared or (bucket is not None and begin >= bucket):
            base, begin = base + begin, 0
    return starts, base + begin
