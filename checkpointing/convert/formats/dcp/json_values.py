"""Values of other frameworks' checkpoints as JSON and back, tuples, types and numbers' arrays included."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from everstep.checkpointing.convert.core.content import Lazy
from everstep.checkpointing.convert.files.filetensor import FileTensor
from everstep.checkpointing.convert.files.unpickling import Dtype, Unpickled

NONE: Mapping[str, Lazy] = MappingProxyType({})
_LARGEST_TENSOR_BYTES = 16384


def encode(value: Any, dropped: list[str], where: str = "", tensors: dict[str, Lazy] | None = None) -> Any:
    """`value` as JSON. What cannot be is None, and is listed in `dropped` by its path.

    With `tensors`, large ones are put there, by their paths, and referred to.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: encode(each, dropped, f"{where}.{key}", tensors) for key, each in value.items()}
        return {
            "$dict": [
                [encode(k, dropped, where), encode(v, dropped, f"{where}.{k}", tensors)] for k, v in value.items()
            ]
        }
    if isinstance(value, list | tuple):
        items = [encode(each, dropped, f"{where}.{at}", tensors) for at, each in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Dtype):
        return {"$dtype": value.name}
    if isinstance(value, FileTensor) and value.nbytes <= _LARGEST_TENSOR_BYTES and "complex" not in value.dtype:
        array = value.read()
        numbers = array.astype("float64") if "float" in value.dtype else array
        return {"$tensor": {"dtype": value.dtype, "shape": list(value.shape), "values": numbers.ravel().tolist()}}
    if isinstance(value, Unpickled) and value.kind == "argparse.Namespace":
        return {"$namespace": encode(value.fields, dropped, where, tensors)}
    if isinstance(value, FileTensor) and tensors is not None:
        name = where.lstrip(".")
        tensors[name] = value.lazy(f"{value.path.name}:{name}")
        return {"$other": name}
    dropped.append(f"{where.lstrip('.')} ({getattr(value, 'kind', type(value).__name__)})")
    return None


def settings(values: dict[str, Any], dropped: list[str]) -> dict[str, Any]:
    """An optimizer's settings as plain JSON: its pairs are lists, as every format has them."""
    return plain({name: encode(value, dropped, name) for name, value in values.items()})


def plain(encoded: dict[str, Any]) -> dict[str, Any]:
    """Encoded settings with tuples as lists."""
    return {
        name: value["$tuple"] if isinstance(value, dict) and "$tuple" in value else value
        for name, value in encoded.items()
    }


def decode_settings(values: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `settings`: what torch's optimizers keep as a tuple is one again."""
    decoded = {name: decode(value) for name, value in values.items()}
    return {name: tuple(value) if name == "betas" else value for name, value in decoded.items()}


def decode(value: Any, tensors: Mapping[str, Lazy] = NONE) -> Any:
    """What `encode` made JSON of, with torch's own types; imports torch where there is one.

    `tensors`: what it may refer to; a tensor that was left out is None.
    """
    if isinstance(value, list):
        return [decode(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    if "$tuple" in value:
        return tuple(decode(each, tensors) for each in value["$tuple"])
    if "$dict" in value:
        return {decode(key): decode(each, tensors) for key, each in value["$dict"]}
    if "$namespace" in value:
        from argparse import Namespace

        return Namespace(**decode(value["$namespace"], tensors))
    if "$other" in value:
        from .writing import tensor_of

        kept = tensors.get(value["$other"])
        return None if kept is None else tensor_of(kept.read(), kept.dtype)
    if "$dtype" in value:
        import torch

        return getattr(torch, value["$dtype"])
    if "$tensor" in value:
        import torch

        tensor = value["$tensor"]
        return torch.tensor(tensor["values"], dtype=getattr(torch, tensor["dtype"])).reshape(tensor["shape"])
    return {key: decode(each, tensors) for key, each in value.items()}
