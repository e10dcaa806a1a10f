"""Imports before the fork leave workers able to compute, and to use a device."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from everstep.agents.launch.command import (
    _unseen_devices,
    configure,
    parse,
)
from everstep.agents.launch.coordinator_flags import LaunchError
from everstep.agents.node.environment import variables
from everstep.agents.node.forkable import in_a_fork
from everstep.agents.node.imports import Import
from everstep.agents.node.preloader import Preloader
from tests.jobs import command

# A device that torch considers the machine's accelerator: autograd starts a thread for it, as it does for a GPU.
ACCELERATOR = """
import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
_setup_privateuseone_for_python_backend("standin")
"""
ASKED = """
import torch
asked = []
def record(module, name):
    real = getattr(module, name)
    def recording(*arguments, **options):
        if name != "current_accelerator" or options.get("check_available") or arguments:
            asked.append(f"{module.__name__}.{name}")
        return real(*arguments, **options)
    setattr(module, name, recording)
for name in ("current_accelerator", "is_available", "device_count", "current_stream"):
    record(torch.accelerator, name)
for module in (torch.cuda, torch.xpu):
    for name in ("_lazy_init", "is_available", "device_count", "current_device"):
        record(module, name)
"""
TRAIN = """
def train():
    model = torch.nn.Linear(64, 64)
    model(torch.ones(1, 64)).sum().backward()
    torch.optim.AdamW(model.parameters()).step()
"""
# Prints the exit status of a fork of this process; "hung" after 20 s.
FORK = """
import os, select, signal
def fork(action):
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:
            print(error, flush=True)
            os._exit(1)
    pidfd = os.pidfd_open(pid)
    if not select.select([pidfd], [], [], 20)[0]:
        os.kill(pid, signal.SIGKILL)
        print("hung", flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
PARALLEL = """
import torch
torch.ones(1 << 22).sum()
"""


def outcome(*parts: str, path: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path or "")}
    command = [sys.executable, "-W", "error", "-c", "\n".join(parts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def answer(modules: list[str], environment: dict[str, str]) -> dict[str, object]:
    """The first message of a preloaded process."""
    with variables(environment):
        preloader = Preloader.start([Import(name, asked=True) for name in modules])
    try:
        assert select.select([preloader], [], [], 60)[0]
        return preloader.answer() or {}
    finally:
        preloader.close()


def test_no_device_is_asked_for() -> None:
    warm_up = "from everstep.agents.node.preload import warm_up\nwarm_up([])\nprint(asked)"
    assert outcome(ASKED, warm_up) == "[]"
    assert "torch.accelerator.current_accelerator" in outcome(ASKED, TRAIN, "train()\nprint(asked)"), "nobody records"


def test_forks_train_where_there_is_an_accelerator() -> None:
    warm_up = "from everstep.agents.node.preload import warm_up\nwarm_up([])\nfork(train)"
    assert outcome(ACCELERATOR, TRAIN, FORK, warm_up) == "0"
    refused = outcome(ACCELERATOR, TRAIN, FORK, "train()\nfork(train)")
    assert "Unable to handle autograd's threading" in refused, "the stand-in is no stand-in"


def test_a_full_collection_in_a_worker_does_not_traverse_what_was_imported(tmp_path: Path) -> None:
    script = tmp_path / "counts.py"
    script.write_text(
        "import gc\nprint(gc.isenabled(), gc.get_freeze_count() > 100_000, len(gc.get_objects()) < 50_000)\n"
    )
    ended = command(["-m", "everstep", "run", "--nproc-per-node=1", str(script)])
    assert ended.stdout.split() == ["True"] * 3, ended.stderr


def test_an_import_that_computes_leaves_forks_that_compute(tmp_path: Path) -> None:
    """On one thread: a fork has no thread pool, and would wait forever for one that its parent had."""
    (tmp_path / "parallel.py").write_text(PARALLEL)
    work = "def work():\n    torch.set_num_threads(2)\n    torch.ones(1 << 22).sum()"
    two = "import torch\ntorch.set_num_threads(2)"
    warm_up = "from everstep.agents.node.preload import Import, warm_up\nwarm_up([Import('parallel')])"
    assert outcome(two, work, FORK, warm_up, "fork(work)", path=tmp_path) == "0"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("torch.nn.Linear(2, 2)(torch.ones(1, 2)).sum().backward()", "threads for backward passes on devices"),
        ("torch.cuda.is_initialized = lambda: True", "torch has initialised CUDA"),
        ("torch.set_num_threads(2); torch.ones(1 << 22).sum()", "compute on 2 threads"),
    ],
)
def test_an_import_after_which_no_fork_works_is_named(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "spoils.py").write_text(f"{ACCELERATOR}\n{text}")
    said = answer(["spoils"], {"PYTHONPATH": str(tmp_path)})
    assert said["kind"] == "failed"
    assert "the import of 'spoils'" in str(said["why"])
    assert why in str(said["why"])
    assert "Leave the module out of --es-preload" in str(said["why"])


def test_an_ordinary_import_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "fine.py").write_text("import torch\ntorch.set_num_threads(2)\ntorch.cuda.is_available()")
    assert answer(["fine"], {"PYTHONPATH": str(tmp_path)}) == {"kind": "ready"}


def test_devices_are_counted_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    script, askers = tmp_path / "train.py", tmp_path / "askers"
    script.touch()

    def available() -> bool:
        with askers.open("a") as file:
            file.write(json.dumps([os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")]) + "\n")
        return True

    monkeypatch.setattr(torch.cuda, "is_available", available)
    monkeypatch.setattr(torch.accelerator, "is_available", available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    for number in ("gpu", "auto"):
        assert configure(parse([f"--nproc-per-node={number}", str(script)])).torch.nproc_per_node == 3
    configure(parse(["--numa-binding=node", str(script)]))
    asked = [json.loads(line) for line in askers.read_text().splitlines()]
    here = [visible for pid, visible in asked if pid == os.getpid()]
    assert len(asked) - len(here) == 3
    assert set(here) == {""}, "torch's launcher asks for CUDA, and is to find none"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_torch_finds_no_device_without_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch's launcher queries while no device is visible loads neither CUDA nor its management library."""

    def asked(*arguments: object) -> int:
        raise AssertionError("a device was asked for")

    monkeypatch.setattr(torch.cuda, "_is_compiled", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", asked, raising=False)
    monkeypatch.setattr(torch.cuda, "_raw_device_count_nvml", asked)
    with _unseen_devices():
        assert not torch.cuda.is_available()
    with pytest.raises(AssertionError, match="a device was asked for"):
        torch.cuda.is_available()


def test_devices_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "train.py"
    script.touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LaunchError, match="--nproc-per-node=gpu: Cuda is not available"):
        configure(parse(["--nproc-per-node=gpu", str(script)]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(LaunchError, match="--nproc-per-node=gpu: there are no such devices"):
        configure(parse(["--nproc-per-node=gpu", str(script)]))


@pytest.mark.parametrize("count", ["0", "-1"])
def test_a_node_has_at_least_one_worker(tmp_path: Path, count: str) -> None:
    script = tmp_path / "train.py"
    script.touch()
    with pytest.raises(LaunchError, match=f"--nproc-per-node={count}: expected at least one worker"):
        configure(parse([f"--nproc-per-node={count}", str(script)]))


def test_a_fork_that_is_asked_may_die() -> None:
    assert in_a_fork(lambda: 7) == (7, "")
    assert in_a_fork(lambda: os._exit(3)) == (0, "the process that asked ended with status 3")
