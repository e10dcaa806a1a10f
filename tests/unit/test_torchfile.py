"""Reading files of torch.save without torch: every kind of tensor bit for bit, and no code of the file is run."""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from everstep.checkpointing.convert.core.content import ConversionError
from everstep.checkpointing.convert.files.torchfile import (
    Dtype,
    FileTensor,
    Unpickled,
    load,
    load_pickle,
    load_span,
)
from everstep.checkpointing.universal.dtypes import NAMES, numpy_dtype


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same(read: FileTensor, tensor: torch.Tensor) -> None:
    array = read.read()
    assert read.shape == array.shape == tuple(tensor.shape)
    assert array.flags["C_CONTIGUOUS"]
    assert f"torch.{read.dtype}" == str(tensor.dtype)
    assert array.dtype == numpy_dtype(read.dtype)
    assert array.tobytes() == raw(tensor)


def saved(value: object, folder: Path) -> Path:
    path = folder / "file.pt"
    torch.save(value, path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_every_element_type_comes_back(name: str, tmp_path: Path) -> None:
    dtype = getattr(torch, name)
    limit = 2 if name == "bool" else 256
    size = 1 if name == "bool" else 24 * numpy_dtype(name).itemsize
    numbers = torch.randint(0, limit, (size if name != "bool" else 24,), dtype=torch.uint8)
    tensor = numbers.view(dtype).reshape(2, 3, 4)
    same(load(saved({"t": tensor}, tmp_path))["t"], tensor)


def test_views_of_one_storage_are_read_as_what_they_are(tmp_path: Path) -> None:
    whole = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    tensors = {
        "whole": whole,
        "transposed": whole.transpose(0, 2),
        "stepped": whole[::2, 1:, ::3],
        "column": whole[:, :, 4],
        "expanded": torch.ones(3, 1).expand(3, 4),
        "one": whole[1, 2, 3],
        "none": whole[:, :0],
        "flat part": whole.reshape(-1)[7:19],
        "single row": whole[2:, :, :],
        "scalar": torch.tensor(2.5),
    }
    read = load(saved(tensors, tmp_path))
    for name, tensor in tensors.items():
        same(read[name], tensor)
        into = np.full(tensor.numel(), -1, np.float32)
        read[name].read_into(into)
        assert into.tobytes() == raw(tensor)
    assert read["whole"].offset == read["column"].offset
    part = read["flat part"].part(2, 5)
    assert part.read().tolist() == [9, 10, 11, 12, 13]
    assert part.lazy().read().tolist() == [9, 10, 11, 12, 13]
    assert read["flat part"].view(3, 4).read().shape == (3, 4)
    with pytest.raises(ConversionError, match=r"elements 10 to 15 wanted of a tensor of shape \[12\]"):
        read["flat part"].part(10, 5)
    with pytest.raises(ConversionError, match="is not a view of"):
        read["transposed"].view(60)


def test_what_else_a_checkpoint_holds(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(3))
    marked = torch.randn(2).requires_grad_()
    marked.ds_id = 3
    ordered = torch.nn.Linear(2, 2).state_dict()
    value = {
        "parameter": parameter,
        "marked": marked,
        "marked parameter": torch.nn.Parameter(torch.ones(2)),
        "state": ordered,
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "set": {1, 2},
        "nested": [({"a": torch.ones(1)},), None, True, 1.5, b"bytes", 1 + 2j],
        "bytes": bytearray(b"\x00\xff"),
        "args": argparse.Namespace(lr=0.5, dtype=torch.float16),
        "counter": Counter([1, 1]),
        "number": np.float64(0.25),
        "array": np.arange(3),
        "path": Path("a/b"),
    }
    value["marked parameter"].tensor_model_parallel = True
    read = load(saved(value, tmp_path))
    for name in ("parameter", "marked", "marked parameter"):
        same(read[name], value[name])
    assert isinstance(read["state"], OrderedDict)
    for name, tensor in ordered.items():
        same(read["state"][name], tensor)
    assert (read["size"], read["dtype"], read["device"]) == ((2, 3), Dtype("bfloat16"), "cpu")
    assert (read["set"], read["bytes"], read["counter"], read["number"]) == ({1, 2}, b"\x00\xff", {1: 2}, 0.25)
    assert read["nested"][1:] == [None, True, 1.5, b"bytes", 1 + 2j]
    same(read["nested"][0][0]["a"], torch.ones(1))
    assert read["args"].kind == "argparse.Namespace"
    assert read["args"].fields == {"lr": 0.5, "dtype": Dtype("float16")}
    assert isinstance(read["array"], Unpickled)
    assert isinstance(read["path"], Unpickled)


def test_a_file_within_a_file(tmp_path: Path) -> None:
    first, second = torch.randn(5, 2), torch.randn(3)
    parts = [saved(first, tmp_path).read_bytes(), saved([second], tmp_path).read_bytes()]
    both = tmp_path / "both.distcp"
    both.write_bytes(b"".join(parts))
    same(load_span(both, 0, len(parts[0])), first)
    same(load_span(both, len(parts[0]), len(parts[1]))[0], second)
    with pytest.raises(ConversionError, match="ends before byte"):
        load_span(both, len(parts[0]), len(parts[1]) + 1)


def test_torn_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = saved({"a": torch.arange(1000), "b": torch.ones(10)}, tmp_path)
    data = path.read_bytes()
    torn = tmp_path / "torn.pt"
    for length in (0, 3, 100, 5000, len(data) - 1):
        torn.write_bytes(data[:length])
        with pytest.raises(ConversionError, match=r"torn\.pt: "):
            load(torn)
    torn.write_bytes(b"not a checkpoint")
    with pytest.raises(ConversionError, match=r"not a file of torch\.save"):
        load(torn)
    with zipfile.ZipFile(torn, "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(ConversionError, match=r"no data\.pkl"):
        load(torn)
    torch.save({"a": torch.ones(1)}, torn, _use_new_zipfile_serialization=False)
    with pytest.raises(ConversionError, match=r"before 1\.6"):
        load(torn)
    with pytest.raises(ConversionError, match=r"nowhere.pt: cannot be read: No such file"):
        load(tmp_path / "nowhere.pt")
    with pytest.raises(ConversionError, match=r"cannot be read|not a file"):
        load(tmp_path)


def rewritten(path: Path, change: dict[str, bytes | None]) -> Path:
    """The same zip with some entries replaced, or left out (None)."""
    out = path.with_name("rewritten.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            data = change.get(entry.filename.split("/", 1)[1], old.read(entry))
            if data is not None:
                new.writestr(entry.filename, data)
    return out


def test_storages_that_are_missing_or_short(tmp_path: Path) -> None:
    path = saved({"a": torch.arange(10), "b": torch.ones(3)}, tmp_path)
    same(load(rewritten(path, {}))["a"], torch.arange(10))
    with pytest.raises(ConversionError, match="torn: it has no file/data/1"):
        load(rewritten(path, {"data/1": None}))
    with pytest.raises(ConversionError, match="torn: file/data/0 has 79 bytes; expected 80"):
        load(rewritten(path, {"data/0": bytes(79)}))
    with pytest.raises(ConversionError, match="byte order 'big'"):
        load(rewritten(path, {"byteorder": b"big"}))


def test_a_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    path = saved(torch.arange(100000), tmp_path)
    tensor = load(path)
    os.truncate(path, 1000)
    with pytest.raises(ConversionError, match="inside a tensor"):
        tensor.read()


class Evil:
    def __init__(self, reduced: tuple) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple:
        return self.reduced


def protocol2(*opcodes: bytes) -> bytes:
    return b"\x80\x02" + b"".join(opcodes) + b"."


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def hostile(canary: Path) -> dict[str, bytes]:
    """Pickles that would create the file `canary`, if any of their code were run."""
    command = f"touch {canary}"
    code = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    record_class = b"cargparse\nNamespace\n"
    return {
        "os.system": pickle.dumps(Evil((os.system, (command,)))),
        "eval": pickle.dumps(Evil((eval, (code,))), protocol=2),
        "exec": pickle.dumps(Evil((exec, (code,))), protocol=4),
        "getattr": protocol2(b"cbuiltins\ngetattr\n"),
        "subprocess": pickle.dumps(Evil((subprocess.Popen, (["touch", str(canary)],)))),
        "dotted name": protocol2(b"\x8c\x09torch._C.\x94", b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n"),
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + text(command) + b"\x85R.",
        "inst": b"(" + text(command) + b"ios\nsystem\n.",
        "torch.load": protocol2(b"ctorch\nload\n", text("x"), b"\x85R"),
        "setstate of a class": protocol2(record_class, b"}", text("__setstate__"), b"cos\nsystem\n", b"sb"),
        "state of a class": protocol2(record_class, b"N}", text("__new__"), b"cbuiltins\nset\n", b"s\x86b"),
        "state of a function": protocol2(b"ctorch\nSize\n", b"N}", text("_function"), b"cbuiltins\nset\n", b"s\x86b"),
        "newobj of a function": protocol2(b"ctorch\nSize\n", b")\x81"),
        "reduce of a string": protocol2(text("os.system"), text(command), b"\x85R"),
        "extension": protocol2(b"\x82\x01"),
        "a size alone": protocol2(b"cbuiltins\nbytearray\n", b"J\xff\xff\xff\x7f", b"\x85R"),
        "persistent": protocol2(text("os.system"), b"Q"),
        "rebuild by a class": protocol2(
            b"ctorch._tensor\n_rebuild_from_type_v2\n", b"(cbuiltins\nset\n", b"N)N", b"tR"
        ),
    }


@pytest.mark.parametrize("name", list(hostile(Path("x"))))
def test_a_pickle_that_would_run_code_is_refused(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    data = hostile(canary)[name]
    with pytest.raises(ConversionError, match=r"bare\.pkl: (refused: its pickle asks for|its pickle cannot be read)"):
        load_pickle(data, "bare.pkl")
    path = rewritten(saved({"a": torch.ones(2)}, tmp_path), {"data.pkl": data})
    with pytest.raises(ConversionError, match=r"rewritten\.pt: "):
        load(path)
    assert not canary.exists()


def test_the_pickles_above_do_run_where_they_are_trusted(tmp_path: Path) -> None:
    """Otherwise the test above would prove nothing."""
    for name in ("os.system", "eval", "exec", "stack global", "inst"):
        canary = tmp_path / name.replace(" ", "-")
        pickle.loads(hostile(canary)[name])
        assert canary.exists(), name


def test_a_pickle_cannot_point_a_tensor_elsewhere(tmp_path: Path) -> None:
    path = saved(torch.ones(2), tmp_path)
    with zipfile.ZipFile(path) as archive:
        original = archive.read("file/data.pkl")
    build = b"}" + text("path") + text("/etc/passwd") + b"sb."
    with pytest.raises(ConversionError, match="pickle cannot be read"):
        load(rewritten(path, {"data.pkl": original[:-1] + build}))
    slots = b"N}" + text("path") + text("/etc/passwd") + b"s\x86b."
    with pytest.raises(ConversionError, match="pickle cannot be read"):
        load(rewritten(path, {"data.pkl": original[:-1] + slots}))


def test_no_torch_is_imported() -> None:
    code = "import sys, everstep.checkpointing.convert.files.torchfile; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
