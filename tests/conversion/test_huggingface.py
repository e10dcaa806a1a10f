"""Hugging Face models, made by transformers: read, written, and loaded by it again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from everstep.checkpointing.convert.core.content import Content, ConversionError, Lazy

from ..jobs.peers import run_peer
from .comparing import (
    assert_equal_contents,
    assert_read_alone,
    assert_tensors,
    held,
    load_truth,
    read,
    through_universal,
    write,
)

SCRIPT = Path(__file__).parent / "samples" / "transformers_samples.py"
TIED = {"tied": "model.embed_tokens.weight", "pickled": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}
CASES = ("sharded", *TIED)


@pytest.fixture(scope="session")
def saved(transformers_samples: Path) -> Path:
    return transformers_samples


@pytest.fixture(scope="session")
def loaded(saved: Path) -> Path:
    for case in CASES:
        content = read("hf", saved / case / "model")
        write("hf", content, saved / case / "converted", max_shard_size="15KB")
        write("hf", content, saved / case / "half", dtype="bfloat16")
    run_peer(SCRIPT, "load", saved)
    return saved


@pytest.mark.parametrize("case", CASES)
def test_reads_what_the_model_held(saved: Path, case: str) -> None:
    content = read("hf", saved / case / "model")
    truth = load_truth(saved / case / "truth.pt")
    assert content.tied == ({"lm_head.weight": TIED[case]} if case in TIED else {})
    assert_tensors(content.params, {name: truth[name] for name in truth if name not in content.tied}, case)
    assert set(content.notes) >= set(content.params)


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_was_written(loaded: Path, case: str) -> None:
    truth = load_truth(loaded / case / "truth.pt")
    converted, half = load_truth(loaded / case / "converted.pt"), load_truth(loaded / case / "half.pt")
    assert truth.keys() == converted.keys() == half.keys()
    for name, tensor in truth.items():
        assert converted[name].dtype == tensor.dtype
        assert held(converted[name]) == held(tensor), name
        assert held(half[name]) == held(tensor.bfloat16()), name


@pytest.mark.parametrize("case", CASES)
def test_round_trip_returns_the_bytes(loaded: Path, case: str) -> None:
    assert_equal_contents(read("hf", loaded / case / "model"), read("hf", loaded / case / "converted"))


@pytest.mark.parametrize("case", CASES)
def test_round_trip_through_universal_returns_the_bytes(saved: Path, tmp_path: Path, case: str) -> None:
    source = saved / case / "model"
    content = read("hf", source)
    assert_equal_contents(content, through_universal(source, tmp_path, "hf"))
    assert (tmp_path / "back" / "config.json").exists()


def test_reads_alone(saved: Path) -> None:
    assert_read_alone(saved / "tied" / "model", "hf")
    assert_read_alone(saved / "pickled" / "model", "hf")


def test_shards_are_no_larger_than_asked(loaded: Path) -> None:
    folder = loaded / "tied" / "converted"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    assert set(index["weight_map"].values()) == {file.name for file in files}
    truth = load_truth(loaded / "tied" / "truth.pt")
    truth.pop("lm_head.weight")
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in truth.values())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in truth.values())
    header_bytes = 4096
    assert all(file.stat().st_size <= 15_000 + header_bytes for file in files)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_casts_as_torch_does(tmp_path: Path, dtype: str) -> None:
    patterns = np.arange(0, 1 << 32, 65_521, dtype=np.uint64).astype(np.uint32).view(np.float32)
    values = patterns[np.abs(np.nan_to_num(patterns)) < 400]  # numbers that all of these types hold
    values = values[~np.isnan(values)]
    halves = np.concatenate([values, np.float32([1 + 1 / 256, 1 + 3 / 256, -0.0, 1e-40, 1.0 + 1 / 16])])
    content = Content(step=0, params={"x": Lazy(halves.shape, "float32", lambda: halves)})
    found = read("hf", write("hf", content, tmp_path / "out", dtype=dtype)).params["x"]
    assert found.dtype == dtype
    assert found.read().tobytes() == held(torch.from_numpy(halves).to(getattr(torch, dtype)))


def test_masters_are_written_as_the_module_computes(tmp_path: Path) -> None:
    master = np.float32([1.0, 1 + 1 / 256])
    content = Content(step=3, params={"a": Lazy((2,), "float32", lambda: master)}, dtypes={"a": "bfloat16"})
    found = read("hf", write("hf", content, tmp_path / "out"))
    assert found.params["a"].dtype == "bfloat16"
    assert held(torch.from_numpy(master).bfloat16()) == found.params["a"].read().tobytes()


def damaged(saved: Path, out: Path, case: str = "sharded") -> Path:
    shutil.copytree(saved / case / "model", out)
    return out


def test_refuses_torn_file(saved: Path, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path / "bad")
    file = folder / "model-00002-of-00003.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)
    with pytest.raises(ConversionError, match=r"model-00002-of-00003\.safetensors: torn: "):
        read("hf", folder)


def test_refuses_missing_shard(saved: Path, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path / "bad")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"model-00002-of-00003\.safetensors: cannot be read: No such file"):
        read("hf", folder)


def test_refuses_missing_index(saved: Path, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path / "bad")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ConversionError, match=r"3 safetensors files and no model\.safetensors\.index\.json"):
        read("hf", folder)


def test_refuses_shards_of_different_saves(saved: Path, tmp_path: Path) -> None:
    folder = damaged(saved, tmp_path / "bad")
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors")
    with pytest.raises(ConversionError, match="the files are of different saves"):
        read("hf", folder)


def header_of(*entries: tuple[str, str, list[int], list[int]], data: int = 16) -> bytes:
    header = {name: {"dtype": dtype, "shape": shape, "data_offsets": span} for name, dtype, shape, span in entries}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a safetensors file, or torn: 0 bytes"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "not a safetensors file, or torn"),
        ((4).to_bytes(8, "little") + b"nope", "its header is not that of a safetensors file"),
        (header_of(("a", "F32", [2], [0, 8]), ("b", "F32", [2], [4, 12])), "b and a overlap"),
        (header_of(("a", "F32", [2], [0, 12])), r"F32 \[2\] has 8 bytes, not 12"),
        (header_of(("a", "F32", [2], [12, 20])), "torn: a ends at byte"),
        (header_of(("a", "F32", [-2], [0, 8])), r"shape \[-2\]"),
        (header_of(("a", "Q4", [2], [0, 8])), "element type 'Q4'"),
    ],
)
def test_refuses_bad_headers(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ConversionError, match=message):
        read("hf", tmp_path)


def test_refuses_code_in_old_pickles(tmp_path: Path) -> None:
    torch.save({"a": Path.touch}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="refused: its pickle asks for"):
        read("hf", tmp_path)


def test_refuses_settings_that_are_none(tmp_path: Path) -> None:
    content = Content(step=0, params={"a": Lazy((1,), "float32", lambda: np.zeros(1, np.float32))})
    with pytest.raises(ConversionError, match="max_shard_size=5XB: expected a number of bytes"):
        write("hf", content, tmp_path / "one", max_shard_size="5XB")
    with pytest.raises(ConversionError, match="dtype=bf17: expected one of"):
        write("hf", content, tmp_path / "two", dtype="bf17")
