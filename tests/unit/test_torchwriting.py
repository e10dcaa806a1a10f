"""Files written without torch can be read by torch and by Everstep."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from everstep.checkpointing.convert.core.content import ConversionError, Lazy
from everstep.checkpointing.convert.files.torchfile import Dtype, load
from everstep.checkpointing.convert.files.torchwriting import Size, save
from everstep.checkpointing.universal.dtypes import NAMES, numpy_dtype


def lazy(array: np.ndarray, dtype: str) -> Lazy:
    return Lazy(array.shape, dtype, lambda: array, "memory")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 2)])
def test_tensors_of_every_type(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    count = int(np.prod(shape)) * numpy_dtype(name).itemsize
    data = np.arange(count, dtype=np.uint8) % (2 if name == "bool" else 60)
    array = data.view(numpy_dtype(name)).reshape(shape)
    save(tmp_path / "a.pt", {"t": lazy(array, name)})
    read = torch.load(tmp_path / "a.pt", weights_only=True)["t"]
    assert str(read.dtype) == f"torch.{name}"
    assert tuple(read.shape) == shape
    assert read.reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()
    ours = load(tmp_path / "a.pt")["t"]
    assert (ours.shape, ours.dtype, ours.read().tobytes()) == (shape, name, array.tobytes())


def test_values_of_every_kind(tmp_path: Path) -> None:
    shared = lazy(np.ones(3, np.float32), "float32")
    value = {
        "none": None,
        "flags": [True, False],
        "numbers": (0, -1, 2**31, -(2**40), 2**70, 1.5),
        "text": "größe",
        3: OrderedDict(b=[shared], a=(shared, {})),
        "size": Size((2, 3)),
        "type": Dtype("bfloat16"),
        "empty": [(), [], {}],
    }
    save(tmp_path / "a.pt", value)
    read = torch.load(tmp_path / "a.pt", weights_only=True)
    for key in ("none", "flags", "numbers", "text", "empty"):
        assert read[key] == value[key]
    assert (read["size"], read["type"]) == (torch.Size([2, 3]), torch.bfloat16)
    assert isinstance(read[3], OrderedDict)
    assert list(read[3]) == ["b", "a"]
    assert read[3]["b"][0].untyped_storage().data_ptr() == read[3]["a"][0].untyped_storage().data_ptr()
    again = load(tmp_path / "a.pt")
    assert again["numbers"] == value["numbers"]
    assert again[3]["b"][0].offset == again[3]["a"][0].offset


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a set cannot be written"):
        save(tmp_path / "a.pt", {1})
    wrong = Lazy((2,), "float32", lambda: np.zeros(3, np.float32), "there")
    with pytest.raises(ConversionError, match=r"there: gave float32\[3\]; expected \[2\]"):
        save(tmp_path / "a.pt", wrong)
