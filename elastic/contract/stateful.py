"""States of user-registered objects as JSON: the usual types of a `state_dict()`, and no code that runs on reading."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from everstep.comms.mesh.tensors import raw

from .errors import UsageError

_MARK = "__everstep__"
REGISTERED_BYTES = 1 << 20  # of all registered states, as JSON: each step agrees on them


def check_size(states: Mapping[str, Any]) -> None:
    """Raises UsageError, naming the largest, if these encoded states are more than a step can agree on."""
    sizes = {name: len(json.dumps(state)) for name, state in states.items()}
    if sum(sizes.values()) > REGISTERED_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        own, total, limit = map(size_text, (sizes[largest], sum(sizes.values()), REGISTERED_BYTES))
        raise UsageError(
            f"register_state({largest!r}): its state takes {own} (tensors as base64), all registered "
            f"states {total}, and the limit is {limit} in all, since every step "
            "agrees on them: register what is small (counters, generators, means); a large tensor that turns of the "
            "loop change may be a buffer of the model, of any size: run.prepare(..., buffers={name: 'last'})"
        )


def size_text(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 2**20:.1f} MiB" if count >= 1 << 20 else f"{count / 2**10:.0f} KiB"


def encode(value: Any, where: str) -> Any:
    """`value` as JSON values, tensors and arrays included. Raises UsageError, naming `where`, for anything else.

    What carries it sorts the names of JSON objects, so dictionaries in another order are lists of pairs.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        names = list(value)
        if all(isinstance(key, str) for key in names) and _MARK not in names and names == sorted(names):
            return {key: encode(item, f"{where}[{key!r}]") for key, item in value.items()}
        pairs = [[encode(key, where), encode(item, f"{where}[{key!r}]")] for key, item in value.items()]
        return {_MARK: "dict", "value": pairs}
    if isinstance(value, tuple):
        return {_MARK: "tuple", "value": [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, bytes):
        return {_MARK: "bytes", "value": base64.b64encode(value).decode()}
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().contiguous()
        dtype, data = str(tensor.dtype).removeprefix("torch."), base64.b64encode(raw(tensor)).decode()
        return {_MARK: "tensor", "dtype": dtype, "shape": list(tensor.shape), "value": data}
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "biufc":
        kind = "scalar" if isinstance(value, np.generic) else "array"
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {_MARK: kind, "dtype": value.dtype.str, "shape": list(value.shape), "value": data}
    raise UsageError(
        f"{where} is a {type(value).__name__}: what ranks share may hold numbers, text, lists, tuples, "
        "dictionaries, bytes, tensors and arrays"
    )


def decode(value: Any) -> Any:
    """What was encoded."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_MARK)
    if kind is None:
        return {key: decode(item) for key, item in value.items()}
    body = value["value"]
    if kind == "dict":
        return {decode(key): decode(item) for key, item in body}
    if kind == "tuple":
        return tuple(decode(item) for item in body)
    data = bytearray(base64.b64decode(body))
    if kind == "bytes":
        return bytes(data)
    if kind == "tensor":
        dtype = getattr(torch, value["dtype"])
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.view(value["shape"])
    array = np.frombuffer(data, np.dtype(value["dtype"])).reshape(value["shape"])
    return array[()] if kind == "scalar" else array
