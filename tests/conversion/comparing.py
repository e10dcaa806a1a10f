"""Compares the content of a checkpoint with the state of live processes; writes contents for tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from everstep.checkpointing.convert.core import format as formats
from everstep.checkpointing.convert.core.content import Content, Lazy
from everstep.checkpointing.convert.core.format import Options
from everstep.checkpointing.convert.core.work import PieceWork
from everstep.checkpointing.convert.drive import driver
from everstep.checkpointing.convert.drive.driver import Conversion

BUDGET_BYTES = 1 << 28


def read(name: str, path: Path, **settings: str) -> Content:
    return formats.load(name).read(path, Options(settings=settings))


def write(name: str, content: Content, out: Path, **settings: str) -> Path:
    out.mkdir(parents=True)
    work = PieceWork(out, threads=2, budget_bytes=BUDGET_BYTES)
    formats.load(name).write(content, out, Options(settings=settings), work)
    work.close()
    return out


def through_universal(source: Path, out: Path, to: str) -> Content:
    """The contents of a checkpoint after a conversion to the universal form and back, with its format detected."""
    for begin, end, form in ((source, out / "universal", driver.UNIVERSAL), (out / "universal", out / "back", to)):
        conversion = Conversion(source=str(begin), destination=str(end), to=form)
        driver.convert(conversion, driver.prepare(conversion))
    assert driver.format_of(str(out / "back")) == to
    return read(to, out / "back")


def assert_read_alone(source: Path, form: str) -> None:
    """A checkpoint's format is found out and all of it read by a process that imports neither torch nor its library."""
    program = (
        "import sys; from everstep.checkpointing.convert.drive import driver;"
        "conversion = driver.Conversion(source=sys.argv[1], destination='', to='universal');"
        "assert driver.format_of(sys.argv[1]) == sys.argv[2], driver.format_of(sys.argv[1]);"
        "[tensor.read() for _, _, tensor in driver.prepare(conversion).tensors()];"
        "foreign = {'torch', 'megatron', 'safetensors', 'transformers', 'deepspeed'} & set(sys.modules);"
        "assert not foreign, foreign"
    )
    done = subprocess.run([sys.executable, "-c", program, source, form], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def held(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_tensors(found: Mapping[str, Lazy], truth: Mapping[str, torch.Tensor], what: str) -> None:
    """The same names, shapes, types and bits."""
    assert set(found) == set(truth), what
    for name, tensor in found.items():
        expected = truth[name]
        assert (tensor.shape, tensor.dtype) == (tuple(expected.shape), str(expected.dtype).removeprefix("torch.")), name
        array = tensor.read()
        assert array.shape == tensor.shape
        assert np.ascontiguousarray(array).tobytes() == held(expected), f"{what}: {name}"


def assert_equal_contents(one: Content, other: Content) -> None:
    """Two contents are equal, bit for bit; the sources of their tensors may differ."""
    rooms = [{(room, name): tensor for room, name, tensor in each.tensors()} for each in (one, other)]
    assert rooms[0].keys() == rooms[1].keys()
    for key, tensor in rooms[0].items():
        twin = rooms[1][key]
        assert (tensor.shape, tensor.dtype) == (twin.shape, twin.dtype), key
        assert tensor.read().tobytes() == twin.read().tobytes(), key
    for attribute in ("step", "scalars", "tied", "dtypes", "scheduler"):
        assert getattr(one, attribute) == getattr(other, attribute), attribute
    groups = [[{**group, "params": sorted(group["params"])} for group in each.groups] for each in (one, other)]
    assert groups[0] == groups[1]


def load_truth(path: Path) -> dict[str, Any]:
    truth: dict[str, Any] = torch.load(path, weights_only=True)
    return truth
