"""Faulty sources and disks: one line, an exit status, nothing written, nothing executed."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.jobs import Ended, command

from .commands import Commands, safetensors

STEP = "global_step3"
RANK_1 = f"{STEP}/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
ITERATION = "iter_0000003"
# name -> the fixture of the samples, and the checkpoint in it
SAMPLES = {
    "deepspeed": ("deepspeed_samples", "z1-bf16"),
    "zero3": ("deepspeed_samples", "z3-bf16"),
    "deepspeed-universal": ("deepspeed_samples", "z2-bf16/global_step3_universal"),
    "megatron": ("megatron_samples", "buckets"),
    "megatron-legacy": ("megatron_samples", "buckets/legacy"),
    "dcp": ("fsdp_samples", "nested/checkpoint"),
    "hf": ("transformers_samples", "sharded/model"),
    "hf-pickled": ("transformers_samples", "pickled/model"),
}
Change = Callable[[Path], object]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


@pytest.fixture
def copy(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        if name == "universal":
            shapes = {f"w{number}": (4, 3) for number in range(3)}
            model = safetensors(tmp_path / "of" / "model.safetensors", shapes)
            ended = command(["-m", "everstep", "convert", str(model), str(tmp_path / "source"), "--to", "universal"])
            assert ended.status == 0
            shutil.rmtree(model)
            return tmp_path / "source"
        fixture, checkpoint = SAMPLES[name]
        left = shutil.ignore_patterns("*_universal", "truth_*") if name == "deepspeed" else None
        source = request.getfixturevalue(fixture) / checkpoint
        return Path(shutil.copytree(source, tmp_path / "source", symlinks=True, ignore=left))

    return make


def without(file: str) -> Change:
    def change(folder: Path) -> None:
        path = folder / file
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def short(file: str) -> Change:
    return lambda folder: os.truncate(folder / file, (folder / file).stat().st_size // 2)


def written(file: str, text: str) -> Change:
    return lambda folder: (folder / file).write_text(text)


def another_step(folder: Path) -> None:
    """The optimizer of rank 1 is four steps ahead."""
    data = (folder / RANK_1).read_bytes()
    at = data.index(np.float32(3).tobytes())  # the only three there is among float32 numbers
    (folder / RANK_1).write_bytes(data[:at] + np.float32(7).tobytes() + data[at + 4 :])


def another_iteration(folder: Path) -> None:
    path = folder / ITERATION / "mp_rank_01_000" / "model_optim_rng.pt"
    torch.save(torch.load(path, weights_only=False) | {"iteration": 2}, path)


def another_save(folder: Path) -> None:
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors")


def renamed(folder: Path) -> None:
    (folder / ITERATION).rename(folder / "iter_0000004")
    (folder / "latest_checkpointed_iteration.txt").write_text("4")


def flipped(folder: Path) -> None:
    path = folder / "params" / "w1" / "c" / "0" / "0"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def of_the_future(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"version": 9}))


BAD: list[tuple[str, Change, str]] = [
    ("universal", without("manifest.json"), "not a checkpoint of any known format"),
    ("universal", of_the_future, "written in version 9 of the format; this everstep reads version 1: use a newer"),
    ("universal", short("manifest.json"), "manifest.json is damaged"),
    ("universal", written("manifest.json", "{}"), "is not the manifest of an everstep checkpoint"),
    ("universal", flipped, "params/w1/c/0/0 is damaged: its checksum is"),
    ("universal", without("params/w1/c/0/0"), "params/w1/c/0/0 is missing"),
    ("universal", short("params/w1/c/0/0"), "params/w1/c/0/0 is damaged: 24 bytes, expected 48"),
    ("deepspeed", without("latest"), "not a checkpoint of any known format|no DeepSpeed checkpoint"),
    (
        "deepspeed",
        written("latest", "../../etc"),
        "names the tag '../../etc'; expected|not a checkpoint of any",
    ),
    ("deepspeed", without(RANK_1), "half-written: the job had 2 data-parallel .*missing: bf16_zero_pp_rank_1_mp_ra"),
    ("deepspeed", without(f"{STEP}/mp_rank_00_model_states.pt"), "half-written|no DeepSpeed checkpoint"),
    ("deepspeed", short(RANK_1), "rank_1_mp_rank_00_optim_states.pt: torn"),
    ("deepspeed", another_step, "mixed checkpoints: step of .* is 3.0 in bf16_zero_pp_rank_0.* and 7.0 in bf16_zero"),
    ("zero3", without(f"{STEP}/zero_pp_rank_1_mp_rank_00_model_states.pt"), "missing|half-written"),
    ("deepspeed-universal", without("zero/scale/fp32.pt"), "zero/scale/fp32.pt: is missing"),
    ("deepspeed-universal", without("zero/scale"), "zero/scale: is missing"),
    ("megatron", without(f"{ITERATION}/.metadata"), "no .metadata"),
    ("megatron", without(f"{ITERATION}/common.pt"), "no common.pt"),
    ("megatron", without(f"{ITERATION}/__1_0.distcp"), "__1_0.distcp: No such file"),
    ("megatron", short(f"{ITERATION}/__1_0.distcp"), "__1_0.distcp: torn"),
    ("megatron", renamed, "mixed: it holds iteration 3; its name says 4"),
    ("megatron", written("latest_checkpointed_iteration.txt", "9"), "iter_0000009: there is no such folder"),
    ("megatron-legacy", without(f"{ITERATION}/mp_rank_01_000"), "missing: mp_rank_01_000"),
    ("megatron-legacy", short(f"{ITERATION}/mp_rank_01_000/model_optim_rng.pt"), "model_optim_rng.pt: torn"),
    ("megatron-legacy", another_iteration, "mixed: iteration 2, but mp_rank_00_000 has 3"),
    ("dcp", without(".metadata"), "no .metadata"),
    ("dcp", short(".metadata"), "its pickle cannot be read"),
    ("dcp", without("__1_0.distcp"), "__1_0.distcp: No such file"),
    ("dcp", short("__1_0.distcp"), "__1_0.distcp: torn"),
    ("hf", without("model-00002-of-00003.safetensors"), "model-00002-of-00003.safetensors: cannot be read: No such"),
    ("hf", short("model-00002-of-00003.safetensors"), "model-00002-of-00003.safetensors: torn"),
    ("hf", without("model.safetensors.index.json"), "3 safetensors files and no model.safetensors.index.json"),
    ("hf", written("config.json", "{"), "config.json: cannot be read as JSON"),
    ("hf", another_save, "the files are of different saves"),
]


@pytest.mark.parametrize(
    ("name", "change", "message"), BAD, ids=[f"{name}-{number}" for number, (name, *_) in enumerate(BAD)]
)
def test_bad_sources(name: str, change: Change, message: str, copy: Callable[[str], Path], run: Commands) -> None:
    source = copy(name)
    change(source)
    assert re.search(message, run.refused(source))
    if change in (flipped,):
        assert "is damaged" in run("verify", source).stdout
    assert run.refused(source, "--from", {"zero3": "deepspeed"}.get(name, name))


def test_what_is_no_checkpoint(tmp_path: Path, run: Commands) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    (tmp_path / "notes.txt").write_text("no checkpoint")
    forms = ("universal", "deepspeed", "deepspeed-universal", "megatron", "megatron-legacy", "dcp", "hf")
    for source in (folder, tmp_path / "notes.txt", tmp_path / "nowhere", Path("/dev/null")):
        for command_ in (["inspect", source], ["verify", source], ["diff", source, source]):
            assert run(*command_).error()
        if source.parent == tmp_path:
            for arguments in ([], *(["--from", form] for form in forms)):
                assert str(source) in run.refused(source, *arguments)
    assert "there is no such file or folder" in run.refused(tmp_path / "nowhere")
    assert "not a checkpoint of any known format" in run.refused(folder)


class Trap:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("deepspeed", f"{STEP}/mp_rank_00_model_states.pt"),
        ("deepspeed", RANK_1),
        ("zero3", f"{STEP}/zero_pp_rank_1_mp_rank_00_model_states.pt"),
        ("deepspeed-universal", "mp_rank_00_model_states.pt"),
        ("deepspeed-universal", "zero/scale/exp_avg.pt"),
        ("deepspeed-universal", "zero/optimizer_state.pt"),
        ("megatron", f"{ITERATION}/common.pt"),
        ("megatron", f"{ITERATION}/.metadata"),
        ("megatron-legacy", f"{ITERATION}/mp_rank_01_000/model_optim_rng.pt"),
        ("dcp", ".metadata"),
        ("hf-pickled", "pytorch_model.bin"),
    ],
)
def test_code_is_refused_by_name(name: str, file: str, copy: Callable[[str], Path], run: Commands) -> None:
    source = copy(name)
    canary = source / "executed"
    if file.endswith(".metadata"):
        (source / file).write_bytes(pickle.dumps(Trap(canary)))
    else:
        torch.save({"module": Trap(canary)}, source / file)
    message = run.refused(source)
    assert f"{file.rpartition('/')[2]}: refused: its pickle asks for " in message
    assert message.endswith("nothing of it was executed")
    for action in (
        ["inspect", source],
        ["diff", source, source],
        ["convert", source, "out", "--to", "hf", "--dry-run"],
    ):
        assert "refused" in run(*action).error()
    assert not canary.exists()


AS_NOBODY = """
import importlib, locale, os, pkgutil, sys
import everstep.checkpoint_commands, everstep.checkpointing.convert as convert
for module in pkgutil.walk_packages(convert.__path__, f"{convert.__name__}."):
    importlib.import_module(module.name)
