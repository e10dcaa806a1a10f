"""Boxes of tensors that are stored in chunks: any box of any partition equals that part of the whole."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everstep.checkpointing.convert.formats.dcp.metadata import Chunk, FileSpan, Tensor
from everstep.checkpointing.convert.formats.dcp.tensors import read_box

SHAPES = ((), (7,), (5, 6), (3, 4, 5), (2, 3, 2, 4))


def grid(shape: tuple[int, ...], parts: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A partition of a shape: every axis in up to `parts` uneven parts; (offsets, sizes) of each."""
    axes = []
    for size in shape:
        cuts = sorted({0, size, *(1 + at * size // parts for at in range(parts - 1) if 1 + at * size // parts < size)})
        axes.append(list(itertools.pairwise(cuts)))
    for ends in itertools.product(*axes):
        yield tuple(begin for begin, _ in ends), tuple(end - begin for begin, end in ends)


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[tuple[int, ...], int], tuple[Tensor, np.ndarray]]:
    folder = tmp_path_factory.mktemp("boxes")
    found = {}
    for shape, parts in itertools.product(SHAPES, (1, 2, 3)):
        whole = torch.arange(int(np.prod(shape)), dtype=torch.int32).reshape(shape)
        chunks = []
        for offsets, sizes in grid(shape, parts):
            path = folder / f"{len(shape)}-{parts}-{len(chunks)}"
            piece = whole[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))]
            strided = piece.mT.contiguous().mT if piece.ndim > 1 else piece.clone()
            torch.save(piece.contiguous() if len(chunks) % 2 else strided, path)
            chunks.append(Chunk(offsets, sizes, FileSpan(path, 0, path.stat().st_size)))
        found[shape, parts] = Tensor("x", "int32", shape, tuple(chunks)), whole.numpy()
    return found


@given(data=st.data())
def test_boxes_are_what_the_whole_has_there(
    tensors: dict[tuple[tuple[int, ...], int], tuple[Tensor, np.ndarray]], data: st.DataObject
) -> None:
    shape, parts = data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from((1, 2, 3)))
    tensor, whole = tensors[shape, parts]
    ends = [sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True))) for size in shape]
    box = read_box(tensor, tuple(a for a, _ in ends), tuple(b - a for a, b in ends))
    assert np.array_equal(box, whole[tuple(slice(a, b) for a, b in ends)])


def test_no_more_is_read_than_the_rows(tmp_path: Path) -> None:
    """One layer of a stacked chunk is read alone."""
    whole = torch.arange(4 * 10 * 1000, dtype=torch.float32).reshape(4, 10, 1000)
    path = tmp_path / "x"
    torch.save(whole, path)
    chunk = Chunk((0, 0, 0), (4, 10, 1000), FileSpan(path, 0, path.stat().st_size))
    tensor = Tensor("x", "float32", (4, 10, 1000), (chunk,))
    before = characters_read()
    assert np.array_equal(read_box(tensor, (2, 3, 0), (1, 2, 1000)), whole[2:3, 3:5].numpy())
    assert characters_read() - before < whole.nbytes / 4


def characters_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])
