"""The commands of checkpoints, run in this process: status and output of each; and sources that tests make up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from everstep.cli import main
from tests.jobs import Ended

Shapes = Mapping[str, tuple[int, ...]]


class Commands:
    """`everstep` as a user runs it, in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str | Path) -> Ended:
        self._capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as ended:  # argparse
            status = int(ended.code or 0)
        found = self._capsys.readouterr()
        return Ended(status, found.out, found.err)

    def done(self, *arguments: str | Path) -> str:
        """The output of a command that succeeds."""
        ended = self(*arguments)
        assert ended.status == 0, (arguments, ended)
        return ended.stdout

    def refused(self, source: Path, *arguments: str | Path, to: str = "universal") -> str:
        """The error line of a refused conversion; asserts that no files are left."""
        target = source.parent / "refused"
        before = sorted(source.parent.iterdir())
        message = self("convert", source, target, "--to", to, *arguments).error()
        assert sorted(source.parent.iterdir()) == before
        return message


def safetensors(path: Path, shapes: Shapes, *, seed: int | None = 0) -> Path:
    """A model of float32 numbers in one file; of zeros that take no room on the disk, without a seed."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        if seed is None:
            stream.truncate(8 + len(text) + at)
        else:
            stream.write(np.random.default_rng(seed).random(at // 4, dtype=np.float32).tobytes())
    return path.parent


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def chunks(universal: Path) -> dict[str, bytes]:
    """The files of a universal checkpoint, except the manifest, which contains the time."""
    return {name: data for name, data in files(universal).items() if name != "manifest.json"}
