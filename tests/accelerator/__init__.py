"""A stand-in for an accelerator, "standin" to torch, and the tests that need one. It is compiled when first used."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("standin.cpp")
COUNT = "STANDIN_DEVICES"
_seeds: list[int] = []


def seeds() -> list[int]:
    """What the generators of the stand-in were seeded with; it draws from the CPU's all the same."""
    return _seeds


def library() -> Path:
    """The compiled library, made anew when its source or torch's version is another."""
    text = SOURCE.read_bytes() + torch.__version__.encode()
    folder = Path(tempfile.gettempdir()) / f"everstep-standin-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    path = folder / f"standin-{hashlib.sha256(text).hexdigest()[:16]}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _compile(path)
    return path


def _compile(path: Path) -> None:
    made = path.with_suffix(".new")
    includes = [f"-I{folder}" for folder in cpp_extension.include_paths()]
    paths = cpp_extension.library_paths()
    links = [f"-L{folder}" for folder in paths] + [f"-Wl,-rpath,{folder}" for folder in paths]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-O1", "-w", abi, *includes, str(SOURCE), "-o", str(made)]
    done = subprocess.run([*command, *links, "-lc10", "-ltorch", "-ltorch_cpu"], capture_output=True, text=True)
    assert done.returncode == 0, f"the stand-in accelerator does not compile:\n{done.stderr[-4000:]}"
    made.rename(path)


def use() -> None:
    """Make the stand-in this process's accelerator. There are as many as STANDIN_DEVICES says, else one."""
    place = library()
    torch.utils.rename_privateuse1_backend("standin")
    torch.ops.load_library(str(place))
    native = ctypes.CDLL(str(place))
    module = SimpleNamespace(
        __name__="torch.standin",
        is_available=lambda: module.device_count() > 0,
        is_initialized=lambda: True,
        device_count=lambda: int(os.environ.get(COUNT, "1")),
        current_device=native.standin_device,
        set_device=native.standin_set_device,
        synchronize=lambda device=None: None,
        manual_seed_all=_seeds.append,
        _is_in_bad_fork=lambda: False,
    )
    torch._register_device_module("standin", module)
    sys.modules.setdefault("torch.standin", module)