if os.geteuid() == 0:
    os.setgroups([])
    os.setegid(65534)
    os.seteuid(65534)
from everstep.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user may enter."""
    with tempfile.TemporaryDirectory(prefix="everstep-public-") as name:
        Path(name).chmod(0o777)
        yield Path(name)
        for path in (Path(name), *Path(name).rglob("*")):
            if path.is_dir():
                path.chmod(0o777)


@pytest.mark.parametrize("name", ["universal", *SAMPLES])
def test_without_permission(name: str, copy: Callable[[str], Path], public: Path) -> None:
    source = public / "source"
    shutil.move(copy(name), source)

    def convert() -> Ended:
        ended = command(["-c", AS_NOBODY, "convert", str(source), str(public / "out"), "--to", "universal"])
        assert sorted(os.listdir(public)) == ["source"]
        return ended

    source.chmod(0)
    assert "ermission denied" in convert().error()
    source.chmod(0o755)
    for path in source.rglob("*"):
        if path.is_file():
            path.chmod(0)
    assert "ermission denied" in convert().error()


def test_a_destination_without_permission(public: Path) -> None:
    source = safetensors(public / "model" / "model.safetensors", {"w": (3,)})
    (public / "mine").mkdir()
    (public / "mine").chmod(0o555)
    for to in ("universal", "hf"):
        ended = command(["-c", AS_NOBODY, "convert", str(source), str(public / "mine" / "out"), "--to", to])
        assert re.search(f"cannot write {public}/mine/out.*: Permission denied", ended.error())
    assert os.listdir(public / "mine") == []


LIMITED = """
import resource, sys
from everstep.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""
WRITERS = ("universal", "deepspeed", "deepspeed-universal", "dcp", "hf")


