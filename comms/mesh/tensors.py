"""Tensors as payloads: the host memory that they lie in, and messages of several tensors taken apart again.

Bytes are the case of uint8. Nothing here copies a tensor that is contiguous and lies in host memory.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from operator import itemgetter

import torch
from torch import Tensor
from typing_extensions import Buffer

# Of tensors in a message, as of those that torch allocates: the bits of a matrix product may depend on where its
# operands lie (Intel MKL, "Obtaining Numerically Reproducible Results", asks for 64).
ALIGNMENT_BYTES = 64

# The order is part of the links' protocol, since a type's place stands for it: add at the end.
_NAMES = (
    *("float32", "float64", "float16", "bfloat16", "complex64", "complex128", "complex32", "bool"),
    *("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
)
_DTYPES: list[torch.dtype | None] = [None, *(getattr(torch, name, None) for name in _NAMES)]  # None: no tensor
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_UNKNOWN_TO_NUMPY = {torch.bfloat16, torch.complex32, *_DTYPES[_NAMES.index("float8_e4m3fn") + 1 :]} - {None}
_COUNT = struct.Struct("<I")
_TENSOR = struct.Struct("<BB")  # its type and its number of dimensions; its extents and strides follow


# ------------------------------------------------------------ memory


def host_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, in its own memory.

    Raises TypeError for what is no tensor, and ValueError for a tensor that is not contiguous or not in host memory.
    """
    try:  # nearly all of them: this takes a microsecond, and finds what the rest looks for
        bits = tensor.view(torch.uint8) if tensor.dtype in _UNKNOWN_TO_NUMPY else tensor
        return memoryview(bits.numpy()).cast("B")  # type: ignore[arg-type]
    except (TypeError, RuntimeError, AttributeError):
        return _checked_bytes(tensor)


def _checked_bytes(tensor: Tensor) -> memoryview:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"a payload consists of tensors, bytes of uint8 ones (see of_bytes): got {type(tensor)}")
    if not tensor.is_cpu:
        raise ValueError(
            f"a payload on {tensor.device}: this communicator takes host memory (cpu) only: send a copy there"
        )
    if tensor.layout is not torch.strided or not tensor.is_contiguous():
        what = tuple(tensor.stride()) if tensor.layout is torch.strided else tensor.layout
        raise ValueError(
            f"a payload of shape {tuple(tensor.shape)} and strides {what} is not contiguous: send its contiguous()"
        )
    if not tensor.numel():
        return memoryview(b"")
    tensor = tensor.detach().reshape(-1)
    try:
        array = (tensor.view(torch.uint8) if tensor.dtype in _UNKNOWN_TO_NUMPY else tensor).numpy()
    except (TypeError, RuntimeError) as error:  # a lazy conjugate or negative, a quantized one, one without memory
        raise ValueError(f"a payload whose memory does not hold its values: {error}") from None
    return memoryview(array).cast("B")  # type: ignore[arg-type]


def on_host(tensor: Tensor) -> Tensor:
    """The tensor as a payload: itself if it is contiguous and in host memory, a copy otherwise."""
    if tensor.is_cpu and tensor.is_contiguous() and not tensor.requires_grad:
        return tensor
    return tensor.detach().contiguous().cpu()


def raw(tensor: Tensor) -> memoryview:
    """The bytes of any tensor, without a copy if it is contiguous and in host memory."""
    return host_bytes(on_host(tensor))


def settled(tensor: Tensor) -> Tensor:
    """The tensor in the form in which it would arrive from another rank: strides and alignment decide about bits, too.

    A tensor whose elements lie without gaps keeps the order of its dimensions in memory; others become contiguous. It
    is the tensor itself where it is in that form. Differentiable: the gradient is handed on as it is.
    """
    if not _without_gaps(tensor):
        tensor = tensor.contiguous()
    return aligned(tensor)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied if its memory does not begin where torch would have put it."""
    if tensor.layout is torch.strided and tensor.is_cpu and tensor.data_ptr() % ALIGNMENT_BYTES:
        return tensor.clone()  # which keeps strides
    return tensor


def _without_gaps(tensor: Tensor) -> bool:
    """Whether each of the elements has memory of its own, and no other memory lies between them."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, extent in sorted((s, e) for s, e in zip(tensor.stride(), tensor.shape, strict=True) if e != 1):
        if stride != expected:
            return False
        expected *= extent
    return True


