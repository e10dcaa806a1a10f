"""Tensors as payloads: their bytes without a copy, and messages of several of them taken apart again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from everstep.comms.mesh.mailbox import allocate
from everstep.comms.mesh.tensors import (
    ALIGNMENT_BYTES,
    decode,
    divide,
    encode,
    host_bytes,
    of_bytes,
    on_host,
    over,
    raw,
    settled,
)

CPU = torch.device("cpu")


def message(payload: list[Tensor]) -> Tensor:
    """What arrives of a payload."""
    return of_bytes(b"".join(map(host_bytes, payload)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.float8_e5m2])
def test_bytes_are_those_of_the_tensors_own_memory(dtype: torch.dtype) -> None:
    tensor = torch.zeros(4, 6, dtype=dtype)[1:3]
    memory = host_bytes(tensor)
    assert len(memory) == tensor.nbytes
    tensor.view(torch.uint8).fill_(1)
    assert bytes(memory) == bytes([1]) * tensor.nbytes


def test_a_parameter_has_bytes_and_is_left_alone() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    assert bytes(host_bytes(weight)) == bytes(host_bytes(torch.ones(3)))
    assert on_host(weight).data_ptr() == weight.data_ptr()
    assert weight.requires_grad


def test_raw_makes_contiguous_what_is_not() -> None:
    table = torch.arange(6.0).view(2, 3)
    assert bytes(raw(table.t())) == bytes(host_bytes(table.t().contiguous()))
    with pytest.raises(ValueError, match="not contiguous"):
        host_bytes(table.t())


def test_a_payload_tells_its_types_and_shapes() -> None:
    tensors = [
        torch.tensor([True, False, True]),
        torch.randn(3, 5, dtype=torch.float64),
        None,
        torch.tensor(7),
        torch.empty(0, 4, dtype=torch.bfloat16),
        torch.randn(2, 3).to(torch.bfloat16).t(),
        torch.randn(2, dtype=torch.complex128),
    ]
    decoded = decode(message(encode(tensors)), CPU)
    assert len(decoded) == len(tensors)
    for found, sent in zip(decoded, tensors, strict=True):
        if sent is None:
            assert found is None
        else:
            assert found is not None
            assert found.dtype == sent.dtype
            assert torch.equal(found, sent)


def test_what_is_decoded_shares_the_memory_but_not_the_version_counter() -> None:
    """Autograd would take a change of one for a change of the other, and refuse the backward."""
    data = message(encode([torch.ones(2), torch.zeros(2)]))
    first, second = decode(data, CPU)
    assert first is not None
    assert second is not None
    first.requires_grad_()
    product = (first * second.clone().mul_(3)).sum() + (first * first).sum()
    second.add_(1)
    product.backward()
    assert torch.equal(first.grad, torch.full((2,), 2.0))
    assert data.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()


def test_a_type_that_no_message_can_name_is_refused() -> None:
    with pytest.raises(TypeError, match="uint4 do not travel"):
        encode([torch.empty(2, dtype=torch.uint4)])


def test_parts_of_a_message_are_found_by_type_and_size() -> None:
    sent = [torch.randn(3).to(torch.bfloat16), torch.randn(2), torch.empty(0), torch.randn(4), torch.tensor([5])]
    data = message([of_bytes(b"head"), *sent])
    parts = divide(data, [(tensor.dtype, tensor.numel()) for tensor in sent], len(b"head"))
    for found, tensor in zip(parts, sent, strict=True):
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
    assert parts[0].data_ptr() == data.data_ptr() + 4  # as it lies; the others begin between two of their elements
    with pytest.raises(RuntimeError):
        divide(data, [(torch.float32, 1000)])


@pytest.mark.parametrize("offset", [0, 3, 16])
def test_tensors_keep_the_order_of_their_memory_and_begin_where_torch_has_them_begin(offset: int) -> None:
    """Kernels choose by strides and addresses, so bits depend on both."""
    images = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    tensors = [torch.arange(200.0)[offset : offset + 7], images, torch.randn(4, 6).t(), torch.randn(2, 1, 3)]
    for found, sent in zip(decode(message(encode(tensors)), CPU), map(settled, tensors), strict=True):
        assert found is not None
        assert torch.equal(found, sent)
        assert found.stride() == sent.stride()
        assert sent.data_ptr() % ALIGNMENT_BYTES == 0
        assert (found.data_ptr() - data_of(found)) % ALIGNMENT_BYTES == 0


def data_of(tensor: Tensor) -> int:
    """The address of the message that a tensor was read from."""
    return tensor.untyped_storage().data_ptr()


def test_what_has_gaps_or_overlaps_becomes_contiguous() -> None:
    for tensor in (torch.randn(4, 8)[:, ::2], torch.randn(4, 1).expand(4, 3), torch.randn(6, 5)[:, 1:].t()):
        (found,) = decode(message(encode([tensor])), CPU)
        assert found is not None
        assert torch.equal(found, tensor)
        assert found.is_contiguous()
        assert settled(tensor).is_contiguous()


def test_a_message_is_received_into_aligned_memory() -> None:
    for size in (0, 1, 63, 64, 1000, 1 << 20):
        assert over(allocate(size)).data_ptr() % ALIGNMENT_BYTES == 0
        assert len(allocate(size)) == size
