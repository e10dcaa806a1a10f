"""Every flag of torch's own parser: implemented, or refused with a reason; and the table of docs/torchrun.md."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from everstep.agents.launch.command import (
    configure,
    parse,
    parser,
)
from everstep.agents.launch.coordinator_flags import LaunchError
from everstep.agents.node.environment import virtual_rank
from tests.jobs import JOBS, finish, launch, wait_until
from tests.jobs.ports import free_port

ROOT = JOBS.parent.parent
ENVIRONMENT = JOBS / "environment_job.py"
PLUGIN = """
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

class Specs(DefaultLogsSpecs):
    def reify(self, envs):
        print("logs by a plugin", flush=True)
        return super().reify(envs)
"""


def plugin(folder: Path) -> Path:
    """A distribution with an entry point `torchrun.logs_specs`, to be put on the path."""
    info = folder / "plug-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "plug.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[torchrun.logs_specs]\nplugged = plug:Specs\n")
    return folder


@pytest.mark.soak
def test_many_flags_at_once(tmp_path: Path) -> None:
    """In the spelling with underscores. The launcher forwards its signal; a worker that ignores it is killed."""
    flags = {
        "nnodes": "1:1",
        "nproc_per_node": "2",
        "rdzv_backend": "c10d",
        "rdzv_endpoint": f"127.0.0.1:{free_port()}",
        "rdzv_id": "flags",
        "rdzv_conf": "join_timeout=30,last_call_timeout=0.1",
        "max_restarts": "0",
        "monitor_interval": "0.5",
        "start_method": "forkserver",
        "event_log_handler": "null",
        "role": "trainer",
        "log_dir": f"{tmp_path}/logs",
        "redirects": "0:2",
        "tee": "0:1,1:3",
        "duplicate_stdout_filters": "rank 1,no such line",
        "duplicate_stderr_filters": "no such line",
        "logs_specs": "plugged",
        "local_addr": "127.0.0.1",
        "signals_to_handle": "SIGTERM,SIGUSR1",
        "shutdown_timeout": "1",
    }
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    environment = {
        "OUT": str(tmp_path),
        "PYTHONPATH": str(plugin(tmp_path / "plugin")),
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "<${role_name} ${rank} ${local_rank}>",
    }
    launcher = launch(ENVIRONMENT, ["wait"], [*arguments, "--virtual_local_rank"], environment)
    wait_until(lambda: len(list(tmp_path.glob("*.waits"))) == 2, 60, "both workers wait")
    os.kill(launcher.pid, signal.SIGUSR1)
    output = finish(launcher, 20)
    assert launcher.returncode == 1
    assert "everstep: error: stopped by SIGUSR1" in output
    assert {path.read_text() for path in tmp_path.glob("*.signal")} == {"SIGUSR1"}
    assert "logs by a plugin" in output
    assert "<trainer 0 0>output of rank 0" in output
    assert "<trainer 1 1>error of rank 1" in output
    assert "error of rank 0" not in output
    (attempt,) = (tmp_path / "logs").glob("flags_*/attempt_0")
    assert (attempt / "0" / "stderr.log").read_text() == "error of rank 0\n"
    assert (attempt / "filtered_stdout.log").read_text() == "<trainer 1 1>output of rank 1\n"
    assert (attempt / "filtered_stderr.log").read_text() == ""
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())["environment"]
        assert (found["RANK"], found["LOCAL_RANK"], found["CUDA_VISIBLE_DEVICES"]) == (str(rank), "0", str(rank))
        assert (found["ROLE_NAME"], found["TORCHELASTIC_RUN_ID"]) == ("trainer", "flags")


@pytest.mark.soak
def test_defaults_by_variables(tmp_path: Path) -> None:
    """PET_* for every kind of flag; the command line wins; another interpreter by PYTHON_EXEC."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "another python: $*"\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    environment = {
        "OUT": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "PYTHON_EXEC": str(python),
        "PET_STANDALONE": "1",
        "PET_NPROC_PER_NODE": "2",
        "PET_NNODES": "1",
        "PET_ROLE": "not this one",
        "PET_TEE": "3",
        "PET_LOG_DIR": f"{tmp_path}/logs",
        "PET_LOCAL_RANKS_FILTER": "1",
        "PET_MODULE": "1",
        "PET_MAX_RESTARTS": "3",
    }
    launcher = launch("tests.jobs.environment_job", ["x"], ["--role=me"], environment)
    output = finish(launcher, 60)
    assert launcher.returncode == 0, output
    assert "[me1]:another python: -u -m tests.jobs.environment_job x" in output
    assert "[me1]:output of rank 1" in output
    assert "rank 0" not in output
    found = json.loads((tmp_path / "0.json").read_text())["environment"]
    assert (found["TORCHELASTIC_MAX_RESTARTS"], found["ROLE_NAME"]) == ("3", "me")


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--rdzv-backend=etcd-v2"], "nodes meet at everstep's own coordinator"),
        (["--rdzv-conf=colour=file"], "store_type, use_libuv, not colour"),
        (["--standalone", "--nnodes=2"], "--standalone is a job of one node"),
        (["--event-log-handler=console"], "see --es-events"),
        (["--numa-binding=node"], "no GPU is available"),
        (["--virtual-local-rank", "--nproc-per-node=2"], "CUDA_VISIBLE_DEVICES=5 names 1"),
        (["--logs-specs=nobody's"], "Could not find entrypoint"),
        (["--local-ranks-filter=a"], "comma-separated list of integers"),
        (["--nproc-per-node=many"], "Unsupported nproc_per_node"),
        (["--shutdown-timeout=-1"], "must be non-negative"),
        (["--no-python", "-m"], "Don't use both"),
        (["--max-restarts=-1"], "max_restarts must be >= 0"),
    ],
)
def test_refused(flags: list[str], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(LaunchError, match=re.escape(why)):
        configure(parse([*flags, str(ENVIRONMENT)]))


def test_a_virtual_rank_sees_its_own_gpu() -> None:
    assert virtual_rank({"CUDA_VISIBLE_DEVICES": "4, 6"}, 1) == {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "6"}
    assert virtual_rank({}, 1) == {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "1"}


def test_the_table_is_whole() -> None:
    """Each flag of torch's parser is in docs/torchrun.md, in its first spelling; each test named there exists."""
    table = (ROOT / "docs" / "torchrun.md").read_text()
    ours = {flag for action in parser()._actions for flag in action.option_strings}
    for action in get_args_parser()._actions:
        flags = [flag for flag in action.option_strings if "_" not in flag]
        assert set(action.option_strings) <= ours
        for flag in flags:
            assert f"`{flag}`" in table, f"docs/torchrun.md has no line for {flag}"
    names = set(re.findall(r"`(test_\w+)`", table))
    assert names, "docs/torchrun.md names no tests"
    defined = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert names <= defined, f"no such tests: {names - defined}"