@pytest.mark.parametrize("to", [*WRITERS, "megatron"])
def test_files_that_cannot_grow(to: str, tmp_path: Path, run: Commands) -> None:
    """A disk that is full while a tensor is written: what is written stays for the next attempt."""
    names = {f"decoder.layers.{n}.mlp.linear_fc2.weight": (256, 512) for n in range(3)}
    source = safetensors(tmp_path / "model" / "model.safetensors", names)
    arguments = ["convert", str(source), str(tmp_path / "out"), "--to", to]
    ended = command(["-c", LIMITED, str(500_000), *arguments])
    message = ended.error()
    assert message.startswith(f"cannot write {tmp_path}/out"), message
    assert "File too large" in message
    assert not (tmp_path / "out").exists()
    run.done(*arguments)
    run.done("diff", source, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["model", "out"]


@pytest.mark.parametrize("to", ["universal", "hf", "dcp"])
def test_a_full_disk(to: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        names = {f"decoder.layers.{n}.mlp.linear_fc2.weight": (256, 256) for n in range(8)}
        source = safetensors(tmp_path / "model" / "model.safetensors", names)
        message = command(["-m", "everstep", "convert", str(source), str(disk / "out"), "--to", to]).error()
        assert message.startswith(f"cannot write {disk}/out")
        assert "No space left on device" in message
        assert not (disk / "out").exists()
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


MEASURED = """
import sys
from pathlib import Path
from everstep.cli import main
assert main(sys.argv[1:]) == 0
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(status["VmHWM"].split()[0])
"""


def peak_bytes(*arguments: str | Path) -> int:
    """The peak memory of a command. `wait4` is of no help: its number includes the parent's memory at the fork."""
    ended = command(["-c", MEASURED, *map(str, arguments)])
    assert ended.status == 0, ended.stderr
    return int(ended.stdout) * 1024


@pytest.mark.parametrize("to", ["universal", "deepspeed-universal", "hf"])
def test_memory_is_bounded(to: str, tmp_path: Path) -> None:
    """300 MiB of numbers, of which the largest tensor is 32 MiB."""
    largest, budget_mib = 32 << 20, 24
    shapes = {f"large{n}": (4096, 2048) for n in range(5)} | {f"small{n}": (1024, 256) for n in range(140)}
    small = safetensors(tmp_path / "small" / "model.safetensors", {"w": (3,)})
    large = safetensors(tmp_path / "large" / "model.safetensors", shapes, seed=None)
    arguments = ("--to", to, "--memory", str(budget_mib), "--threads", "4")
    baseline = peak_bytes("convert", small, tmp_path / "a", *arguments)
    found = peak_bytes("convert", large, tmp_path / "b", *arguments)
    shutil.rmtree(tmp_path / "b")
    assert found - baseline < 2 * largest + (budget_mib << 20)
    assert found - baseline > largest // 2  # or nothing was measured
