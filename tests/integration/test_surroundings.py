"""What a job is started in: streams that are closed or full, odd encodings, ignored signals, folders whose files are
named like Python's own modules. What a script does by itself there it does under the launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.jobs import JOBS, command, finish, launch, wait_until
from tests.jobs.ports import free_port

SCRIPT = JOBS / "gpt_job.py"


def job(out: Path, steps: int = 3) -> list[str]:
    out.mkdir(exist_ok=True)
    return [json.dumps({"out": str(out), "steps": steps, "stages": 1})]


def shell(line: str) -> list[str]:
    """The prefix of a command that a shell starts like this; `"$@"` stands for the command."""
    return ["sh", "-c", line, "sh"]


@pytest.mark.parametrize(
    "line",
    [
        'exec "$@" >&-',
        'exec "$@" 2>&-',
        'exec "$@" <&- >&- 2>&-',
        'exec "$@" >/dev/full 2>&1',
        'trap "" CHLD; exec "$@"',
        'trap "" PIPE; exec "$@"',
    ],
)
def test_a_job_runs_whatever_it_inherits(tmp_path: Path, line: str) -> None:
    process = launch(SCRIPT, job(tmp_path), ["--nproc-per-node=2"], inside=shell(line))
    output = finish(process)
    assert process.returncode == 0, output
    assert len(list(tmp_path.glob("worker-*"))) == 2


NOT_INSTALLED = """
from importlib import metadata
found = metadata.distribution
def distribution(name):
    if name == "everstep":
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.distribution = distribution
"""


def test_sources_on_the_path_run_without_being_installed(tmp_path: Path) -> None:
    """As on a machine without a package index: no package manager has everstep there."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(NOT_INSTALLED)
    root = Path(__file__).parents[2]
    environment = {"PYTHONPATH": os.pathsep.join(map(str, (site, root)))}
    checkpoint = f"--es-checkpoint={tmp_path}/checkpoint"
    process = launch(SCRIPT, job(tmp_path / "out"), ["--nproc-per-node=2", checkpoint], environment)
    output = finish(process)
    assert process.returncode == 0, output
    assert list((tmp_path / "checkpoint").iterdir())


BROKEN = """
import os
from everstep.agents.coordinator import process
def broken(*arguments):
    raise ZeroDivisionError("a coordinator with a bug")
process.serve = broken
task = process.Task(job="j", host="127.0.0.1", port=0, config=process.Config(), store="")
process._child(task, os.open(os.devnull, os.O_WRONLY))
"""


def test_a_coordinator_that_cannot_begin_says_why() -> None:
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "ZeroDivisionError: a coordinator with a bug" in done.stderr


def test_blocked_signals_still_end_a_job(tmp_path: Path) -> None:
    blocked = (
        "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals());"
        "os.execvp(sys.argv[1], sys.argv[1:])"
    )
    process = launch(SCRIPT, job(tmp_path, 100_000), ["--nproc-per-node=2"], inside=[sys.executable, "-c", blocked])
    wait_until(lambda: any(path.read_text() for path in tmp_path.glob("worker-*")), 60, "a step")
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert process.returncode == 1, output


def test_who_reads_the_log_may_go(tmp_path: Path) -> None:
    """Standard error is a pipe without a reader: a replaced worker is still replaced."""
    events = tmp_path / "events"
    faults = json.dumps([{"rank": 1, "phase": "compute", "step": 2}])
    flags = ["--nproc-per-node=2", "--es-log=text", f"--es-events={events}"]
    process = launch(
        SCRIPT, job(tmp_path), flags, {"EVERSTEP_FAULTS": faults}, inside=shell('exec "$@" 2>&1 >/dev/null | true')
    )
    finish(process)
    wait_until(lambda: '"ended"' in (events.read_text() if events.exists() else ""), 120, "the job's end")
    assert json.loads(events.read_text().splitlines()[-1])["succeeded"]


ODD = [
    {"LC_ALL": "C"},
    {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "utf-8"},
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "ascii:replace"},
    {"PYTHONUTF8": "1", "LC_ALL": "POSIX"},
]


@pytest.mark.parametrize("environment", [{}, {"PYTHONUNBUFFERED": "1"}])
def test_the_lines_of_ranks_are_not_mixed(tmp_path: Path, environment: dict[str, str]) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nfor number in range(3000):\n    print('line', number, 'of rank', os.environ['RANK'])\n"
    )
    process = launch(script, [], ["--nproc-per-node=2"], environment=environment)
    output = finish(process)
    expected = {f"line {number} of rank {rank}" for number in range(3000) for rank in range(2)}
    assert process.returncode == 0, output
    assert set(output.splitlines()) >= expected


