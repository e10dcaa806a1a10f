"""Token files: what a sample holds, in each form of file, and what is refused."""

from __future__ import annotations

import multiprocessing
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from everstep.data import TokenFile
from everstep.elastic.contract.errors import UsageError

TOKENS = np.arange(100, 123, dtype=np.uint16)


def write_raw(folder: Path) -> tuple[Path, dict[str, Any]]:
    TOKENS.tofile(folder / "train.bin")
    return folder / "train.bin", {"dtype": "uint16"}


def write_npy(folder: Path) -> tuple[Path, dict[str, Any]]:
    np.save(folder / "train.npy", TOKENS.astype(np.int32))
    return folder / "train.npy", {}


def write_pair(folder: Path, code: int = 8, lengths: tuple[int, ...] = (10, 0, 13)) -> tuple[Path, dict[str, Any]]:
    """As Megatron writes it: lengths, positions in bytes, and the first sequence of each document."""
    TOKENS.tofile(folder / "pair.bin")
    positions = np.cumsum([0, *lengths[:-1]], dtype=np.int64) * 2
    documents = np.arange(len(lengths) + 1, dtype=np.int64)
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(documents))
    parts = np.array(lengths, np.int32).tobytes(), positions.tobytes(), documents.tobytes()
    (folder / "pair.idx").write_bytes(head + b"".join(parts))
    return folder / "pair.bin", {}


@pytest.mark.parametrize("write", [write_raw, write_npy, write_pair])
@pytest.mark.parametrize("stride", [None, 1, 9])
def test_samples_are_windows_of_the_tokens(write: Any, stride: int | None, tmp_path: Path) -> None:
    path, arguments = write(tmp_path)
    data = TokenFile(path, 5, stride=stride, **arguments)
    tokens, every = [int(token) for token in TOKENS], stride or 5
    expected = [tokens[at : at + 6] for at in range(0, len(tokens), every) if len(tokens[at : at + 6]) == 6]
    assert len(data) == len(expected)
    for index, window in enumerate(expected):
        for sample in (data[index], data[index - len(data)]):
            assert isinstance(sample, tuple)
            inputs, targets = sample
            assert inputs.dtype == targets.dtype == torch.int64
            assert (inputs.tolist(), targets.tolist()) == (window[:-1], window[1:])
    with pytest.raises(IndexError):
        data[len(data)]


@pytest.mark.parametrize("name", ["pair", "pair.idx", "pair.bin"])
def test_a_pair_has_three_names(name: str, tmp_path: Path) -> None:
    write_pair(tmp_path)
    assert TokenFile(tmp_path / name, 4).tokens.tolist() == TOKENS.tolist()


def test_dicts_hold_the_tokens_twice_and_not_shifted(tmp_path: Path) -> None:
    path, arguments = write_raw(tmp_path)
    data = TokenFile(path, 23, items="dicts", **arguments)
    assert len(data) == 1, "the model shifts, so no token behind the sequence is needed"
    batch = next(iter(DataLoader(data)))
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [TOKENS.tolist()]


def test_a_copy_in_another_process_maps_the_file_itself(tmp_path: Path) -> None:
    path, arguments = write_raw(tmp_path)
    data = TokenFile(path, 4, **arguments)
    assert len(data.tokens) == len(TOKENS)
    assert len(pickle.dumps(data)) < len(pickle.dumps(TOKENS)) + 1000
    assert pickle.loads(pickle.dumps(data))[1][0].tolist() == data[1][0].tolist()
    context = multiprocessing.get_context("fork")
    loader = DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context=context)
    assert torch.cat([inputs for inputs, _ in loader]).tolist() == [data[i][0].tolist() for i in range(len(data))]


def test_a_token_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    path, arguments = write_raw(tmp_path)
    data = TokenFile(path, 5, vocabulary=112, **arguments)
    assert data[1][1].tolist() == [106, 107, 108, 109, 110]
    with pytest.raises(UsageError, match=r"token 12 of .*train.bin is 112, and vocabulary=112"):
        data[2]
    np.array([1, -2, 3, 4, 5, 6], np.int32).tofile(tmp_path / "signed")
    with pytest.raises(UsageError, match=r"token 1 of .* is -2"):
        TokenFile(tmp_path / "signed", 5, dtype=np.int32, vocabulary=112)[0]


def refused(match: str, path: Path, length: int = 4, **arguments: Any) -> None:
    with pytest.raises(UsageError, match=match):
        TokenFile(path, length, **arguments)


def test_files_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    raw, arguments = write_raw(tmp_path)
    refused("there is no file .*nothing", tmp_path / "nothing")
    refused("type of the tokens in .* is not known: give dtype=", raw)
    refused("23 tokens, and one sample needs 24", raw, 23, **arguments)
    refused("46 bytes, which is no multiple of the 4 bytes of a int32", raw, dtype="int32")
    refused("tokens are integers, and dtype=float32", raw, dtype="float32")
    refused("dtype must be a type of NumPy's", raw, dtype="words")
    refused("sequence_length must be a whole number of at least 1, got 0", raw, 0, **arguments)
    refused("stride must be a whole number of at least 1, got 1.5", raw, stride=1.5, **arguments)
    refused("vocabulary must be a whole number of at least 1, got True", raw, vocabulary=True, **arguments)
    refused('items must be "pairs" or "dicts"', raw, items="triples", **arguments)


def test_numpy_files_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    path, _ = write_npy(tmp_path)
    refused("has tokens of type int32, and dtype=uint16 was given", path, dtype="uint16")
    path.write_bytes(path.read_bytes()[:-8])
    refused("is not a whole NumPy file", path)
    np.save(path, TOKENS.reshape(1, -1))
    refused("has 2 dimensions", path)
    np.save(path, TOKENS.astype(np.float32))
    refused("tokens are integers, and .* has the type float32", path)


def test_pairs_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    path, _ = write_pair(tmp_path, lengths=(10, 12))
    refused("46 bytes, and by pair.idx its 22 tokens of uint16 take 44: are they a pair", path)
    path, _ = write_pair(tmp_path, code=7)
    refused("tokens are integers, and .*pair.idx has the type float32", path)
    path, _ = write_pair(tmp_path, code=9)
    refused("version 1 and type 9, which are not known", path)
    path, _ = write_pair(tmp_path)
    refused("has tokens of type uint16, and dtype=int32", path, dtype="int32")
    index = tmp_path / "pair.idx"
    whole = index.read_bytes()
    index.write_bytes(whole[:-1])
    refused("ends before its 3 sequences and 4 documents do", path)
    index.write_bytes(b"x" + whole)
    refused("is no index of Megatron's", path)
    index.write_bytes(whole)
    path.unlink()
    refused("there is .*pair.idx, but no pair.bin beside it", tmp_path / "pair")