def over(memory: memoryview) -> Tensor:
    """Bytes as a tensor of uint8 in one dimension that shares their memory, which must be writable."""
    return torch.frombuffer(memory, dtype=torch.uint8) if len(memory) else torch.empty(0, dtype=torch.uint8)


def of_bytes(data: Buffer) -> Tensor:
    """A copy of some bytes as a tensor of uint8 in one dimension."""
    return over(memoryview(bytearray(data)))


# ------------------------------------------------------------ several tensors in one message


def divide(data: Tensor, parts: Sequence[tuple[torch.dtype, int]], offset: int = 0) -> list[Tensor]:
    """The tensors (type, number of elements) that lie in `data` (uint8) from byte `offset` on, in one dimension each.

    They share its memory, except for those that do not lie at a multiple of their elements' size.
    """
    found: list[Tensor] = []
    for dtype, run in itertools.groupby(parts, key=itemgetter(0)):
        counts = [count for _, count in run]
        size = sum(counts) * dtype.itemsize
        piece = data[offset : offset + size]
        if piece.storage_offset() % dtype.itemsize:
            piece = piece.clone()
        found += torch.split_with_sizes(piece.view(dtype), counts)
        offset += size
    return found


def encode(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """A payload that says of itself which types and shapes it has, and where no tensor is. Raises TypeError."""
    head = bytearray(_COUNT.pack(len(tensors)))
    whole = [tensor if tensor is None or _without_gaps(tensor) else tensor.contiguous() for tensor in tensors]
    for tensor in whole:
        if tensor is None:
            head += _TENSOR.pack(0, 0)
            continue
        if tensor.dtype not in _CODES:
            raise TypeError(f"tensors of type {tensor.dtype} do not travel between ranks")
        head += _TENSOR.pack(_CODES[tensor.dtype], tensor.dim())
        head += struct.pack(f"<{2 * tensor.dim()}q", *tensor.shape, *tensor.stride())
    payload = [over(memoryview(head + bytes(-len(head) % ALIGNMENT_BYTES)))]
    for tensor in whole:
        if tensor is not None and tensor.numel():
            in_memory = tensor if tensor.is_contiguous() else tensor.detach().as_strided((tensor.numel(),), (1,))
            payload.append(on_host(in_memory))
            if gap := -payload[-1].nbytes % ALIGNMENT_BYTES:
                payload.append(torch.zeros(gap, dtype=torch.uint8))
    return payload


def decode(data: Tensor, device: torch.device) -> list[Tensor | None]:
    """The tensors of an `encode`d payload; they share its memory where they stay on the CPU."""
    head = host_bytes(data)
    (count,) = _COUNT.unpack_from(head)
    at = _COUNT.size
    described: list[tuple[torch.dtype | None, tuple[int, ...], tuple[int, ...]]] = []
    for _ in range(count):
        code, dimensions = _TENSOR.unpack_from(head, at)
        numbers = struct.unpack_from(f"<{2 * dimensions}q", head, at + _TENSOR.size)
        described.append((_DTYPES[code], numbers[:dimensions], numbers[dimensions:]))
        at += _TENSOR.size + 16 * dimensions
    tensors: list[Tensor | None] = []
    at += -at % ALIGNMENT_BYTES
    for dtype, shape, strides in described:
        if dtype is None:
            tensors.append(None)
            continue
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel():
            size = tensor.nbytes
            # The version counter that autograd checks is the tensor's own: a layer may change one input in place.
            tensor = data[at : at + size].view(dtype).as_strided(shape, strides).data
            at += size + -size % ALIGNMENT_BYTES
        tensors.append(tensor.to(device))
    return tensors
