"""The source text of the installed Python standard library as a data set of byte windows."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset


class SourceText(Dataset[tuple[Tensor, Tensor]]):
    """Windows of `context` bytes and the same windows one byte later, both int64 of shape (context,)."""

    def __init__(self, context: int, limit_bytes: int = 4_000_000) -> None:
        self.context = context
        self.text = torch.frombuffer(bytearray(_read(limit_bytes)), dtype=torch.uint8)

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.context
        window = self.text[start : start + self.context + 1].long()
        return window[:-1], window[1:]


def _read(limit_bytes: int) -> bytes:
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts: list[bytes] = []
    size = 0
    for path in sorted(folder.glob("*.py")):
        part = path.read_bytes()[: limit_bytes - size]
        parts.append(part)
        size += len(part)
        if size >= limit_bytes:
            break
    return b"".join(parts)
