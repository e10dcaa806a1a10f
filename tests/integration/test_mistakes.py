"""What a user can get wrong: one line that says what to change, once, and nothing is left running."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.jobs import JOBS, Ended, command, everstep

SCRIPT = str(JOBS / "bad_job.py")

ANYWHERE = {
    "batch_size": "global_batch_size (7) must be a multiple of micro_batch_size (2)",
    "layers": "4 stages need at least as many layers, and the model has 3",
    "uncuttable": "Uncuttable cannot be cut into 2 stages: pass an nn.Sequential",
    "small_dataset": "the dataset has 5 samples, fewer than one batch (global_batch_size = 8)",
    "iterable": "the dataset must be map-style (have __len__ and __getitem__); got Stream",
    "foreign_parameters": "that the model lacks: build the optimizer from model.parameters()",
    "optimizer_state": "the optimizer has state already",
    "nothing": "nothing returned without calling run.prepare(...) or run.steps(...)",
    "prepare_stages": "run.prepare drives one stage, and the job has stages=2: use run.steps(...)",
    "scheduler": "the scheduler was built on the prepared optimizer",
    "no_step": "optimizer.step() was not called",
    "loss_shape": "loss_fn must return a tensor with one element",
    "buffer_changes": "changes its buffer 'calls' in forward",
}
IN_A_JOB = {
    "workers": "3 stages need at least as many workers; there are 2",
    "models_differ": "built another model than the others (for example 3.bias, 3.weight)",
    "values_differ": "initialised its model with other values than the others",
    "settings_differ": "give every rank the same settings",
    "optimizers_differ": "built another optimizer than the others",
}

# One interpreter that imports torch once and forks a child per case: each child is `python bad_job.py CASE`.
ALONE = """
import json, os, runpy, sys, traceback
from everstep.agents.preload import warm_up
warm_up([])
script, results = sys.argv[1], {}
for case in sys.argv[2:]:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 1), os.dup2(write, 2), os.close(read), os.close(write)
        sys.argv, code = [script, case], 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)
    os.close(write)
    with open(read) as stream:
        text = stream.read()
    results[case] = (os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text)
print(json.dumps(results))
"""


def test_alone() -> None:
    """The script started by itself, without the launcher."""
    ended = command(["-c", ALONE, SCRIPT, *ANYWHERE])
    assert ended.status == 0, ended.stderr
    for case, (status, text) in json.loads(ended.stdout).items():
        assert ANYWHERE[case] in Ended(status, "", text).error(), (case, text)
    assert ANYWHERE["iterable"] in command([SCRIPT, "iterable"]).error()


def test_in_a_job() -> None:
    """The same under the launcher, on two ranks; and what only ranks that differ can get wrong."""
    cases = {
        case: ANYWHERE[case] for case in ("batch_size", "uncuttable", "nothing", "scheduler", "no_step")
    } | IN_A_JOB
    with ThreadPoolExecutor(3) as pool:
        ended = dict(
            zip(
                cases, pool.map(lambda case: everstep("run", "--nproc-per-node", "2", SCRIPT, case), cases), strict=True
            )
        )
    for case, text in cases.items():
        line = ended[case].error()
        assert text in line, (case, line)
        assert "rank " in line or case == "workers", (case, line)
        assert ended[case].status == 1


LINES = {
    "no_such.py": "no such script: no_such.py",
    "--rdzv-endpoint=nowhere:port --nnodes=2 SCRIPT": "--rdzv-endpoint must be HOST:PORT, got 'nowhere:port'",
    "--rdzv-endpoint=:29 SCRIPT": "--rdzv-endpoint must be HOST:PORT, got ':29'",
    "--nnodes=2 --rdzv-endpoint=127.0.0.1:FREE --rdzv-conf=join_timeout=2 SCRIPT": "only 1 of at least 2 nodes joined",
    "--rdzv-endpoint=127.0.0.1:TAKEN SCRIPT": "is in use: choose another port in --rdzv-endpoint",
    "--nnodes=2 --rdzv-endpoint=127.0.0.1:TAKEN --rdzv-conf=join_timeout=1 SCRIPT": "no coordinator answers at",
    "--nnodes=2 --rdzv-endpoint=192.0.2.1:29400 --rdzv-conf=join_timeout=1 SCRIPT": "no coordinator answers at",
    "--local-addr=192.0.2.1 SCRIPT": "the snapshot keeper of node",
    "--es-preload=no_such_module SCRIPT": "no_such_module",
    "--rdzv-conf=join_timeout=soon SCRIPT": "join_timeout must be a number of seconds, got 'soon'",
    "--nnodes=two SCRIPT": "--nnodes",
    "--nproc-per-node=many SCRIPT": "many",
    "--es-events=/no/such/folder/events SCRIPT": "--es-events /no/such/folder/events: No such file or directory",
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_command_lines() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, ThreadPoolExecutor(3) as pool:

        def run(line: str) -> Ended:
            for name, value in (
                ("TAKEN", str(taken.getsockname()[1])),
                ("FREE", str(free_port())),
                ("SCRIPT", f"{SCRIPT} nothing"),
            ):
                line = line.replace(name, value)
            return everstep("run", *line.split())

        ended = dict(zip(LINES, pool.map(run, LINES), strict=True))
    for line, text in LINES.items():
        assert text in ended[line].error(), (line, ended[line])


def test_an_exception_ends_the_job_once(tmp_path: object) -> None:
    """The user's traceback and the rank; exit 1, no restart; the error files that torch's tools read."""
    error_file = f"{tmp_path}/error.json"
    ended = everstep(
        "run",
        "--nproc-per-node=2",
        "--max-restarts=3",
        f"--log-dir={tmp_path}",
        SCRIPT,
        "exception",
        environment={"TORCHELASTIC_ERROR_FILE": error_file},
    )
    assert ended.status == 1
    lines = ended.stderr.strip().splitlines()
    assert lines[-1] == "everstep: error: ValueError: the user's own mistake (rank 1)"
    assert lines[0] == "Traceback (most recent call last):"
    assert "bad_job.py" in lines[1]
    assert ended.stderr.count("Traceback") == 1
    with open(error_file) as stream:
        assert "the user's own mistake" in stream.read()


def test_a_user_exit_ends_the_job_once(tmp_path: object) -> None:
    ended = everstep("run", "--nproc-per-node=2", "--max-restarts=3", f"--log-dir={tmp_path}", SCRIPT, "exits")
    assert ended.status == 1
    assert ended.stderr.strip().splitlines()[-1] == "everstep: error: SystemExit: 3 (rank 0)"


def test_alone_an_exception_is_the_users() -> None:
    ended = command([SCRIPT, "exits"])
    assert ended.status == 3
    assert ended.stderr == ""


@pytest.mark.parametrize("arguments", [["status", "127.0.0.1:1"], ["status", "nowhere"], ["wrong"]])
def test_other_commands(arguments: list[str]) -> None:
    ended = everstep(*arguments, environment={"PYTHONSTARTUP": ""}, timeout_s=20)
    assert ended.status == 2
    assert ended.stderr.startswith("everstep: error: ")
    assert "Traceback" not in ended.stderr


def test_help_needs_no_job() -> None:
    for arguments in (["--help"], ["--version"], ["run", "--help"], ["coordinator", "--help"]):
        ended = everstep(*arguments)
        assert ended.status == 0
        assert ended.stderr == ""