@pytest.mark.parametrize("environment", ODD, ids=str)
def test_a_script_prints_as_it_does_by_itself(tmp_path: Path, environment: dict[str, str]) -> None:
    script = tmp_path / "letters.py"
    script.write_text(
        'import sys\nprint("loss \\u2193 h\\xe4\\xdflich \\u0130", sys.stdout.encoding, sys.stdout.errors)\n'
    )
    everywhere = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))},
        **environment,
    }
    alone = subprocess.run([sys.executable, str(script)], capture_output=True, env=everywhere)
    line = [sys.executable, "-m", "everstep", "run", "--nproc-per-node=1", str(script)]
    launched = subprocess.run(line, capture_output=True, env=everywhere, timeout=120)
    assert (launched.returncode, launched.stdout) == (alone.returncode, alone.stdout), launched.stderr


@pytest.mark.parametrize("environment", [*ODD, {"TERM": ""}, {"TERM": "dumb"}, {"COLUMNS": "20"}], ids=str)
def test_commands_under_odd_locales(watched: str, environment: dict[str, str]) -> None:
    for arguments in (["status"], ["top", "--once"], ["events"]):
        ended = command(["-m", "everstep", arguments[0], watched, *arguments[1:]], environment)
        assert (ended.status, "Traceback" in ended.stderr) == (0, False), (arguments, ended)


@pytest.mark.parametrize("arguments", [["status", "AT"], ["top", "--once", "AT"], ["events", "AT"], ["--help"], []])
def test_a_closed_pipe_is_no_error(watched: str, arguments: list[str]) -> None:
    line = [sys.executable, "-m", "everstep", *(watched if word == "AT" else word for word in arguments)]
    reads, writes = os.pipe()
    os.close(reads)
    ended = subprocess.run(line, stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    assert "Traceback" not in ended.stderr
    assert "Exception" not in ended.stderr
    assert ended.returncode == (2 if not arguments else 0)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The coordinator of a job that runs."""
    out = tmp_path_factory.mktemp("watched")
    at = f"127.0.0.1:{free_port()}"
    process = launch(SCRIPT, job(out, 1_000_000), ["--nproc-per-node=1", f"--rdzv-endpoint={at}"])
    wait_until(lambda: any(path.read_text() for path in out.glob("worker-*")), 60, "a step")
    yield at
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


SHADOWS = ("queue", "random", "types", "signal", "socket", "json", "select", "logging", "tempfile", "ssl")


@pytest.mark.soak
def test_files_named_like_standard_modules(tmp_path: Path) -> None:
    """In the working folder: helper processes, also restarted ones, do not mistake them for Python's."""
    here = tmp_path / "here"
    here.mkdir()
    for name in SHADOWS:
        (here / f"{name}.py").write_text(f"raise SystemExit('the working folder has {name}.py, and it was imported')\n")
    (here / "everstep").mkdir()
    (here / "everstep" / "cli.py").write_text("raise SystemExit('another everstep')\n")
    program = Path(sys.executable).with_name("everstep")
    out, checkpoints = tmp_path / "out", tmp_path / "checkpoints"
    faults = json.dumps([{"rank": 1, "phase": "compute", "step": 2}])
    process = subprocess.Popen(
        [
            str(program),
            "run",
            "--nproc-per-node=2",
            f"--es-checkpoint={checkpoints}",
            "--es-checkpoint-every=1",
            str(SCRIPT),
            *job(out, 4),
        ],
        cwd=here,
        env={**os.environ, "EVERSTEP_FAULTS": faults},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    output = finish(process)
    assert process.returncode == 0, output
    assert "it was imported" not in output
    assert any(checkpoints.iterdir()), "nothing was saved"


PATHS = "import sys, os, __main__; print('path', sys.path[0], 'name', __name__, 'args', sys.argv[1:])\n"


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["script", "link", "folder", "zip", "module", "safe"])
def test_programs_see_what_python_shows_them(tmp_path: Path, kind: str) -> None:
    package = tmp_path / "pack"
    package.mkdir()
    for path in (tmp_path / "see.py", package / "__main__.py", package / "__init__.py"):
        path.write_text("" if path.name == "__init__.py" else PATHS)
    with zipfile.ZipFile(tmp_path / "see.zip", "w") as file:
        file.writestr("__main__.py", PATHS)
    (package / "link.py").symlink_to(tmp_path / "see.py")
    target = {"link": "pack/link.py", "folder": "pack", "zip": "see.zip", "module": "pack"}.get(kind, "see.py")
    environment = {**os.environ, **({"PYTHONSAFEPATH": "1"} if kind == "safe" else {})}
    module = ["-m"] if kind == "module" else []
    alone = subprocess.run(
        [sys.executable, *module, target, "a b"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert alone.stdout.startswith("path"), alone
    line = [str(Path(sys.executable).with_name("everstep")), "run", "--nproc-per-node=1", *module, target, "a b"]
    launched = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (launched.returncode, launched.stdout) == (0, alone.stdout), launched
