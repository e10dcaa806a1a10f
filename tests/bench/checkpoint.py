"""Saving, loading and converting checkpoints, beside those of others and the disk itself.

    python tests/bench/checkpoint.py --json [--megabytes N] [--millions N] [--rounds N] [--folder DIR]

*Save*: float32 arrays from memory into a folder, synchronised with the disk: ours (checksums, manifest, commit) beside
one plain file written and fsynced, zarr-python (with our chunks and no compression, and as it comes),
torch.distributed.checkpoint, torch.save and safetensors, which get an fsync of every file too. *Load*: all arrays back,
into place where the format can; files are in the page cache, as after a restart on the same machine. *Convert*: a
ZeRO-1 checkpoint of two ranks of DeepSpeed beside its `ds_to_universal`, and a DCP checkpoint beside
`dcp_to_torch_save`: whole commands, wall time, largest memory of a process, bytes written. Contenders take turns, the
order rotates, figures are medians of the rounds, ratios are of one round's neighbours.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import zarr
from systems import versions

from everstep.checkpointing.universal.manifest import Array, Manifest, chunk_shape
from everstep.checkpointing.universal.reader import open_checkpoint
from everstep.checkpointing.universal.store import open_store
from everstep.checkpointing.universal.writer import ChunkWriter, try_commit

try:
    from safetensors.torch import load_file, save_file  # pyright: ignore[reportMissingImports]  (optional)
except ImportError:
    save_file = None
PEERS = Path(__file__).parents[2] / ".venv-peers" / "bin" / "python"
CHUNK_BYTES = 4 << 20
TENSOR_ELEMENTS = 2048 * 2048

Values = dict[str, torch.Tensor]


def sync(folder: Path) -> None:
    """Write what other formats leave in the page cache to the disk, as ours does."""
    for file in [folder, *folder.rglob("*")]:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


# ---------------------------------------------------------------- save


def save_plain(values: Values, folder: Path) -> None:
    with (folder / "all").open("wb", buffering=0) as file:
        for tensor in values.values():
            file.write(tensor.numpy().reshape(-1).view(np.uint8).data)
        os.fsync(file.fileno())


def save_everstep(values: Values, folder: Path) -> None:
    store = open_store(str(folder))
    writer = ChunkWriter(store)
    for name, tensor in values.items():
        shape = tuple(tensor.shape)
        array = Array(shape, "float32", chunk_shape(shape, "float32", CHUNK_BYTES))
        path = f"params/{name}"
        writer.declare(path, array)
        for number in range(array.chunks):
            first = number * array.chunk_rows
            writer.put(path, number, tensor[first : first + array.chunk_rows].numpy().reshape(-1).view(np.uint8).data)
    writer.finish("all")
    assert try_commit(store, Manifest(1), [f"params/{name}" for name in values])


def save_zarr_as_it_comes(values: Values, folder: Path) -> None:
    group = zarr.open_group(folder, mode="w")
    for name, tensor in values.items():
        group.create_array(name, data=tensor.numpy())
    sync(folder)


def save_zarr(values: Values, folder: Path) -> None:
    group = zarr.open_group(folder, mode="w")
    for name, tensor in values.items():
        chunks = chunk_shape(tuple(tensor.shape), "float32", CHUNK_BYTES)
        array = group.create_array(name, shape=tensor.shape, dtype="float32", chunks=chunks, compressors=None)
        array[...] = tensor.numpy()
    sync(folder)


def save_dcp(values: Values, folder: Path) -> None:
    dcp.save(values, storage_writer=dcp.FileSystemWriter(folder, sync_files=True), no_dist=True)


def save_torch(values: Values, folder: Path) -> None:
    torch.save(values, folder / "all.pt")
    sync(folder)


def save_safetensors(values: Values, folder: Path) -> None:
    save_file(values, folder / "all.safetensors")
    sync(folder)


# ---------------------------------------------------------------- load


def load_everstep(into: Values, folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    for name, tensor in into.items():
        checkpoint.read_into(f"params/{name}", tensor.numpy())


def load_zarr(into: Values, folder: Path) -> None:
    group = zarr.open_group(folder, mode="r")
    for name, tensor in into.items():
        tensor.numpy()[...] = group[name][...]


def load_dcp(into: Values, folder: Path) -> None:
    dcp.load(into, checkpoint_id=folder, no_dist=True)


def load_torch(into: Values, folder: Path) -> None:
    for name, tensor in torch.load(folder / "all.pt", weights_only=True).items():
        into[name].copy_(tensor)


def load_safetensors(into: Values, folder: Path) -> None:
    for name, tensor in load_file(folder / "all.safetensors").items():
        into[name].copy_(tensor)


CONTENDERS: dict[str, tuple[Callable[[Values, Path], None], Callable[[Values, Path], None] | None]] = {
    "plain": (save_plain, None),
    "everstep": (save_everstep, load_everstep),
    "zarr": (save_zarr, load_zarr),
    "zarr_as_it_comes": (save_zarr_as_it_comes, load_zarr),
    "dcp": (save_dcp, load_dcp),
    "torch": (save_torch, load_torch),
    **({"safetensors": (save_safetensors, load_safetensors)} if save_file is not None else {}),
}


def measure(megabytes: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds of each system's saves and loads, by round."""
    count = max(1, megabytes * 1_000_000 // (TENSOR_ELEMENTS * 4))
    values = {f"layer.{i}.weight": torch.randn(2048, 2048) for i in range(count)}
    into = {name: torch.zeros_like(tensor) for name, tensor in values.items()}
    names = list(CONTENDERS)
    saves: dict[str, list[float]] = {name: [] for name in names}
    loads: dict[str, list[float]] = {name: [] for name in names if CONTENDERS[name][1]}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            place = folder / name
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            subprocess.run(["sync"], check=True)
            save, load = CONTENDERS[name]
            saved_s = timed(lambda save=save, place=place: save(values, place))
            loaded_s = 0.0
            if load is not None:
                for tensor in into.values():
                    tensor.zero_()
                loaded_s = timed(lambda load=load, place=place: load(into, place))
                assert all(torch.equal(into[key], tensor) for key, tensor in values.items()), name
            if turn:  # the first round warms up
                saves[name].append(saved_s)
                if load is not None:
                    loads[name].append(loaded_s)
            shutil.rmtree(place)
    total = sum(tensor.numel() * 4 for tensor in values.values())
    return {"bytes": total, "save_s": saves, "load_s": loads}


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# ---------------------------------------------------------------- convert


def command(arguments: list[str | Path], out: Path) -> dict[str, float]:
    """Run a command: its wall time, the largest memory of any of its processes, the bytes in `out` after it."""
    shutil.rmtree(out, ignore_errors=True)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    script = Path(__file__).parent / "peers" / "measured.py"
    done = subprocess.run([sys.executable, script, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    files = [out] if out.is_file() else [file for file in out.rglob("*") if file.is_file()]
    return {**found, "bytes": sum(file.stat().st_size for file in files)}


def convert(millions: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Run both conversions, ours and the other tool's, alternately."""
    everstep = [sys.executable, "-m", "everstep", "convert"]
    found: dict[str, Any] = {}
    source = folder / "dcp"
    source.mkdir()
    shape = (1024, 1024)
    state = {f"layer.{i}.weight": torch.randn(shape) for i in range(round(millions * 1e6 / 1024**2))}
    dcp.save(state, checkpoint_id=source, no_dist=True)
    theirs = [sys.executable, "-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch"]
    found["dcp"] = in_turns(
        {
            "everstep": lambda: command([*everstep, source, folder / "u", "--to", "universal"], folder / "u"),
            "dcp_to_torch_save": lambda: command([*theirs, source, folder / "t.pt"], folder / "t.pt"),
        },
        rounds,
    )
    if not PEERS.exists():
        found["deepspeed"] = "not measured: the environment of the peers is not installed (make peers)"
        return found
    source = folder / "deepspeed"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    script = Path(__file__).parent / "peers" / "deepspeed_checkpoint.py"
    subprocess.run([PEERS, script, source, str(millions), str(port)], check=True, capture_output=True)
    tag = source / (source / "latest").read_text().strip()
    theirs = [PEERS, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", tag, "--output_folder"]
    workers = ["--num_extract_workers", "2", "--num_merge_workers", "2"]
    found["deepspeed"] = in_turns(
        {
            "everstep": lambda: command([*everstep, source, folder / "u", "--to", "universal"], folder / "u"),
            "everstep_to_deepspeed_universal": lambda: command(
                [*everstep, source, folder / "d", "--to", "deepspeed-universal"], folder / "d"
            ),
            "ds_to_universal": lambda: command([*theirs, folder / "s", *workers], folder / "s"),
        },
        rounds,
    )
    return found


def in_turns(work: dict[str, Callable[[], dict[str, float]]], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Run every task `rounds` times in rotating order, after one warm-up."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in work}
    names = list(work)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            result = work[name]()
            if turn:
                found[name].append(result)
    return found


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The other's time over ours: the median of the rounds."""
    return median(b / a for a, b in zip(ours, theirs, strict=True))


def targets(copying: dict[str, Any], conversion: dict[str, Any]) -> list[dict[str, Any]]:
    saves, loads = copying["save_s"], copying["load_s"]
    rows: list[tuple[str, float, float]] = [
        ("save: throughput over a plain write and fsync", ratio(saves["everstep"], saves["plain"]), 0.9),
        ("save: throughput over zarr-python as it comes", ratio(saves["everstep"], saves["zarr_as_it_comes"]), 3.0),
        ("save: throughput over zarr-python, not compressed", ratio(saves["everstep"], saves["zarr"]), 3.0),
        ("load: throughput over DCP in place", ratio(loads["everstep"], loads["dcp"]), 1.0),
    ]
    found = conversion["deepspeed"]
    if isinstance(found, dict):
        for what, least in (("seconds", 5.0), ("rss_mib", 1.0)):
            ours, theirs = ([item[what] for item in found[name]] for name in ("everstep", "ds_to_universal"))
            rows.append((f"ds_to_universal's {what} over ours", ratio(ours, theirs), least))
    return [{"name": n, "value": value, "bound": bound, "met": value >= bound} for n, value, bound in rows]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--millions", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="everstep-bench-", dir=given.folder) as name:
        copying = measure(given.megabytes, given.rounds, Path(name))
        conversion = convert(given.millions, given.rounds, Path(name))
    gigabytes = copying["bytes"] / 1e9
    summary = {
        kind: {name: round(gigabytes / median(times), 3) for name, times in copying[f"{kind}_s"].items()}
        for kind in ("save", "load")
    }
    result = {
        "benchmark": "checkpoint",
        "versions": {**versions(), "zarr": zarr.__version__},
        "gigabytes_per_s": summary,
        **copying,
        "conversion": conversion,
        "targets": targets(copying, conversion),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
