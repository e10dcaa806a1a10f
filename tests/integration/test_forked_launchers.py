"""Tests start most launchers as forks of one interpreter: a launcher so started is as one that is started by itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import JOBS, assert_same_run, finish, launch, read_result, reference
from tests.jobs.interpreter import Forked, launchers, surroundings

SCRIPT = """
import gc, importlib.util, json, os, signal, sys
from pathlib import Path

def process(pid):
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "signals": [status[name] for name in ("SigBlk", "SigIgn", "SigCgt")],
        "folder": os.readlink(f"/proc/{pid}/cwd"),
        "leads": os.getsid(int(status["Pid"])) == int(status["Pid"]),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")) if pid != launcher else None,  # its own come and go
        "nice": os.getpriority(os.PRIO_PROCESS, int(status["Pid"])),
        "network": os.readlink(f"/proc/{pid}/ns/net"),
    }

preloaded = os.getppid()
launcher = int(Path(f"/proc/{preloaded}/stat").read_text().rpartition(")")[2].split()[1])
print(json.dumps({
    "argv": sys.argv,
    "path": sys.path,
    "tests": [name for name in sys.modules if name.partition(".")[0] in ("tests", "forking")],
    "found": importlib.util.find_spec("tests") is not None,
    "environment": dict(os.environ),
    "collects": gc.isenabled(),
    "encodings": [(stream.encoding, stream.errors) for stream in (sys.stdin, sys.stdout, sys.stderr)],
    "worker": process(os.getpid()),
    "preloaded": process(preloaded),
    "launcher": process(launcher),
}), flush=True)
"""


def start(script: Path, *, forked: bool) -> dict[str, Any]:
    process = launch(script, ["an argument"], ["--nproc-per-node=1"], {"GIVEN": "here"}, forked=forked)
    assert isinstance(process, Forked) == forked
    output = finish(process)
    assert process.returncode == 0, output
    return json.loads(output.splitlines()[-1])


def test_a_fork_is_as_a_process_of_its_own(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    forked, typed = (start(script, forked=forked) for forked in (True, False))
    for found in (forked, typed):
        assert found["environment"]["GIVEN"] == "here"
        assert not found["found"], "scripts of jobs find modules of the tests"
    environments = [found.pop("environment") for found in (forked, typed)]
    assert environments[0].keys() == environments[1].keys()
    given = {name: value for name, value in surroundings({}).items() if not name.startswith("GRPC_")}  # the launcher's
    for environment in environments:  # the others differ from job to job
        assert environment.items() >= given.items()
    assert forked == typed


def test_the_bytes_are_those_of_a_process_of_its_own(tmp_path: Path) -> None:
    arguments = [json.dumps({"out": str(tmp_path), "steps": 8, "stages": 1})]
    process = launch(JOBS / "gpt_job.py", arguments, ["--nproc-per-node=2", f"--es-events={tmp_path}/events.jsonl"])
    assert not isinstance(process, Forked)
    output = finish(process)
    assert_same_run(read_result(tmp_path, process.returncode, output), reference(8))


@pytest.mark.parametrize("name", ["PYTHONHASHSEED", "LC_ALL", "OMP_NUM_THREADS"])
def test_what_an_interpreter_reads_at_its_start_takes_a_new_one(name: str) -> None:
    assert launchers.suits(surroundings({"EVERSTEP_FAULTS": "[]", "TMPDIR": os.getcwd()}))
    assert not launchers.suits(surroundings({name: "1"}))
