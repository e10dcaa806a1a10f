"""Plain torch scripts under `everstep run`: unchanged, with torchrun's flags, variables, restarts and reports."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import JOBS, Ended, command, everstep

DDP = str(JOBS / "ddp_job.py")
ENVIRONMENT = str(JOBS / "environment_job.py")
ROOT = str(JOBS.parent.parent)


def ddp(out: Path, *flags: str, **config: Any) -> tuple[Ended, list[dict[str, Any]]]:
    out.mkdir()
    ended = everstep("run", "--nproc_per_node=2", *flags, DDP, json.dumps({"out": str(out), **config}))
    return ended, [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]


def test_ddp_trains(tmp_path: Path) -> None:
    ended, ranks = ddp(tmp_path / "out")
    assert ended.status == 0, ended.stderr
    assert [found["attempt"] for found in ranks] == [0, 0]
    assert ranks[0]["total"] == ranks[1]["total"]


@pytest.mark.soak
def test_five_restarts_in_a_row(tmp_path: Path) -> None:
    """Each attempt has a rendezvous store of its own, and all workers are new."""
    ended, ranks = ddp(tmp_path / "out", "--max-restarts=5", failures=5)
    assert ended.status == 0, ended.stderr
    assert [found["attempt"] for found in ranks] == [5, 5]
    assert sorted(found["seen"] for found in ranks) == [1, 2]


@pytest.mark.soak
def test_restarts_run_out(tmp_path: Path) -> None:
    """Torch's own report, and one line with the rank and the signal, or the exit status and the recorded exception."""
    with ThreadPoolExecutor(2) as pool:
        killed = pool.submit(ddp, tmp_path / "killed", f"--log-dir={tmp_path}", "--max-restarts=1", failures=2)
        raised = pool.submit(ddp, tmp_path / "raised", f"--log-dir={tmp_path}", failures=1, **{"raise": True})
        ended, ranks = killed.result()
        failed, _ = raised.result()
    assert ended.status == 1
    assert ranks == []
    assert ended.stderr.strip().splitlines()[-1] == "everstep: error: rank 1 failed: killed by SIGKILL (rank 1)"
    assert "exitcode  : -9" in ended.stderr
    assert failed.status == 1
    assert failed.stderr.strip().splitlines()[-1] == "everstep: error: rank 0 failed: exit status 1 (rank 0)"
    assert "traceback : Traceback (most recent call last):" in failed.stderr
    assert "ValueError: an ordinary script's mistake" in failed.stderr


def environments(out: Path, module: str, flags: list[str], **extra: str) -> tuple[Ended, dict[int, dict[str, Any]]]:
    """What each rank found, under one launcher or the other."""
    out.mkdir()
    clean = {"OUT": str(out), **extra}
    ended = command(["-m", *module.split(), *flags], clean)
    return ended, {int(path.stem): json.loads(path.read_text()) for path in out.glob("*.json")}


VARIES = {"MASTER_PORT", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RUN_ID", "OUT", "MASTER_ADDR"}


def test_variables_are_torchruns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same names and values as a real torchrun gives, but for ports and ids."""
    for name in ("GRPC_ENABLE_FORK_SUPPORT", "GRPC_VERBOSITY"):  # of this process, if it has spoken to a coordinator
        monkeypatch.delenv(name, raising=False)
    flags = [
        f"--log-dir={tmp_path}/logs",
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=2",
        "--role=trainer",
        ENVIRONMENT,
        "a",
        "--b",
    ]
    with ThreadPoolExecutor(2) as pool:
        ours, theirs = pool.map(
            lambda item: environments(tmp_path / item[0], item[1], flags),
            (("ours", "everstep run"), ("theirs", "torch.distributed.run")),
        )
    assert (ours[0].status, theirs[0].status) == (0, 0), ours[0].stderr + theirs[0].stderr
    assert ours[1].keys() == theirs[1].keys() == {0, 1}
    for rank in (0, 1):
        mine, other = ours[1][rank], theirs[1][rank]
        assert {**mine, "environment": None} == {**other, "environment": None}
        found, expected = mine["environment"], other["environment"]
        assert found.pop("EVERSTEP_WORKER")
        assert found.keys() == expected.keys()
        assert {k: v for k, v in found.items() if k not in VARIES} == {
            k: v for k, v in expected.items() if k not in VARIES
        }


def launched(out: Path, *flags: str, **extra: str) -> tuple[Ended, dict[int, dict[str, Any]]]:
    ended, found = environments(out, "everstep run", list(flags), **extra)
    assert ended.status == 0, ended.stderr
    return ended, found


@pytest.mark.soak
def test_flags(tmp_path: Path) -> None:
    """What is run and how, where its output goes, and defaults from PET_* variables."""
    script = ENVIRONMENT
    jobs: dict[str, tuple[list[str], dict[str, str]]] = {
        "module": (["-m", "tests.jobs.environment_job", "x"], {"PYTHONPATH": ROOT}),
        "no_python": (["--no-python", "sh", "-c", "echo $RANK > $OUT/$RANK.json; echo $0", "${local_rank}"], {}),
        "run_path": (["--run-path", script, "x"], {}),
        "pet": ([script], {"PET_NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "3"}),
        "filter": (["--nproc-per-node=2", "--local-ranks-filter=1", script], {}),
        "redirects": (["--nproc-per-node=2", "-r", "3", f"--log-dir={tmp_path}/logs-r", script], {}),
        "tee": (["--nproc-per-node=2", "-t", "0:1,1:2", f"--log-dir={tmp_path}/logs-t", "--role=me", script], {}),
        "cpu": (["--nproc-per-node=auto", script], {}),
    }
    with ThreadPoolExecutor(3) as pool:
        done = dict(
            zip(
                jobs,
                pool.map(lambda name: launched(tmp_path / name, *jobs[name][0], **jobs[name][1]), jobs),
                strict=True,
            )
        )
    assert done["module"][1][0]["arguments"] == ["x"]
    assert done["module"][1][0]["name"] == "__main__"
    assert done["no_python"][1] == {0: 0}
    assert done["no_python"][0].stdout == "0\n"
    assert done["run_path"][1][0]["arguments"] == ["x"]
    assert done["pet"][1].keys() == {0, 1}
    assert done["pet"][1][0]["environment"]["OMP_NUM_THREADS"] == "3"
    assert len(done["cpu"][1]) == os.cpu_count()
    assert done["filter"][0].stdout == "output of rank 1\n"
    assert done["filter"][0].stderr == "error of rank 1\n"
    assert (done["redirects"][0].stdout, done["redirects"][0].stderr) == ("", "")
    logs = {"/".join(p.parts[-3:]): p.read_text() for p in (tmp_path / "logs-r").rglob("*.log") if p.stat().st_size}
    assert logs == {
        f"attempt_0/{rank}/{stream}.log": f"{kind} of rank {rank}\n"
        for rank in (0, 1)
        for stream, kind in (("stdout", "output"), ("stderr", "error"))
    }
    assert "[me0]:output of rank 0" in done["tee"][0].stdout
    assert "output of rank 1" in done["tee"][0].stdout
    assert "[me1]:error of rank 1" in done["tee"][0].stderr
