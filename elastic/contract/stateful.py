"""States of user-registered objects as JSON: the usual types of a `state_dict()`, and no code that runs on reading.

A tensor or array from `LARGE_BYTES` on may be a *reference*: its type, its shape and the digests of its content, which
is kept elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from everstep.comms.mesh.tensors import raw

from .errors import UsageError

_MARK = "__everstep__"
_LARGE = {"large tensor": "tensor", "large array": "array"}
LARGE_BYTES = 16 << 10  # of a tensor or array: from here on a registered state refers to it
Keep = Callable[[str, Any], list[str]]  # (where, tensor or array) -> the digests of its content
Give = Callable[[list[str]], bytearray]  # the content that has these digests
REGISTERED_BYTES = 1 << 20  # of all registered states, as JSON: each step agrees on them


def check_size(states: Mapping[str, Any]) -> None:
    """Raises UsageError, naming the largest, if these encoded states are more than a step can agree on."""
    sizes = {name: len(json.dumps(state)) for name, state in states.items()}
    if sum(sizes.values()) > REGISTERED_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        own, total, limit = map(size_text, (sizes[largest], sum(sizes.values()), REGISTERED_BYTES))
        raise UsageError(
            f"register_state({largest!r}): its state takes {own} without its large tensors, all registered "
            f"states {total}, and the limit is {limit} in all, since every step agrees on them: keep what is large in "
            f"tensors or arrays of at least {size_text(LARGE_BYTES)} each, which may have any size"
        )


def size_text(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 2**20:.1f} MiB" if count >= 1 << 20 else f"{count / 2**10:.0f} KiB"


def outline(where: str, value: Any) -> list[str]:
    """A `Keep` that keeps nothing: for the size of a state, and whether it can be encoded."""
    return []


def encode(value: Any, where: str, keep: Keep | None = None) -> Any:
    """`value` as JSON values, tensors and arrays included. Raises UsageError, naming `where`, for anything else.

    What carries it sorts the names of JSON objects, so dictionaries in another order are lists of pairs. With `keep`,
    large tensors and arrays are references to what it has kept.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [encode(item, f"{where}[{i}]", keep) for i, item in enumerate(value)]
    if isinstance(value, dict):
        names = list(value)
        if all(isinstance(key, str) for key in names) and _MARK not in names and names == sorted(names):
            return {key: encode(item, f"{where}[{key!r}]", keep) for key, item in value.items()}
        pairs = [[encode(key, where), encode(item, f"{where}[{key!r}]", keep)] for key, item in value.items()]
        return {_MARK: "dict", "value": pairs}
    if isinstance(value, tuple):
        return {_MARK: "tuple", "value": [encode(item, f"{where}[{i}]", keep) for i, item in enumerate(value)]}
    if isinstance(value, bytes):
        return {_MARK: "bytes", "value": base64.b64encode(value).decode()}
    if isinstance(value, torch.Tensor):
        dtype, shape = str(value.dtype).removeprefix("torch."), list(value.shape)
        if keep is not None and value.layout is torch.strided and value.nbytes >= LARGE_BYTES:
            return {_MARK: "large tensor", "dtype": dtype, "shape": shape, "value": keep(where, value)}
        data = base64.b64encode(raw(value.detach().cpu().contiguous())).decode()
        return {_MARK: "tensor", "dtype": dtype, "shape": shape, "value": data}
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "biufc":
        if keep is not None and value.nbytes >= LARGE_BYTES:
            digests = keep(where, value)
            return {_MARK: "large array", "dtype": value.dtype.str, "shape": list(value.shape), "value": digests}
        kind = "scalar" if isinstance(value, np.generic) else "array"
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {_MARK: kind, "dtype": value.dtype.str, "shape": list(value.shape), "value": data}
    raise UsageError(
        f"{where} is a {type(value).__name__}: what ranks share may hold numbers, text, lists, tuples, "
        "dictionaries, bytes, tensors and arrays"
    )


def bytes_of(value: Any) -> memoryview:
    """The content of a tensor or array, in the order of its elements."""
    if isinstance(value, torch.Tensor):
        return raw(value)
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


def large_in(value: Any) -> Iterator[dict[str, Any]]:
    """The references in a state, or in several."""
    if isinstance(value, list):
        for item in value:
            yield from large_in(item)
    elif isinstance(value, Mapping):
        if value.get(_MARK) in _LARGE:
            yield dict(value)
        else:
            for item in value.values():
                yield from large_in(item)


def digests_in(value: Any) -> list[str]:
    """The digests of all content that a state, or several, refer to: each once."""
    return list(dict.fromkeys(digest for reference in large_in(value) for digest in reference["value"]))


def has_names(state: Any) -> bool:
    """Whether an encoded value is a dictionary with text for names: then each value is encoded by itself."""
    return isinstance(state, dict) and _MARK not in state


def in_words(value: Any) -> str:
    """An encoded value for people: a reference as the type, the shape and the beginning of a digest."""
    if isinstance(value, dict) and value.get(_MARK) in _LARGE:
        digest = hashlib.blake2b("".join(value["value"]).encode(), digest_size=4).hexdigest()
        kind = _LARGE[value[_MARK]]
        return f"{kind}(dtype={value['dtype']}, shape={tuple(value['shape'])}, content {digest})"
    if any(True for _ in large_in(value)) and not isinstance(value, list) and _MARK not in value:
        return "{" + ", ".join(f"{name!r}: {in_words(item)}" for name, item in value.items()) + "}"
    return json.dumps(value) if any(True for _ in large_in(value)) else str(decode(value))


def decode(value: Any, give: Give | None = None) -> Any:
    """What was encoded. `give` has the content of references."""
    if isinstance(value, list):
        return [decode(item, give) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_MARK)
    if kind is None:
        return {key: decode(item, give) for key, item in value.items()}
    body = value["value"]
    if kind == "dict":
        return {decode(key): decode(item, give) for key, item in body}
    if kind == "tuple":
        return tuple(decode(item, give) for item in body)
    if kind in _LARGE:
        assert give is not None, "a reference where none can be"
        kind, data = _LARGE[kind], give(body)
    else:
        data = bytearray(base64.b64decode(body))
    if kind == "bytes":
        return bytes(data)
    if kind == "tensor":
        dtype = getattr(torch, value["dtype"])
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.view(value["shape"])
    array = np.frombuffer(data, np.dtype(value["dtype"])).reshape(value["shape"])
    return array[()] if kind == "scalar" else array
