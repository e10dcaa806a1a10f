"""Copies with a checksum: their contents, their checksum, and invalid arguments."""

from __future__ import annotations

import mmap
import random

import pytest
import torch
import xxhash

from everstep.checkpointing.memory.copying import (
    CHUNK_BYTES,
    CheckedCopy,
    copy_with_checksum,
    tensor_bytes,
)


@pytest.mark.parametrize("length", [0, 1, 63, 4097, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 5])
@pytest.mark.parametrize("seed", [0, 0xDEADBEEF12345678])
def test_the_copy_and_its_checksum(length: int, seed: int) -> None:
    source = random.Random(length).randbytes(length)
    target = bytearray(b"\xaa" * (length + 8))
    with memoryview(target) as view:
        checksum = copy_with_checksum(source, view[4 : 4 + length], seed)
    assert checksum == xxhash.xxh3_64_intdigest(source, seed)
    assert bytes(target) == b"\xaa" * 4 + source + b"\xaa" * 4


def test_parts_have_one_checksum() -> None:
    source = random.Random(1).randbytes(CHUNK_BYTES + 100)
    target = mmap.mmap(-1, len(source))
    copy = CheckedCopy(7)
    with memoryview(source) as read, memoryview(target) as write:
        for start, stop in [(0, 3), (3, 3), (3, 1000), (1000, len(source))]:
            copy.copy(read[start:stop], write[start:stop])
    assert copy.checksum == xxhash.xxh3_64_intdigest(source, 7)
    assert target[:] == source
    target.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool])
def test_tensors_of_any_type(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).reshape(4, 6).to(dtype).requires_grad_(dtype.is_floating_point)
    raw = tensor_bytes(tensor)
    assert raw.nbytes == 24 * tensor.element_size()
    out = torch.zeros(4, 6, dtype=dtype)
    copy_with_checksum(raw, tensor_bytes(out))
    assert torch.equal(out, tensor)
    out = torch.zeros(3, 4, dtype=dtype)
    copy_with_checksum(tensor_bytes(tensor.t()[::2]), tensor_bytes(out))
    assert torch.equal(out, tensor.t()[::2])


def test_tensors_of_few_elements() -> None:
    assert bytes(tensor_bytes(torch.tensor(1, dtype=torch.int16))) == b"\x01\x00"
    assert bytes(tensor_bytes(torch.zeros(0, 3))) == b""


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="3 bytes do not fit into exactly 4"):
        copy_with_checksum(b"abc", bytearray(4))
    with pytest.raises(ValueError, match="read-only"):
        copy_with_checksum(b"abc", b"abc")
